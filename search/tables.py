"""Tables of a space: each cell is the best trial of a search of its own, all with the same budget.

tables:
  missing:
    title: A missing sensor, and what its rebuild wins back
    rows:                                   # the overrides of each row and, below, of each column
      image: {config.rebuild.target: [image]}
      radar: {config.rebuild.target: [radar]}
    columns:
      zeros: {config.model.missing: zerolike}
    metrics: {rebuilt: dba_rebuilt}         # heading -> metric of the best trial
    reference: {image: {zeros: {rebuilt: 0.5941}}}
    source: where the reference values come from
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search import yaml_file
from search.files import replace_text
from search.records.folder import BEST, REPORT
from search.space.decode import did_you_mean
from search.space.file import profiled
from search.space.sections import Table, tables_in
from trainables.contract import UserError

MARKDOWN = "tables.md"


@dataclass(frozen=True)
class Cell:
    """One search of a table."""

    table: str
    row: str
    column: str
    overrides: tuple[str, ...]  # `KEY=VALUE`, in addition to the command's

    @property
    def folder(self) -> str:
        """The name of its results folder, within the tables' folder."""
        names = [re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_") for part in (self.table, self.row, self.column)]
        return "-".join(name for name in names if name)


def read_tables(file: Path, profile: str | None, has_gpu: bool, wanted: str) -> dict[str, Table]:
    """Return the tables of a space file by name; raises UserError if there are none, or not the one wanted.

    wanted: a table's name or "all".
    """
    try:
        document, _ = profiled(yaml_file.read(file), profile, has_gpu)
        tables = tables_in(document.get("tables"))
        if not tables:
            raise UserError("tables: there are none; --table needs a space that has some")
        if wanted != "all" and wanted not in tables:
            raise UserError(f"--table {wanted}: there is none; {did_you_mean(wanted, tables)}")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return tables if wanted == "all" else {wanted: tables[wanted]}


def cells_of(tables: Mapping[str, Table]) -> list[Cell]:
    """Return every search that the tables require."""
    return [
        Cell(name, row, column, _overrides({**over_column, **over_row}))
        for name, table in tables.items()
        for row, over_row in table.rows.items()
        for column, over_column in table.columns.items()
    ]


def _overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={yaml_file.dump_line(value)}" for key, value in values.items())


def write_tables(results: Path, title: str, tables: Mapping[str, Table], cells: Sequence[Cell]) -> str:
    """Write tables.md and report.html from the best trials of the cells so far; returns the Markdown."""
    texts = []
    for name, table in tables.items():
        best = {(cell.row, cell.column): _best(results / cell.folder) for cell in cells if cell.table == name}
        texts.append(markdown(table, {place: document.get("metrics", {}) for place, document in best.items()}))
        texts += [f"Data: {line}" for line in dict.fromkeys(document.get("data") for document in best.values()) if line]
    text = "\n\n".join(texts) + "\n"
    replace_text(results / MARKDOWN, text)
    links = [f'<li><a href="{html.escape(cell.folder)}/{REPORT}">{html.escape(cell.folder)}</a></li>' for cell in cells]
    page = _PAGE.format(title=html.escape(title), tables=_html(text), links="\n".join(links))
    replace_text(results / REPORT, page)
    return text


def _best(folder: Path) -> Mapping[str, Any]:
    """Return the content of a search's best.yaml; empty if there is none yet."""
    if not (folder / BEST).exists():
        return {}
    document: dict[str, Any] = yaml_file.read(folder / BEST)
    return document


def markdown(table: Table, best: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return a table as Markdown; a cell is `measured (reference)`, a dash if no trial finished within the constraints.

    best: metrics of the best trial by row and column.
    """
    several = len(table.columns) > 1
    headings = [f"{heading}, {column}" if several else heading for column in table.columns for heading in table.metrics]
    lines = [f"| {' | '.join([table.title, *headings])} |", "|---" * (len(headings) + 1) + "|"]
    for row in table.rows:
        told = [
            _cell(best.get((row, column), {}).get(metric), _reference(table, row, column, heading))
            for column in table.columns
            for heading, metric in table.metrics.items()
        ]
        lines.append(f"| {' | '.join([row, *told])} |")
    if table.source:
        lines.append(f"\nIn brackets: {table.source}")
    return "\n".join(lines)


def _reference(table: Table, row: str, column: str, heading: str) -> float | None:
    return table.reference.get(row, {}).get(column, {}).get(heading)


def _cell(value: Any, reference: float | None) -> str:
    told = _number(value) if isinstance(value, (int, float)) else "-"
    return told if reference is None else f"{told} ({_number(reference)})"


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def _html(text: str) -> str:
    """Convert the Markdown of these tables to HTML."""
    out: list[str] = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        if not lines[0].startswith("|"):
            out.append(f"<p>{html.escape(block)}</p>")
            continue
        rows = [[html.escape(cell) for cell in line.strip("| ").split(" | ")] for line in (lines[0], *lines[2:])]
        head = "".join(f"<th>{cell}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
        out.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "\n".join(out)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Tables: {title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1em }}
th, td {{ text-align: left; padding: .25em .7em; border-bottom: 1px solid #ddd }}
</style>
<h1>Tables: {title}</h1>
{tables}
<h2>The searches</h2>
<ul>
{links}
</ul>
</html>
"""
