"""The space of a synthetic function: what a sampler needs of a space file, without a trainable behind it."""

from __future__ import annotations

from collections.abc import Sequence

from search.space import Space
from search.space.domain import Parameter
from search.space.sections import Objective, Resources, Scheduler, Search, section


def space_of(parameters: Sequence[Parameter], epochs: int, search: Search, scheduler: Scheduler) -> Space:
    """Return a space whose trials minimise `loss`."""
    return Space(
        name="function",
        trainable="function:train",
        objectives=(Objective(metric="loss", mode="min"),),
        constraints={},
        tree={"epochs": epochs},
        parameters=tuple(parameters),
        try_first=(),
        search=search,
        scheduler=scheduler,
        resources=section(Resources, {}, "resources"),
        left_out=(),
        profile=None,
        paths=(),
    )
