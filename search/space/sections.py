"""The sections of a space file besides its config tree, validated by Pydantic."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from search.space.decode import did_you_mean
from search.text import exactly
from search.yaml_file import dump_line
from trainables.contract import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Objective(_Section):
    """What is optimised: a metric of the reports, and whether more or less of it is better."""

    metric: str = Field(min_length=1)
    mode: Literal["min", "max"]


OWN_CONSTRAINTS = ("diverged", "out_of_memory")  # constraints of every search, besides the space's


class Limit(_Section):
    """Bounds that a metric of the last report must meet for a trial to count as a solution."""

    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _can_be_kept(self) -> Limit:
        if self.min is None and self.max is None:
            raise ValueError("name a `min`, a `max` or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the range is reversed; write {dump_line({'min': self.max, 'max': self.min})}")
        return self

    def __str__(self) -> str:
        return ", ".join(f"{name} {exactly(bound)}" for name, bound in self.model_dump(exclude_none=True).items())

    def excess(self, value: float) -> float:
        """Return how far `value` lies outside the bounds, a finite number; at most 0 if it meets them."""
        beyond = max(
            *([self.min - value] if self.min is not None else []),
            *([value - self.max] if self.max is not None else []),
            -sys.float_info.max,
        )
        return min(beyond, sys.float_info.max)


class Search(_Section):
    """How settings are proposed, and when the search ends."""

    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "qmc", "random", "grid"] = "tpe"
    trials: int = Field(20, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    time_budget: str | None = None  # such as 90s, 30m, 4h; trials still running then are stopped
    # tpe, gp, nsga2, random: reject proposals that will probably diverge or run out of memory
    survival: bool = True
    retries: int = Field(1, ge=0)  # of a trial that failed through a bug or a machine fault
    report_timeout: str | None = None  # such as 30m: a trial without a report for that long counts as hung

    @field_validator("time_budget", "report_timeout", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        if value is not None:
            seconds(str(value))
        return value

    @property
    def time_budget_s(self) -> float | None:
        return None if self.time_budget is None else seconds(self.time_budget)

    @property
    def report_timeout_s(self) -> float | None:
        return None if self.report_timeout is None else seconds(self.report_timeout)


class Scheduler(_Section):
    """Which trials are stopped early."""

    name: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    grace_epochs: int = Field(1, ge=1)  # no trial is stopped earlier; pbt: epochs between two exchanges
    reduction: int = Field(3, ge=2)  # one trial in this many goes on at each rung

    def rungs(self, longest: int) -> list[int]:
        """Return the epochs after which trials of `longest` epochs are compared, up to the last one."""
        found = [min(self.grace_epochs, longest)]
        while found[-1] < longest:
            found.append(min(found[-1] * self.reduction, longest))
        return found


class Resources(_Section):
    """What the worker group of one slot requires."""

    workers: int = Field(1, ge=1)
    # None: 1 if there are GPUs, else 0. auto: as many slots share a GPU as its memory has room for. A number below 1
    # shares a GPU unchecked: memory is neither measured nor divided.
    gpus_per_worker: float | Literal["auto"] | None = None
    cpus_per_worker: int = Field(1, ge=1)
    # In MiB, of a rank's training step; None: all that its GPU has. With `auto`, the limit of a GPU, for all slots on
    # it together; without GPUs, each machine is then given a simulated one of this size.
    memory_limit_mb: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not (value is None or value == "auto" or is_number):
            raise ValueError("write a number from 0 upwards, or auto")
        return value


class Ran(_Section):
    """What the space.yaml of a results folder says of its run, as far as the space needs it again."""

    model_config = ConfigDict(extra="ignore")

    space: str | None = None
    profile: str | None = None
    paths: list[str] = []
    data: str | None = None


class Table(_Section):
    """A table of searches; search/tables.py describes the format."""

    title: str
    rows: dict[str, dict[str, Any]] = Field(min_length=1)
    columns: dict[str, dict[str, Any]] = Field({"": {}}, min_length=1)
    metrics: dict[str, str] = Field(min_length=1)
    reference: dict[str, dict[str, dict[str, float]]] = {}
    source: str = ""  # where the reference values come from


def check_names(node: Iterable[Any], where: str) -> None:
    """Raise UserError for a name that YAML reads as something else, such as 2024."""
    for name in node:
        if not isinstance(name, str):
            raise UserError(f"{where}.{name}: YAML reads this name as {name!r}; write it in quotes")


def tables_in(node: Any) -> dict[str, Table]:
    """Return the tables of a space file, by name; raises UserError for a mistake in any of them."""
    if not isinstance(node or {}, dict):
        raise UserError(f"tables: expected a mapping of names, got {node!r}")
    check_names(node or {}, "tables")
    tables = {name: section(Table, table, f"tables.{name}") for name, table in (node or {}).items()}
    for name, table in tables.items():
        _check_reference(name, table)
    return tables


def _check_reference(name: str, table: Table) -> None:
    for row, columns in table.reference.items():
        if row not in table.rows:
            raise UserError(f"tables.{name}.reference.{row}: no such row; {did_you_mean(row, table.rows)}")
        for column, values in columns.items():
            if column not in table.columns:
                where = f"tables.{name}.reference.{row}.{column}"
                raise UserError(f"{where}: no such column; {did_you_mean(column, table.columns)}")
            for heading in values:
                if heading not in table.metrics:
                    where = f"tables.{name}.reference.{row}.{column}.{heading}"
                    raise UserError(f"{where}: no such heading; {did_you_mean(heading, table.metrics)}")


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Convert a duration such as 90s, 30m or 1.5h to seconds; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration; write a number and s, m, h or d, such as 30m")
    return float(match[1]) * _UNITS[match[2]]


_Model = TypeVar("_Model", bound=_Section)


def section(model: type[_Model], value: Any, path: str) -> _Model:
    """Validate `value` as a section; raises UserError with the dotted path of what is wrong."""
    try:
        return model.model_validate({} if value is None else value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([path, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(str(first["loc"][-1]), model.model_fields)
            raise UserError(f"{where}: no such key; {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: a value is needed") from None
        if first["type"] in ("model_type", "model_attributes_type"):
            keys = ", ".join(model.model_fields)
            raise UserError(f"{where}: expected a mapping with the keys {keys}, got {first['input']!r}") from None
        if first["type"] == "literal_error" and isinstance(first["input"], str):
            known = str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
            raise UserError(f"{where}: {first['input']!r} is unknown; {did_you_mean(first['input'], known)}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {first['input']!r} is refused: {message[:1].lower()}{message[1:]}") from None
