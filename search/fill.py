"""`launch.py --table`: runs a search for each cell of a space's tables, and fills the tables from the best trials."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from search import run as engine
from search.command import cap_to_grid, check_unused, made_anew, named_folder, nodes_for, prepare, resolve, search
from search.interruption import Interruption
from search.options import Options
from search.records.folder import SPACE, STUDY
from search.records.mirror import Mirror, Overtaken, below, fetch, folders_at, holds_search
from search.records.record import INTERRUPTED, best_of
from search.results import read_results
from search.space.decode import did_you_mean
from search.space.file import load_space
from search.space.sections import Table
from search.study import ended_after, is_begun, open_study
from search.tables import Cell, cells_of, read_tables, write_tables
from trainables.contract import UserError


def fill(options: Options, wanted: str) -> list[engine.Outcome]:
    """Run the remaining searches of the tables `wanted`; returns the outcomes of their cells, none for a dry run.

    wanted: a table's name or "all". The same command with the same --name continues the tables, also from a bucket: a
    search that ended is not run again, unless it is to have more trials. Raises UserError for every mistake, in any
    cell, before the first search runs.
    """
    if options.resume is not None or options.warm_start is not None:
        raise UserError("--table continues by --name; it cannot be combined with --resume or --warm-start")
    nodes = nodes_for(options)
    has_gpu = any(node.gpus for node in nodes)
    tables = read_tables(options.file, options.profile, has_gpu)
    if wanted != "all" and wanted not in tables:
        raise UserError(f"{options.file}: --table {wanted}: there is none; {did_you_mean(wanted, tables)}")
    results = named_folder(options, f"{options.file.stem}-tables")
    everything = cells_of(tables)
    cells = [cell for cell in everything if wanted in ("all", cell.table)]
    if len({cell.folder for cell in cells}) < len(cells):
        raise UserError(f"{options.file}: tables: two cells differ only in punctuation; name rows and columns by words")
    if not all(cell.folder for cell in cells):
        raise UserError(
            f"{options.file}: tables: a cell has no word in its names; name tables, rows or columns by words"
        )
    check_unused(results)
    for cell in cells:
        resolved = resolve(_of_cell(options, results, cell), nodes)
        if not options.dry_run:
            prepare(resolved.space, resolved.trainable)
    if options.name is None and not options.dry_run:
        results = made_anew(results)
    mirror = None if options.uri is None or options.dry_run else _mirror(below(options.uri, results.name), results)
    outcomes: list[engine.Outcome] = []
    for number, cell in enumerate(cells, start=1):
        print(f"\ntable {cell.table}, cell {number} of {len(cells)}: {cell.row} {cell.column}".rstrip(), flush=True)
        of_cell = _of_cell(options, results, cell)
        interruption = Interruption()
        outcome = _ended(of_cell) or search(of_cell, mirror, interruption)
        if outcome is None:
            continue
        stops = interruption.pressed or (outcome.interrupted and not outcome.hopeless)
        outcomes.append(replace(outcome, interrupted=outcome.interrupted or stops))
        try:
            text = _write(results, options.file.stem, tables, everything)
        except OSError as error:  # such as a full disk, which the search has reported
            text = f"the tables were not updated: {error}"
        if mirror is not None and not outcome.overtaken:
            try:
                mirror.push_last()
            except Overtaken as error:
                print(f"ended: {error}", flush=True)
                outcomes[-1] = replace(outcome, interrupted=True, reason=str(error), overtaken=True)
        if outcomes[-1].overtaken:
            return outcomes
        if stops:
            print(f"the tables go on with: {_again(sys.argv, results)}")
            return outcomes
    if outcomes:
        print(f"\n{text}\ntables: {results}")
    return outcomes


def _mirror(uri: str, results: Path) -> Mirror:
    """Return the mirror of the tables' folder, after fetching those of its searches that are missing or older here."""
    for name in folders_at(uri):
        if holds_search(below(uri, name)):
            fetch(below(uri, name), results)
    mirror = Mirror(results, uri, again=_again(sys.argv, results))
    mirror.check()
    mirror.begin()
    return mirror


def _ended(options: Options) -> engine.Outcome | None:
    """Return the outcome of a cell's search if it has ended and is to have no more trials; else None."""
    if options.resume is None or options.dry_run:
        return None
    space, _ = load_space(options.file, options.overrides)
    ended = ended_after(open_study(options.resume / STUDY, space, create=False))
    if ended is None or cap_to_grid(space).search.trials > ended:
        return None
    _, found = read_results(options.resume)
    if any(record.status == INTERRUPTED for record in found):  # a retry of a failed trial, begun since then
        return None
    print("its search has ended; a larger --trials would continue it", flush=True)
    return engine.Outcome(tuple(found), tuple(best_of(found, space)), interrupted=False)


def _write(results: Path, title: str, tables: Mapping[str, Table], cells: Sequence[Cell]) -> str:
    """Write the tables of which a search has begun, this time or before; returns the Markdown."""
    begun = {cell.table for cell in cells if is_begun(results / cell.folder / STUDY)}
    shown = {name: table for name, table in tables.items() if name in begun}
    return write_tables(results, title, shown, [cell for cell in cells if cell.table in begun])


def _of_cell(options: Options, results: Path, cell: Cell) -> Options:
    folder = results / cell.folder
    begun = is_begun(folder / STUDY)
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
