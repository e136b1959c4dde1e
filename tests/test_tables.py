"""Tables of searches: what a space file may say of them, which searches they ask for, and how they read."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import ask, end_toy, open_journal
from spaces import write_family

from launch import main
from search import fill, yaml_file
from search.options import Options
from search.retry import retry_failed
from search.space.file import load_space
from search.study import mark_ended
from search.tables import cells_of, read_tables, table_lines, write_tables
from trainables.contract import UserError

SPACES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
WITH_TABLES = [path for path in SPACES if "tables" in yaml_file.read(path)]
SPACE = """
trainable: toys:descend
objective: {metric: loss, mode: min}
config:
  epochs: 3
  start: 5.0
  lr: {log: [1.0e-2, 0.4]}
search: {trials: 9}
tables:
  starts:
    title: Where it starts
    rows:
      near: {config.start: 1.0}
      far, known: {config.start: 50.0, search.trials: 1}
    columns:
      few: {search.trials: 2}
      more: {}
    metrics: {loss: loss, epochs run: epochs}
    reference: {near: {few: {loss: 0.25}}}
    source: a textbook
  alone:
    title: Only one
    rows: {one: {config.start: 2.0}}
    metrics: {loss: loss}
profiles:
  short:
    tables: {starts: {columns: {few: {search.trials: 1}}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "starts.yaml"
    path.write_text(SPACE)
    return path


def test_a_cell_overrides_what_its_row_and_column_say(file: Path) -> None:
    cells = [cell for cell in cells_of(read_tables(file, None, True)) if cell.table == "starts"]
    assert [(cell.row, cell.column) for cell in cells] == [
        ("near", "few"),
        ("near", "more"),
        ("far, known", "few"),
        ("far, known", "more"),
    ]
    assert cells[0].overrides == ("search.trials=2", "config.start=1.0")
    assert cells[2].overrides == ("search.trials=1", "config.start=50.0")  # a row has the last word
    assert cells[2].folder == "starts-far_known-few"


def test_every_table_is_read_and_a_profile_changes_them(file: Path) -> None:
    assert list(read_tables(file, None, True)) == ["starts", "alone"]
    assert [cell.folder for cell in cells_of(read_tables(file, None, True))][-1:] == ["alone-one"]
    assert read_tables(file, "short", True)["starts"].columns["few"] == {"search.trials": 1}


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("reference: {near", "reference: {nears", "reference.nears: no such row; did you mean `near`"),
        ("{few: {loss: 0.25", "{fews: {loss: 0.25", "reference.near.fews: no such column; did you mean `few`"),
        ("{few: {loss: 0.25", "{few: {lost: 0.25", "reference.near.few.lost: no such heading; did you mean `loss`"),
        ("    title: Only one\n", "", "tables.alone.title: a value is needed"),
        ("rows: {one: {config.start: 2.0}}", "rows: {}", "tables.alone.rows: "),
        (
            "    title: Only one\n",
            "    title: Only one\n    rwos: {}\n",
            "tables.alone.rwos: no such key; did you mean",
        ),
    ],
)
def test_mistakes_are_named(file: Path, old: str, new: str, match: str) -> None:
    assert old in SPACE
    file.write_text(SPACE.replace(old, new))
    with pytest.raises(UserError, match=match):
        read_tables(file, None, True)
    with pytest.raises(UserError, match=match):
        load_space(file)  # and in a search that fills none of them


def test_a_mistake_in_a_profile_that_is_not_taken_is_named_as_well(file: Path) -> None:
    file.write_text(SPACE.replace("few: {search.trials: 1}", "few: [search.trials]"))
    with pytest.raises(UserError, match=r"profiles\.short: tables\.starts\.columns\.few: "):
        load_space(file, profile=None)


def test_an_unknown_table_and_a_space_without_any(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--space", str(file), "--table", "strats"]) == 2
    assert "--table strats: there is none; did you mean `starts`" in capsys.readouterr().err
    file.write_text(SPACE[: SPACE.index("tables:")])
    with pytest.raises(UserError, match="tables: there are none"):
        read_tables(file, None, True)


def test_a_row_may_have_any_number_and_any_domain(file: Path) -> None:
    file.write_text(SPACE.replace("{config.start: 2.0}", "{config.start: {log: [1.0e-5, 2.0]}, config.lr: 1.0e-6}"))
    cell = cells_of(read_tables(file, None, True))[-1]
    space, _ = load_space(file, cell.overrides)
    assert [str(parameter.domain) for parameter in space.parameters] == ["[1e-05, 2]"]
    assert space.tree["lr"] == 1e-6


@pytest.mark.parametrize(("value", "told"), [(3.2e-5, "3.2e-05"), (0.0512, "0.0512"), (0.5, "0.5000"), (0.0, "0.0000")])
def test_a_cell_has_four_digits_that_count(value: float, told: str, file: Path) -> None:
    table = read_tables(file, None, True)["alone"]
    assert table_lines(table, {("one", ""): {"loss": value}}) == [["Only one", "loss"], ["one", told]]


def test_what_a_table_says(file: Path) -> None:
    table = read_tables(file, None, True)["starts"]
    best = {("near", "few"): {"loss": 0.5, "epochs": 3}, ("far, known", "few"): {}}
    assert table_lines(table, best) == [
        ["Where it starts", "loss, few", "epochs run, few", "loss, more", "epochs run, more"],
        ["near", "0.5000 (0.2500)", "3.0000", "-", "-"],
        ["far, known", "-", "-", "-", "-"],
    ]


def test_the_page_links_to_every_search(file: Path, tmp_path: Path) -> None:
    tables = read_tables(file, None, True)
    cells = cells_of(tables)
    found = {"trial": 1, "metrics": {"loss": 0.125, "epochs": 3}}
    for name in ("starts-near-few", "starts-near-more", "alone-one"):
        (tmp_path / name).mkdir()
    yaml_file.write(tmp_path / "starts-near-few" / "best.yaml", {**found, "data": "real, honest split"})
    yaml_file.write(tmp_path / "starts-near-more" / "best.yaml", {**found, "data": "real, honest split"})
    yaml_file.write(tmp_path / "alone-one" / "best.yaml", {**found, "data": None})
    text = write_tables(tmp_path, "starts", tables, cells)
    page = (tmp_path / "report.html").read_text()
    assert "0.1250 (0.2500)" in text
    assert "<td>0.1250 (0.2500)</td>" in page
    assert text.count("Data: ") == text.count("Data: real, honest split") == 1
    assert "<p>Data: real, honest split</p>" in page
    assert all(f'href="{cell.folder}/report.html"' in page for cell in cells)
    assert (tmp_path / "tables.md").read_text() == text
    assert "| near | 0.1250 (0.2500) |" in text
    assert "In brackets: a textbook" in text.splitlines()


def test_a_name_may_be_empty_or_have_a_bar(file: Path, tmp_path: Path) -> None:
    file.write_text(SPACE.replace("rows: {one: ", "rows: {'': {}, a | b: "))
    tables = read_tables(file, None, True)
    text = write_tables(tmp_path, "starts", {"alone": tables["alone"]}, cells_of(tables))
    page = (tmp_path / "report.html").read_text()
    assert text.splitlines() == ["| Only one | loss |", "|---|---|", "|  | - |", r"| a \| b | - |"]
    assert '<tr><td class="prose"></td><td>-</td></tr>\n<tr><td class="prose">a | b</td><td>-</td></tr>' in page


def test_a_title_on_two_lines_is_one_cell(file: Path, tmp_path: Path) -> None:
    file.write_text(SPACE.replace("title: Only one", "title: |\n      Only\n      one"))
    tables = read_tables(file, None, True)
    text = write_tables(tmp_path, "starts", {"alone": tables["alone"]}, cells_of(tables))
    assert text.startswith("| Only one | loss |\n")


def test_names_may_be_in_any_script(file: Path) -> None:
    file.write_text(SPACE.replace("rows: {one: ", "rows: {груша: {}, яблоко: "))
    cells = cells_of(read_tables(file, None, True))
    assert [cell.folder for cell in cells if cell.table == "alone"] == ["alone-груша", "alone-яблоко"]


def test_a_cell_without_a_word_in_its_names_has_no_folder(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SPACE.replace("  alone:", "  '-':").replace("{one: ", "{'*': "))
    assert main(["--space", str(file), "--table", "-", "--dry-run"]) == 2
    assert "tables: a cell has no word in its names" in capsys.readouterr().err


def test_the_tables_of_a_bucket_go_on_on_a_machine_that_has_none_of_them(tmp_path: Path) -> None:
    there, here = tmp_path / "bucket/t", tmp_path / "results/t"
    for cell in ("starts-near-few", "alone-one"):
        (there / cell).mkdir(parents=True)
        (there / cell / "space.yaml").write_text(SPACE)
        (there / cell / "study.journal").write_text(cell)
    fill._mirror(f"file://{there}", here)
    assert (here / "starts-near-few/study.journal").read_text() == "starts-near-few"
    (here / "alone-one/study.journal").write_text("another search")
    with pytest.raises(UserError, match="alone-one holds a different search from file:"):
        fill._mirror(f"file://{there}", here)
    assert (there / "alone-one/study.journal").read_text() == "alone-one"


def test_a_search_that_ended_is_run_again_for_more_trials_alone(file: Path, tmp_path: Path) -> None:
    """Its time may have been over before all of them had been begun."""
    cell = cells_of(read_tables(file, None, True))[-1]
    space, _ = load_space(file, (*cell.overrides, "search.trials=3"))
    results = tmp_path / "t" / cell.folder
    ledger = open_journal(space, results)
    yaml_file.write(results / "space.yaml", space.document())
    end_toy(ledger, ask(ledger), "finished")
    given = argparse.Namespace(
        **dict.fromkeys(("why", "export", "table", "resume", "profile", "name", "warm_start", "results", "trials")),
        **dict.fromkeys(("time_budget", "seed", "epochs", "address", "cold", "dry_run", "retry_failed")),
        **{"space": str(file), "set": []},
    )
    of_cell = fill._of_cell(Options.read(given, tmp_path), tmp_path / "t", cell)
    assert fill._ended(of_cell) is None
    mark_ended(ledger.study, 3)
    outcome = fill._ended(of_cell)
    assert outcome is not None
    assert [record.number for record in outcome.best] == [0]
    opened = ask(ledger)
    ledger.end("slot", "failed", "a bug")
    mark_ended(ledger.study, 3)
    retry_failed(results, space)
    assert opened.number == 1
    assert fill._ended(of_cell) is None, "another attempt at what failed is left"
    more = replace(of_cell, overrides=(*of_cell.overrides, "search.trials=4"))
    assert fill._ended(more) is None


def test_every_cell_is_checked_before_any_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(SPACE.replace("{config.start: 2.0}", "{confg.x: 2}"))
    monkeypatch.chdir(tmp_path)
    assert main(["--space", str(file), "--table", "--dry-run"]) == 2
    assert "confg.x: no such key" in capsys.readouterr().err
    assert main(["--space", str(file), "--table", "--resume", "x"]) == 2
    assert main(["--space", str(file), "--table", "starts", "--dry-run"]) == 0
    assert "cell 4 of 4: far, known more" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.sampler: grid", "search.sampler: grid needs finitely many values of lr"),
        ("resources.workers: 99", "resources: a group of 99 x "),
    ],
)
def test_a_cell_that_cannot_be_searched_is_told_before_any_runs(
    override: str,
    message: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file.write_text(SPACE.replace("{config.start: 2.0}", f"{{{override}}}"))
    monkeypatch.chdir(tmp_path)
    assert main(["--space", str(file), "--table"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_data_that_a_cell_cannot_be_trained_on_are_told_before_any_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_family(
        tmp_path,
        """
        from trainables.contract import UserError

        def train(trial):
            yield {"loss": 1.0}

        def prepare(config):
            if config["start"] == 2.0:
                raise UserError("config.start: there are no data from 2.0 on")
        """,
    )
    file.write_text(SPACE.replace("toys:descend", f"{name}:train"))
    monkeypatch.chdir(tmp_path)
    assert main(["--space", str(file), "--table"]) == 2
    assert "there are no data from 2.0 on" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_tables_and_a_search_do_not_share_a_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/night").mkdir(parents=True)
    (tmp_path / "results/night/study.journal").write_text("{}\n")
    assert main(["--space", str(file), "--table", "--name", "night"]) == 2
    assert "results/night holds a search already; " in capsys.readouterr().err
    (tmp_path / "results/day").mkdir()
    (tmp_path / "results/day/tables.md").touch()
    assert main(["--space", str(file), "--name", "day"]) == 2
    assert capsys.readouterr().err == "error: results/day holds tables; choose another --name\n"


@pytest.mark.parametrize("space", WITH_TABLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_tables_of_our_spaces_hold_together(space: Path, has_gpu: bool) -> None:
    assert cells_of(read_tables(space, None, has_gpu))
