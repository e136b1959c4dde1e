"""The tables of a results folder, made from its study: trials.csv, best.yaml, report.html and the output of `--why`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from search import yaml_file
from search.files import is_there, replace_text
from search.page import page, table, verbatim
from search.records.folder import BEST, ERROR, PRINTED, REPORT, SPACE, STUDY, TRIALS_CSV, TrialFolder, is_running
from search.records.patterns import patterns
from search.records.record import INTERRUPTED, RAN_TO_END, RUNNING, STATUSES, Record, best_of, solutions_of, unmended
from search.space import Space
from search.space.decode import did_you_mean
from search.space.file import read_space
from search.study import open_study, records
from search.text import short_line
from trainables.contract import UserError

UNENDED = {
    RUNNING: "it has not ended",
    INTERRUPTED: "it has not ended; if no process runs the search, --resume continues it",
}
NULL = "null"  # written for a searched value of None
OWN_COLUMNS = ("trial", "status", "reason", "name", "epochs", "seconds")  # of the table, in this order
ERROR_LINES = 8  # last lines of a failed trial's error.txt that are shown
PRINTED_LINES = 10  # last lines of its output that are shown


def read_results(results: Path) -> tuple[Space, list[Record]]:
    """Read the space and the trials of a results folder; raises UserError if it is not one."""
    if not is_there(results / SPACE):
        raise UserError(f"{results}: there is no {SPACE} here; name a results folder of an earlier search")
    space = read_space(results / SPACE)
    found = records(open_study(results / STUDY, space, create=False), space)
    return space, [_as_reported(record, results) if record.status == INTERRUPTED else record for record in found]


def _as_reported(record: Record, results: Path) -> Record:
    """Add what an unended trial has reported so far, from its folder: the study gets metrics only at the end."""
    rows = TrialFolder(results, record.number).read_metrics()
    if not rows:
        return record
    last = rows[-1]
    return replace(record, metrics=last["metrics"], epochs=last["epoch"], seconds=last.get("seconds", 0.0))


def as_of_now(results: Path, found: Sequence[Record]) -> list[Record]:
    """Return the records as of now: unended trials are `running` while a process runs the search."""
    under_way = is_running(results)
    return [replace(item, status=RUNNING) if under_way and item.status == INTERRUPTED else item for item in found]


def write_results(results: Path, space: Space, found: Sequence[Record]) -> None:
    """Write trials.csv, best.yaml and report.html, replacing earlier ones."""
    replace_text(results / TRIALS_CSV, trials_table(space, found))
    best = best_of(found, space)
    if best:
        yaml_file.write(results / BEST, best_document(results, space, best))
    else:
        (results / BEST).unlink(missing_ok=True)
    replace_text(results / REPORT, report_page(results, space, found))


def trials_table(space: Space, found: Sequence[Record]) -> str:
    """Return CSV with one row per trial: trial, status, reason, name, parameters, last metrics, epochs, seconds."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_table(space, found))
    return text.getvalue()


def _table(space: Space, found: Sequence[Record]) -> list[list[Any]]:
    """Return the header and a row of values for each trial."""
    parameters = [item.name for item in space.parameters]
    metrics = sorted({name for record in found for name in record.metrics})
    searched = [f"{name} (parameter)" if name in OWN_COLUMNS else name for name in parameters]
    columns = [_column_of(name, space) for name in metrics]
    rows: list[list[Any]] = [[*OWN_COLUMNS[:4], *searched, *columns, *OWN_COLUMNS[4:]]]
    for record in found:
        values = [_searched(record.values[name]) if name in record.values else "" for name in parameters]
        measured = ["" if (value := record.metrics.get(name)) is None else value for name in metrics]
        head = [record.number, record.status, reason_of(space, record), record.name or ""]
        rows.append([*head, *values, *measured, record.epochs, round(record.seconds, 2)])
    return rows


def _searched(value: Any) -> Any:
    """Return a searched value as its cell has it; an empty cell means that the parameter was not active."""
    return NULL if value is None else json.dumps(value) if value in ("", NULL) else value


def _column_of(metric: str, space: Space) -> str:
    """Return the heading of a metric's column; two columns with the same name would be read as one."""
    taken = metric in OWN_COLUMNS or any(item.name == metric for item in space.parameters)
    return f"{metric} (metric)" if taken else metric


def best_document(results: Path, space: Space, best: Sequence[Record]) -> dict[str, Any]:
    """Return the best trial's config, metrics and checkpoint; with several objectives also the whole Pareto front."""
    documents = [_one_best(results, space, record) for record in best]
    return documents[0] if len(documents) == 1 else {**documents[0], "front": documents}


def _one_best(results: Path, space: Space, record: Record) -> dict[str, Any]:
    saved = TrialFolder(results, record.number).checkpoint()
    return {
        "trial": record.number,
        "name": record.name,
        "objective": {item.metric: record.metrics[item.metric] for item in space.objectives},
        "metrics": dict(record.metrics),
        "data": space.data,
        "config": space.config(record.values),
        "searched": dict(record.values),
        "epochs": record.epochs,
        "checkpoint": None if saved is None else str(saved.path.relative_to(results)),
    }


def describe(space: Space) -> str:
    """Return a one-line description of the search."""
    goal = ", ".join(f"{item.mode} {item.metric}" for item in space.objectives)
    profile = f", profile {space.profile}" if space.profile else ""
    searched = ", ".join(item.name for item in space.parameters) or "nothing"
    return (
        f"{goal} over {searched}; {space.search.trials} trials by {space.search.sampler}, "
        f"scheduler {space.scheduler.name}{profile}"
    )


def summary(results: Path, space: Space, found: Sequence[Record]) -> str:
    """Return the text that is shown when a search ends."""
    counts = Counter(record.status for record in found)
    told = ", ".join(f"{counts[status]} {status}" for status in (*STATUSES, *UNENDED) if counts[status])
    lines = [f"data: {space.data}"] if space.data else []
    lines.append(f"{len(found)} trials: {told}" if found else "no trial was run")
    lines += patterns(space, found)
    if unmended(found):
        lines.append("once the cause is fixed, --resume with --retry-failed runs the failed trials again")
    best = best_of(found, space)
    if not best:
        wanted = " within the constraints" if space.constraints else ""
        ended = any(status not in UNENDED for status in counts)
        lines.append(f"no trial finished{wanted}" + (f"; {results / TRIALS_CSV} says why each one ended" * ended))
    elif len(best) == 1:
        record = best[0]
        lines.append(f"best: trial {record.number}" + (f" ({record.name})" if record.name else ""))
        lines += [f"  {name:<24} {_setting(value)}" for name, value in record.values.items()]
        lines += [f"  -> {name:<21} {_short(value)}" for name, value in record.metrics.items()]
    else:
        lines.append(f"{len(best)} trials that no other beats:")
        for record in best:
            scores = ", ".join(f"{item.metric} {_short(record.metrics[item.metric])}" for item in space.objectives)
            lines.append(f"  trial {record.number}: {scores}")
    lines.append(f"results: {results}")
    return "\n".join(lines)


def trial_line(record: Record, space: Space) -> str:
    """Return a line on an ended trial, with its reason on a second line unless it simply ran to its end."""
    scores = " ".join(f"{item.metric} {_short(record.metrics.get(item.metric))}" for item in space.objectives)
    leaves = [item.name.rpartition(".")[2] for item in space.parameters]
    values = " ".join(
        f"{leaf if leaves.count(leaf := name.rpartition('.')[2]) == 1 else name}={_setting(value)}"
        for name, value in record.values.items()
    )
    name = f" [{record.name}]" if record.name else ""
    head = f"trial {record.number:>3}  {record.status:<13} {scores}  {record.epochs} epochs  {record.seconds:.1f} s"
    reason = reason_of(space, record)
    ending = "" if (record.status, reason) == ("finished", RAN_TO_END) else f"\n           {reason}"
    return f"{head}  {values}{name}{ending}"


def by_number(found: Sequence[Record], number: str, source: str) -> Record:
    """Return the trial with the number that a user typed; raises UserError if `source` has no such trial."""
    known = {str(record.number): record for record in found}
    key = number.lstrip("0") or number[:1]  # "" is no number, and "000" is trial 0
    if key not in known:
        raise UserError(f"trial {number or repr(number)}: there is none in {source}; {did_you_mean(number, known)}")
    return known[key]


def why(results: Path, number: str) -> str:
    """Explain in words why a trial ended as it did; raises UserError for an unknown trial."""
    space, found = read_results(results)
    record = by_number(as_of_now(results, found), number, str(results))
    lines = [
        f"trial {record.number}" + (f" ({record.name})" if record.name else "") + f": {record.status}",
        f"reason: {UNENDED.get(record.status, record.reason)}",
        f"after {record.epochs} epochs and {record.seconds:.1f} s",
        *(f"run again as trial {other.number}" for other in found if other.again == record.number),
        *([] if record.again is None else [f"another attempt at trial {record.again}"]),
    ]
    lines += broken(space, record)
    lines += post_mortem(results, record)
    folder = TrialFolder(results, record.number)
    if record.status == "failed" and (error := folder.read_error()):
        # Not every failure is written there: the slot may have died before it could.
        whose = "" if error.split("\n", 1)[0] == record.reason else ", of an earlier attempt,"
        shown = error.rstrip().splitlines()[-ERROR_LINES:]
        lines += [f"{folder.path / ERROR}{whose} ends:", *(f"  {line}" for line in shown)]
    if printed := folder.last_printed(PRINTED_LINES):
        lines += [f"{folder.path / PRINTED} ends:", *(f"  {line}" for line in printed)]
    lines += [f"  {name} = {_setting(value)}" for name, value in record.values.items()]
    metric = space.objectives[0].metric
    history = folder.read_metrics()
    lines += [f"  epoch {row['epoch']}: {metric} {_short(row['metrics'].get(metric))}" for row in history]
    return "\n".join(lines)


def broken(space: Space, record: Record) -> list[str]:
    """Return a line for each of the space's constraints that the trial's last report does not meet."""
    lines = []
    for name, limit in space.constraints.items():
        value = record.metrics.get(name)
        if value is None and record.epochs:
            lines.append(f"constraint broken: {name} was not finite, or missing, in the last report")
        elif value is not None and limit.excess(value) > 0:
            lines.append(f"constraint broken: {name} = {value!r}, limit {limit}")
    return lines


def reason_of(space: Space, record: Record) -> str:
    """Return why a trial ended and, if it finished, why it cannot be the best all the same."""
    return "; ".join([record.reason, *(broken(space, record) if record.status == "finished" else [])])


def post_mortem(results: Path, record: Record) -> list[str]:
    """Return the findings on a divergence, one per line; empty for a trial that ended otherwise."""
    found = TrialFolder(results, record.number).read_divergence() if record.status == "diverged" else None
    if found is None:
        return []
    told = {name: value for name, value in found.items() if name != "reason" and value is not None}
    return ["post-mortem:", *(f"  {name}: {_listed(value)}" for name, value in told.items())]


def report_page(results: Path, space: Space, found: Sequence[Record]) -> str:
    """Return the report, a self-contained HTML page."""
    blown = [
        "\n".join([f"trial {record.number}: {record.reason}", *post_mortem(results, record)])
        for record in found
        if record.status == "diverged"
    ]
    return page(
        f"Search: {space.name}",
        [
            verbatim(f"{describe(space)}\n\n{summary(results, space, found)}"),
            _trials(space, found),
            "<h2>What diverged</h2>",
            verbatim("\n\n".join(blown) or "nothing"),
            "<h2>Space</h2>",
            verbatim(yaml_file.dump(space.document())),
        ],
    )


def _trials(space: Space, found: Sequence[Record]) -> str:
    """Return the trials as an HTML table: the best first, and the columns that tell most."""
    best = best_of(found, space)
    ranked = dict.fromkeys(record.number for record in (*best, *solutions_of(found, space), *found))
    header, *rows = _table(space, found)
    by_number = {row[0]: row for row in rows}
    first = ["trial", "status", *(_column_of(item.metric, space) for item in space.objectives), "reason"]
    last = ["name"] if any(record.name for record in found) else []
    order = [header.index(name) for name in first if name in header]
    order += [number for number, name in enumerate(header) if name not in (*first, "name")]
    order += [header.index(name) for name in last]
    lines = [[_cell(row[number]) for number in order] for row in (header, *(by_number[number] for number in ranked))]
    return table(lines, best=range(len(best)), prose=[lines[0].index(name) for name in ("reason", *last)])


def _cell(value: Any) -> str:
    return short_line(_short(value), "")


def _setting(value: Any) -> str:
    """Format a searched value, one of None as a space file has it."""
    return NULL if value is None else _short(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _listed(value: Any) -> str:
    """Format a value of a post-mortem; of a long list only the end."""
    if isinstance(value, list):
        head = "... " if len(value) > 8 else ""
        return head + ", ".join(_short(item) for item in value[-8:])
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items() if item is not None)
    return _short(value)
