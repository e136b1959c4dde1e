"""Settings as vectors of numbers, for models of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.space import Space
from search.space.domain import Choice, Integer, Parameter, Real, part

Array = NDArray[np.float64]


def feature_rows(space: Space, settings: Sequence[Mapping[str, Any]]) -> Array:
    """Return the features of several settings, one row each."""
    return np.array([features(space, values) for values in settings])


def features(space: Space, values: Mapping[str, Any]) -> Array:
    """Return a setting as numbers of one scale: ranges from -1 to 1, a choice as one indicator for each value.

    An inactive parameter is zero throughout; one with conditions has an additional indicator of being active.
    """
    found: list[float] = []
    for parameter in space.parameters:
        found += _features(parameter, values)
    return np.array(found)


def _features(parameter: Parameter, values: Mapping[str, Any]) -> list[float]:
    domain, active = parameter.domain, parameter.name in values
    flag = [float(active)] if parameter.when else []
    if isinstance(domain, Choice):
        return flag + [float(active and domain.encode(values[parameter.name]) == item) for item in domain.grid()]
    assert isinstance(domain, (Real, Integer))
    if not active or domain.low == domain.high:
        return [*flag, 0.0]
    return [*flag, 2 * part(domain, values[parameter.name]) - 1]
