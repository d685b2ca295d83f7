"""The least error under a limit, by integer programming; and how budgets are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import Any

from torchquant.errors import InputError, MissingDependencyError

__all__ = ["Choice", "Cost", "parsed_bytes", "parsed_ms", "size_of", "solved", "time_of"]

_FINE = 1e5  # the solver keeps limits to within 1e-6
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Choice:
    """One scheme for the ops that share one weight.

    Args:
        scheme: its name, None for float.
        size_bytes: of the codes, scales and zero points.
        noise: what it adds to the output's error, as a share of the output's energy; estimated by second order.
        ms: what it takes in a call, where that was measured.
    """

    scheme: str | None
    size_bytes: int
    noise: float
    ms: float = math.nan


Cost = Callable[[Choice], float]


def parsed_bytes(budget: str | float, weights: int) -> int:
    """A budget in bytes: `"4.5bpw"` of so many weights, `"3MB"`, `"500KiB"`, or a number.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(budget, Real) and not isinstance(budget, bool) and math.isfinite(budget) and budget > 0:
        return int(budget)
    read = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", budget) if isinstance(budget, str) else None
    unit = "" if read is None else read[2].lower() or "b"
    if read is None or unit not in (*_UNITS, "bpw"):
        raise InputError(f'budget {budget!r} is no size: write "4.5bpw", "3MB", "500KiB", "2ms", or a number of bytes')
    return int(float(read[1]) * (weights / 8 if unit == "bpw" else _UNITS[unit]))


def size_of(choice: Choice) -> float:
    """Its bytes."""
    return float(choice.size_bytes)


def time_of(choice: Choice) -> float:
    """Its milliseconds."""
    return choice.ms


def parsed_ms(budget: str | float) -> float | None:
    """A budget of time; None if it is one of bytes."""
    read = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*ms\s*", budget.lower()) if isinstance(budget, str) else None
    return None if read is None else float(read[1])


def solved(choices: Sequence[Sequence[Choice]], most: float, cost: Cost) -> list[Choice]:
    """One choice each, with the least noise in all, of at most so many bytes or milliseconds.

    Where the solver went beyond the limit, within its tolerance, it gets one that is lower by as much.

    Raises:
        InputError: nothing fits. MissingDependencyError: SciPy is not installed.
    """
    limit, smallest = most, [min(options, key=cost) for options in choices]
    while (taken := sum(map(cost, picks := _nearly_solved(choices, limit, cost) or smallest))) > most:
        if picks is smallest:
            raise InputError(f"no plan fits into {most:,.6g}: the smallest takes {taken:,.6g}")
        limit -= max(taken - most, 1e-9 * most)
    return picks


def _nearly_solved(choices: Sequence[Sequence[Choice]], most: float, cost: Cost) -> list[Choice] | None:
    """What the solver finds; None where it finds nothing."""
    try:
        optimize: Any = import_module("scipy.optimize")
        numpy: Any = import_module("numpy")
    except ImportError as error:
        raise MissingDependencyError("a plan is found by SciPy: pip install 'torchquant[search]'") from error
    flat = [(i, choice) for i, options in enumerate(choices) for choice in options]
    noise = numpy.array([choice.noise for _, choice in flat])
    sizes = numpy.array([cost(choice) for _, choice in flat])
    one_each = numpy.zeros((len(choices), len(flat)))
    one_each[[i for i, _ in flat], range(len(flat))] = 1
    scale = max(float(noise.max()), 1e-30)
    answer = optimize.milp(
        noise / scale + 1e-12 * sizes / max(float(sizes.max()), 1e-30),  # of equal ones the smaller
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(_FINE * sizes[None, :] / max(most, 1e-9), -numpy.inf, _FINE * (1 + 1e-12)),
        ],
        integrality=numpy.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if answer.x is None:
        return None
    return [flat[k][1] for k in sorted(numpy.flatnonzero(answer.x > 0.5).tolist(), key=lambda k: flat[k][0])]
