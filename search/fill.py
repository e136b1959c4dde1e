"""`launch.py --table`: a search for each cell of a space's tables, one after another, and the tables from the best."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from search import run as engine
from search.command import Options, search
from search.folder import SPACE, STUDY
from search.mirror import Mirror, below
from search.space_file import load_space
from search.tables import Cell, cells_of, read_tables, write_tables
from trainables.contract import UserError


def fill(options: Options, wanted: str) -> list[engine.Outcome]:
    """Run what is left of the searches of the tables, `wanted` or "all"; none of them after a dry run.

    The same command with the same --name goes on with the tables: a search that ended is not run again. Raises
    UserError for every mistake, in any cell, before Ray starts.
    """
    if options.resume is not None or options.warm_start is not None:
        raise UserError("--table goes on where it was by --name; it does not go with --resume or --warm-start")
    nodes = engine.start_ray(options.address) if options.address else engine.this_machine()
    has_gpu = any(node.gpus for node in nodes)
    tables = read_tables(options.file, options.profile, has_gpu, wanted)
    results = options.results / (options.name or f"{options.file.stem}-tables-{time.strftime('%Y%m%d-%H%M%S')}")
    cells = cells_of(tables)
    if len({cell.folder for cell in cells}) < len(cells):
        raise UserError(f"{options.file}: tables: two cells differ in signs only; name rows and columns by words")
    for cell in cells:
        load_space(options.file, (*options.overrides, *cell.overrides), options.profile, has_gpu)
    mirror = None if options.uri is None or options.dry_run else Mirror(results, below(options.uri, results.name))
    if mirror is not None:
        mirror.begin()
    outcomes: list[engine.Outcome] = []
    for number, cell in enumerate(cells, start=1):
        print(f"\ntable {cell.table}, cell {number} of {len(cells)}: {cell.row} {cell.column}".rstrip(), flush=True)
        outcome = search(_of_cell(options, results, cell))
        if outcome is None:
            continue
        outcomes.append(outcome)
        text = write_tables(results, options.file.stem, tables, cells)
        if mirror is not None:
            mirror.push()
        if outcome.interrupted:
            print(f"the tables go on with: {_again(sys.argv, results)}")
            return outcomes
    if outcomes:
        print(f"\n{text}\ntables: {results}")
    return outcomes


def _of_cell(options: Options, results: Path, cell: Cell) -> Options:
    folder = results / cell.folder
    begun = (folder / STUDY).exists()
    return replace(
        options,
        file=folder / SPACE if begun else options.file,
        overrides=(*options.overrides, *cell.overrides),
        profile=None if begun else options.profile,
        results=results,
        name=cell.folder,
        resume=folder if begun else None,
        uri=None,  # the tables' folder is mirrored as a whole
    )


def _again(arguments: Sequence[str], results: Path) -> str:
    given = list(arguments)
    named = any(word == "--name" or word.startswith("--name=") for word in given)
    return shlex.join(["python", *given, *([] if named else ["--name", results.name])])
