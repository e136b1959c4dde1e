"""Search the hyperparameters of a training loop: `python launch.py --space rebuild`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from search.exits import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_MISTAKE
from search.output import lossy_output

HERE = Path(__file__).resolve().parent


class Misspelt(Exception):
    """A command line that cannot be read, or whose options exclude each other."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise Misspelt(f"{message}; --help lists all options")


def parser() -> argparse.ArgumentParser:
    command = Parser(description=__doc__, allow_abbrev=False)
    command.add_argument("--space", metavar="NAME_OR_FILE", help="a space in search_spaces/, or a YAML file")
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override what the space says (not its profiles and tables)",
    )
    command.add_argument("--profile", metavar="NAME", help="a profile of the space (laptop: taken without a GPU)")
    command.add_argument("--trials", type=int, metavar="N", help="how many trials in all")
    command.add_argument("--time-budget", metavar="30m", help="stop after this long: a number and s, m, h or d")
    command.add_argument("--seed", type=int, metavar="S", help="random seed of the search and its trials")
    command.add_argument("--epochs", type=int, metavar="N", help="epochs of each trial (config.epochs)")
    command.add_argument("--name", help="name of the results folder (default: the space and the time)")
    command.add_argument("--results", metavar="DIR_OR_URI", help="where results folders are kept (default: results)")
    command.add_argument("--dry-run", action="store_true", help="print the resolved space and the plan; start nothing")
    command.add_argument("--resume", metavar="RESULTS_DIR", help="go on with a search; --trials N raises its total")
    command.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again")
    command.add_argument("--warm-start", metavar="RESULTS_DIR", help="learn from an earlier search")
    command.add_argument("--address", metavar="ADDR", help="a Ray cluster (default: RAY_ADDRESS, else a local one)")
    command.add_argument("--cold", action="store_true", help="a new worker group for every trial")
    command.add_argument(
        "--table",
        nargs="?",
        const="all",
        metavar="NAME",
        help="fill the space's tables (or one), by a search for each cell",
    )
    command.add_argument("--list", action="store_true", help="list the spaces")
    command.add_argument("--report", metavar="RESULTS_DIR", help="rebuild the report and the tables of a search")
    command.add_argument("--why", metavar="TRIAL", help="with --report: why that trial ended as it did")
    command.add_argument(
        "--export",
        nargs=2,
        metavar=("WHAT", "DIR"),
        help="copy checkpoint, config and metrics of a trial (best, or with --report a number) to a new folder",
    )
    return command


def check_alone(given: argparse.Namespace, *names: str) -> None:
    """Raise Misspelt if options other than `names` are given, which the first of these would ignore."""
    defaults = vars(parser().parse_args([]))
    for name, value in vars(given).items():
        if name not in names and value != defaults[name]:
            raise Misspelt(f"--{name.replace('_', '-')} cannot be combined with --{names[0]}")


def check_said(given: argparse.Namespace) -> None:
    """Raise Misspelt for an option without a value."""
    for name, value in vars(given).items():
        if value == "":
            raise Misspelt(f"--{name.replace('_', '-')}: empty value; is a variable unset? Otherwise leave it out")


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Keep the garbage collector off: during large imports, which leave no garbage, it takes a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, and SIGUSR1 by which Slurm warns, do what Ctrl-C does, until a search handles them itself."""

    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {known: signal.signal(known, interrupt) for known in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is no reason to end
    with signals_interrupt(), contextlib.ExitStack() as output:
        try:
            given = parser().parse_args(arguments)
            check_said(given)
            if given.list:
                check_alone(given, "list")
            if given.report:
                check_alone(given, "report", "why", "export")
            looks = given.list or given.report or given.dry_run
            if not looks:  # a search goes on without output, since its folder has it too
                output.enter_context(lossy_output())
            with nothing_collected():
                from search.dispatch import run  # PyTorch and Ray, which takes seconds: not for --help or a typo

            status = run(given, HERE / "search_spaces")
            if sys.stdout is not None:  # None: it was closed before we were started
                sys.stdout.flush()
        except Misspelt as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_MISTAKE
        except KeyboardInterrupt:  # before there was anything to resume, or a second Ctrl-C
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            if not looks:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left, as `head` does
            return EXIT_FOUND
        return status


if __name__ == "__main__":
    sys.exit(main())
