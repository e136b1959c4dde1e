"""What the course of a trial's metrics says of it."""

from __future__ import annotations

import pytest

from search.records.health import compared, remarks
from search.space.sections import Objective

DBA = Objective(metric="dba", mode="max")
ERROR = Objective(metric="error", mode="min")


def course(metric: str, values: list[float], chance: float) -> list[dict[str, float | None]]:
    return [{metric: value, f"{metric}_chance": chance, "loss": 4.0 - i} for i, value in enumerate(values)]


def test_a_score_that_stays_at_chance_while_the_loss_falls_is_said_to() -> None:
    (said,) = remarks(course("dba", [0.17, 0.19, 0.168], 0.168), DBA)
    assert said == "dba stayed at chance, 0.19 at best where guessing gives 0.168, while the loss fell from 4 to 2"
    (said,) = remarks(course("error", [0.98, 0.95, 1.2], 1.0), ERROR)
    assert said.startswith("error stayed at chance, 0.95 at best where guessing gives 1, while")
    (said,) = remarks([{"dba": 0.17, "dba_chance": 0.168, "loss": 4.0}] * 3, DBA)
    assert said == "dba stayed at chance, 0.17 at best where guessing gives 0.168"


@pytest.mark.parametrize(
    "epochs",
    [
        course("dba", [0.17, 0.3, 0.16], 0.168),  # it was better once
        course("dba", [0.17, 0.17], 0.168),  # too early to say
        course("dba", [0.91, 0.93, 0.92], 0.9),  # a third of what was left to gain
        [{"dba": 0.1, "loss": 1.0}] * 5,  # nobody knows what chance is
        [{"dba": None, "dba_chance": 0.1}] * 5,
    ],
)
def test_nothing_is_said_without_a_reason(epochs: list[dict[str, float | None]]) -> None:
    assert remarks(epochs, DBA) == []


def test_a_loss_term_at_its_chance_level_is_named() -> None:
    epochs = [{"dba": 0.5, "loss_contrast": value, "loss_contrast_chance": 1.0986} for value in (8.8, 1.3, 1.1)]
    assert remarks(epochs, DBA) == ["loss_contrast is at its chance level of 1.099"]
    assert remarks([{**row, "loss_contrast": 0.9} for row in epochs], DBA) == []


def test_what_is_no_better_than_guessing_is_compared_as_guessing() -> None:
    assert compared({"dba": 0.115, "dba_chance": 0.2}, DBA) == 0.2  # learning begins below chance
    assert compared({"dba": 0.21, "dba_chance": 0.2}, DBA) == 0.2
    assert compared({"dba": 0.4, "dba_chance": 0.2}, DBA) == 0.4
    assert compared({"dba": 0.93, "dba_chance": 0.9}, DBA) == 0.93  # nothing is a fifth better than nine in ten
    assert compared({"dba": 0.91, "dba_chance": 0.9}, DBA) == 0.9
    assert compared({"dba": 93.0, "dba_chance": 90.0}, DBA) == 93.0  # per cent
    assert compared({"dba": 500.0, "dba_chance": 400.0}, DBA) == 500.0
    assert compared({"dba": 450.0, "dba_chance": 400.0}, DBA) == 400.0
    assert compared({"error": 1.3, "error_chance": 1.0}, ERROR) == 1.0
    assert compared({"error": 0.5, "error_chance": 1.0}, ERROR) == 0.5
    assert compared({"dba": -2.1, "dba_chance": -2.0}, DBA) == -2.0  # a likelihood's, perhaps
    assert compared({"dba": -1.5, "dba_chance": -2.0}, DBA) == -1.5
    assert compared({"dba": 0.1}, DBA) == 0.1  # nobody knows what chance is
    assert compared({"dba": None, "dba_chance": 0.2}, DBA) is None
