"""The tables of a results folder, made from its study: trials.csv, best.yaml, report.html and the output of `--why`."""

from __future__ import annotations

import csv
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from search import yaml_file
from search.files import is_there, replace_text
from search.records.folder import BEST, ERROR, PRINTED, REPORT, SPACE, STUDY, TRIALS_CSV, TrialFolder, is_running
from search.records.patterns import patterns
from search.records.record import INTERRUPTED, RAN_TO_END, RUNNING, STATUSES, Record, best_of, unmended
from search.space import Space
from search.space.decode import did_you_mean
from search.space.file import read_space
from search.study import open_study, records
from trainables.contract import UserError

UNENDED = {
    RUNNING: "it has not ended",
    INTERRUPTED: "it has not ended; if no process runs the search, --resume continues it",
}
NULL = "null"  # written for a searched value of None; an empty cell means that the parameter was not active
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
    # Two columns with the same name would be read as one.
    own = {"trial", "status", "reason", "name", "epochs", "seconds"}
    searched = [f"{name} (parameter)" if name in own else name for name in parameters]
    columns = [f"{name} (metric)" if name in own or name in parameters else name for name in metrics]
    rows: list[list[Any]] = [["trial", "status", "reason", "name", *searched, *columns, "epochs", "seconds"]]
    for record in found:
        values = [NULL if (value := record.values.get(name, "")) is None else value for name in parameters]
        measured = ["" if (value := record.metrics.get(name)) is None else value for name in metrics]
        head = [record.number, record.status, reason_of(space, record), record.name or ""]
        rows.append([*head, *values, *measured, record.epochs, round(record.seconds, 2)])
    return rows


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
        lines += [f"  {name:<24} {_short(value)}" for name, value in record.values.items()]
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
    values = " ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in record.values.items())
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
    lines += [f"  {name} = {_short(value)}" for name, value in record.values.items()]
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
    return ["post-mortem:", *(f"  {name}: {_listed(value)}" for name, value in found.items() if name != "reason")]


def report_page(results: Path, space: Space, found: Sequence[Record]) -> str:
    """Return the report, a self-contained HTML page."""
    header, *body = _table(space, found)
    best = {record.number for record in best_of(found, space)}
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = []
    for row in body:
        marked = " class='best'" if row[0] in best else ""
        lines.append(f"<tr{marked}>" + "".join(f"<td>{html.escape(_short(cell))}</td>" for cell in row) + "</tr>")
    blown = [
        "\n".join([f"trial {record.number}: {record.reason}", *post_mortem(results, record)])
        for record in found
        if record.status == "diverged"
    ]
    return _PAGE.format(
        diverged=html.escape("\n\n".join(blown) or "nothing"),
        title=html.escape(space.name),
        summary=html.escape(summary(results, space, found)),
        header=cells,
        rows="\n".join(lines),
        space=html.escape(yaml_file.dump(space.document())),
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Search: {title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
pre {{ background: #f5f5f5; padding: 1em; overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25em .7em; border-bottom: 1px solid #ddd; white-space: nowrap }}
.best {{ background: #e7f5e7; font-weight: 600 }}
.table {{ overflow-x: auto }}
</style>
<h1>Search: {title}</h1>
<pre>{summary}</pre>
<div class="table"><table><thead><tr>{header}</tr></thead><tbody>
{rows}
</tbody></table></div>
<h2>What diverged</h2>
<pre>{diverged}</pre>
<h2>Space</h2>
<pre>{space}</pre>
</html>
"""


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
