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
from search.page import page
from search.page import table as html_table
from search.records.folder import BEST, REPORT
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
        names = [re.sub(r"[\W_]+", "_", part).strip("_") for part in (self.table, self.row, self.column)]
        return "-".join(name for name in names if name)


def read_tables(file: Path, profile: str | None, has_gpu: bool) -> dict[str, Table]:
    """Return the tables of a space file by name; raises UserError if there are none."""
    try:
        document, _ = profiled(yaml_file.read(file), profile, has_gpu)
        tables = tables_in(document.get("tables"))
        if not tables:
            raise UserError("tables: there are none; --table needs a space that has some")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return tables


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
    texts, parts = list[str](), list[str]()
    for name, table in tables.items():
        best = {(cell.row, cell.column): _best(results / cell.folder) for cell in cells if cell.table == name}
        lines = table_lines(table, {place: document.get("metrics", {}) for place, document in best.items()})
        notes = [f"In brackets: {table.source}"] if table.source else []
        notes += [f"Data: {line}" for line in dict.fromkeys(document.get("data") for document in best.values()) if line]
        texts += [_markdown(lines), *notes]
        parts += [html_table(lines, prose=[0]), *(f"<p>{html.escape(note)}</p>" for note in notes)]
    text = "\n\n".join(texts) + "\n"
    replace_text(results / MARKDOWN, text)
    links = [f'<li><a href="{html.escape(cell.folder)}/{REPORT}">{html.escape(cell.folder)}</a></li>' for cell in cells]
    parts += ["<h2>The searches</h2>", "<ul>", *links, "</ul>"]
    replace_text(results / REPORT, page(f"Tables: {title}", parts))
    return text


def _best(folder: Path) -> Mapping[str, Any]:
    """Return the content of a search's best.yaml; empty if there is none yet."""
    return yaml_file.read(folder / BEST) if (folder / BEST).exists() else {}


def table_lines(table: Table, best: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of a table, its headings first.

    A cell is `measured (reference)`, with a dash for what no trial that finished within the constraints measured.
    best: metrics of the best trial by row and column.
    """
    several = len(table.columns) > 1
    headings = [f"{heading}, {column}" if several else heading for column in table.columns for heading in table.metrics]
    return [
        [table.title, *headings],
        *(
            [row]
            + [
                _cell(best.get((row, column), {}).get(metric), _reference(table, row, column, heading))
                for column in table.columns
                for heading, metric in table.metrics.items()
            ]
            for row in table.rows
        ),
    ]


def _reference(table: Table, row: str, column: str, heading: str) -> float | None:
    return table.reference.get(row, {}).get(column, {}).get(heading)


def _cell(value: Any, reference: float | None) -> str:
    told = _number(value) if isinstance(value, (int, float)) else "-"
    return told if reference is None else f"{told} ({_number(reference)})"


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = [
        "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in line) + " |" for line in lines
    ]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])
