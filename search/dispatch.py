"""From a parsed command line to its exit status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from search.command import report, search
from search.exits import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_NOTHING
from search.fill import fill
from search.options import Options, list_spaces
from trainables.contract import UserError


def run(given: argparse.Namespace, spaces: Path) -> int:
    """Do what the command line says, and return the exit status; prints a user's mistake.

    spaces: the folder of the spaces that are known by name.
    """
    try:
        if given.list:
            print(list_spaces(spaces))
            return EXIT_FOUND
        if given.report:
            print(report(given.report, given.why, given.export))
            return EXIT_FOUND
        return _searched(given, spaces)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE


def _searched(given: argparse.Namespace, spaces: Path) -> int:
    options = Options.read(given, spaces)
    outcomes = fill(options, given.table) if given.table else [search(options)]
    ran = [outcome for outcome in outcomes if outcome is not None]
    if any(outcome.reason for outcome in ran):  # not 130: a script that resumes on 130 would fail again
        return EXIT_NOTHING
    if any(outcome.interrupted for outcome in ran):
        return EXIT_INTERRUPTED
    return EXIT_FOUND if not ran or any(outcome.best for outcome in ran) else EXIT_NOTHING
