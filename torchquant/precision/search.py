"""Which scheme for which weight: the least error of the network's output under a budget, by an exact solver."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from numbers import Real
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant import flow
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate
from torchquant.errors import InputError, MissingDependencyError, SchemeError
from torchquant.fx.blocks import weight_grid, weight_of
from torchquant.fx.reading import is_prepared, observers
from torchquant.measure.metric import Metric, check_metric
from torchquant.precision.costs import noises
from torchquant.precision.measured import Bench
from torchquant.precision.plan import Plan, weighted_sites
from torchquant.types import check_whole

__all__ = ["Choice", "Search", "search"]

_MOST_POINTS = 1000
_FINE = 1e5  # the solver keeps limits to within 1e-6
Cost = Callable[["Choice"], float]
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


@dataclass(frozen=True)
class Search:
    """What each scheme costs at each weight, and the plans that follow from it.

    Args:
        quantizer: name of the Quantizer's class.
        scheme: of ops without a weight.
        choices: patterns of the ops that share a weight -> what they may get.
        shapes: pattern -> shape of its weight.
        weights: how many there are, each once.
        bench: makes and measures the graphs of plans; None: plans are estimates alone.
        fixed_ms: of a call, beside the ops with weights, where choices were timed.
    """

    quantizer: str
    scheme: str
    choices: Mapping[tuple[str, ...], tuple[Choice, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    weights: int
    bench: Bench | None = field(default=None, repr=False, compare=False)
    fixed_ms: float = math.nan

    @property
    def least_bytes(self) -> int:
        """Of the smallest plan."""
        return sum(min(c.size_bytes for c in choices) for choices in self.choices.values())

    @property
    def most_bytes(self) -> int:
        """Of the largest plan that may be worth it: every weight in its best scheme."""
        return sum(min(choices, key=lambda c: (c.noise, c.size_bytes)).size_bytes for choices in self.choices.values())

    def bytes_of(self, budget: str | float) -> int:
        """A budget in bytes: `"4.5bpw"` (bits a weight), `"3MB"`, `"500KiB"`, or a number of bytes.

        Raises:
            InputError: it is none of these, or less than the smallest plan.
        """
        size = _parsed(budget, self.weights)
        if size < self.least_bytes:
            least = 8 * self.least_bytes / max(self.weights, 1)
            raise InputError(
                f"a budget of {budget} is {size:,} bytes, and the smallest plan has {self.least_bytes:,} "
                f"({least:.2f} bpw): raise it, or offer schemes of fewer bits"
            )
        return size

    def plan(self, budget: str | float, *, metric: Metric | None = None, measure: bool = True) -> Plan:
        """The plan with the least estimated error that fits the budget, unless one scheme for all measures better.

        The first is found by integer programming (exact). It is held against each uniform plan that fits: all are
        made and measured, and the best one is returned; `about` says what was measured, and on what.

        Args:
            budget: `"4.5bpw"`, `"3MB"`, a number of bytes; or `"2ms"` for a call on the first batch, on one thread: ops
                are timed here, in each scheme, and one program for what the rest takes.
            metric: decides instead of the SQNR, see `optimize`.
            measure: if not, the estimate alone decides, and costs nothing.

        Raises:
            InputError: see `bytes_of`. MissingDependencyError: SciPy is not installed. SchemeError: milliseconds for a
                target whose ops cannot be timed.
        """
        if metric is not None:
            check_metric(metric)
        limit = _milliseconds(budget)
        search = self if limit is None else self._timed()
        cost, most = _size, float(self.bytes_of(budget)) if limit is None else 0.0
        if limit is not None:
            cost, most = _time, search._left_ms(limit)
        best = search._written(_solved(list(search.choices.values()), most, cost), budget)
        if measure and search.bench is not None:
            best = search._never_below_uniform(best, budget, metric, cost, most)
        return best

    def _never_below_uniform(self, plan: Plan, budget: Any, metric: Metric | None, cost: Cost, most: float) -> Plan:
        """The plan, or the uniform one that fits and that measures better."""
        assert self.bench is not None
        fitting = {s: picks for s in self._known() if sum(map(cost, picks := self._picks(s))) <= most}
        measured = {"": (self.bench.figure(plan, metric), plan)}
        for scheme, picks in fitting.items():
            uniform = self._written(picks, budget)
            measured[scheme] = self.bench.figure(uniform, metric), uniform
        name = max(measured, key=lambda key: (measured[key][0], key == ""))
        (score, db), best = measured[name]
        about = {
            **best.about,
            "measured_db": round(db, 2) if math.isfinite(db) else None,
            "measured_on": self.bench.measured_on,
            **({"metric": score} if metric is not None else {}),
        }
        if fitting:
            scheme = max(fitting, key=lambda s: measured[s][0])
            (other, other_db), _ = measured[scheme]
            about |= {"uniform": scheme, "uniform_db": round(other_db, 2) if math.isfinite(other_db) else None}
            about |= {"uniform_metric": other} if metric is not None else {}
        return replace(best, about=about | ({"kept": f"uniform {name}, which measures better"} if name else {}))

    def _timed(self) -> Search:
        """With the milliseconds of each choice."""
        if self.bench is None:
            raise InputError("this search has no graph to time: search again")
        schemes = {choice.scheme for choices in self.choices.values() for choice in choices}
        times = {s: self.bench.op_ms(None if s is None else self.uniform(s)) for s in schemes}
        choices = {
            names: tuple(replace(c, ms=sum(times[c.scheme].get(n, math.nan) for n in names)) for c in options)
            for names, options in self.choices.items()
        }
        lost = [names[0] for names, options in choices.items() if any(math.isnan(c.ms) for c in options)]
        if lost:
            raise SchemeError(f"{', '.join(lost[:5])} cannot be timed by themselves: give the budget in bytes or bpw")
        return replace(self, choices=choices, fixed_ms=self.bench.fixed_ms(self.uniform(self._known()[0])))

    def _left_ms(self, limit: float) -> float:
        """What a limit leaves to the weighted ops."""
        least = self.fixed_ms + sum(min(c.ms for c in choices) for choices in self.choices.values())
        if limit < least:
            raise InputError(
                f"a budget of {limit:g} ms is too little: the fastest plan is expected to take {least:.3g} ms here, "
                f"{self.fixed_ms:.3g} ms of them beside the ops with weights"
            )
        return limit - self.fixed_ms

    def curve(self, points: int = 8) -> list[Plan]:
        """Plans from the smallest to the largest budget that still helps, evenly spaced; the Pareto front."""
        check_whole(points, "points of a curve", 2, _MOST_POINTS)
        low, high = self.least_bytes, self.most_bytes
        sizes = sorted({round(low + (high - low) * i / (points - 1)) for i in range(points)})
        return [self.plan(size, measure=False) for size in sizes]

    def uniform(self, scheme: str) -> Plan:
        """All weights in one scheme; those that it does not take in the best of theirs.

        Raises:
            InputError: it is none of those that were searched.
        """
        known = self._known()
        if scheme not in known:
            raise InputError(f"scheme {scheme!r} was not searched; these were: {', '.join(sorted(known))}")
        return self._written(self._picks(scheme), scheme)

    def _known(self) -> list[str]:
        """The schemes that were searched, in their order."""
        found = dict.fromkeys(choice.scheme for choices in self.choices.values() for choice in choices)
        return [scheme for scheme in found if scheme is not None]

    def _picks(self, scheme: str) -> list[Choice]:
        return [
            next((c for c in choices if c.scheme == scheme), min(choices, key=lambda c: (c.noise, c.size_bytes)))
            for choices in self.choices.values()
        ]

    def _written(self, picks: Sequence[Choice], budget: str | float) -> Plan:
        schemes = {name: pick.scheme for names, pick in zip(self.choices, picks, strict=True) for name in names}
        size, noise = sum(pick.size_bytes for pick in picks), sum(pick.noise for pick in picks)
        about = {
            "budget": float(budget) if isinstance(budget, Real) and not isinstance(budget, int) else budget,
            "weight_bytes": size,
            "bits_per_weight": round(8 * size / max(self.weights, 1), 4),
            "expected_db": round(-10 * math.log10(noise), 2) if noise > 0 else None,
        }
        if not math.isnan(self.fixed_ms):
            about["expected_ms"] = round(sum(pick.ms for pick in picks) + self.fixed_ms, 4)
        return Plan(self.quantizer, self.scheme, schemes, self.shapes, about)


def search(
    exported: GraphModule,
    batches: Iterable[Any],
    quantizer: type[Quantizer],
    schemes: Sequence[str],
    *,
    validation: Iterable[Any] | None = None,
    allow_float: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Search:
    """Measure what each scheme costs at each weight: with one calibration and the same passes backward for all.

    Args:
        exported: the float graph, from `export` or `export_causal_lm`.
        batches: to calibrate on.
        validation: others, to measure on; `batches` if None.
        quantizer: class of a Quantizer of torchquant's, e.g. `X86Quantizer`.
        schemes: names of its schemes to choose from, e.g. `["w8", "w4_g64", "w3_g64"]`.
        allow_float: a weight may stay float too.
        options: further arguments of the class, e.g. `{"exclude": ["head"]}`.
        seed: of the random projections of the output.

    Raises:
        InputError: no scheme, or nothing of the model can be quantized in any of them.
        SchemeError: the Quantizer has no such scheme.
    """
    _check(exported, quantizer, schemes, options or {})
    check_whole(seed, "seed")
    kept, schemes = data.listed(batches, "batches"), list(dict.fromkeys(schemes))
    judged = kept if validation is None else data.listed(validation, "validation")
    costs: dict[str, dict[str, Choice]] = {}
    shared: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    prepared = {scheme: flow.prepare(exported, quantizer(scheme, **(options or {}))) for scheme in schemes}
    watched = {scheme: graph for scheme, graph in prepared.items() if next(observers(graph), None) is not None}
    if watched:
        calibrate(list(watched.values()), kept, progress=False)
    measured = noises(watched, judged, seed) if watched else {}
    for scheme, graph in prepared.items():
        _add(graph, measured.get(scheme, {}), scheme, costs, shared, shapes, sizes)
    if not costs:
        raise InputError(f"{quantizer.__name__} quantizes no weight of this model in {', '.join(schemes)}")
    choices: dict[tuple[str, ...], tuple[Choice, ...]] = {}
    weights = 0
    for weight in dict.fromkeys(shared.values()):
        names = tuple(name for name in costs if shared[name] == weight)
        if names:
            numel = math.prod(shapes[names[0]])
            weights += numel
            choices[names] = _together([costs[name] for name in names], numel * sizes[names[0]], allow_float)
    bench = Bench(exported, kept, judged, quantizer, options or {})
    return Search(quantizer.__name__, schemes[0], choices, shapes, weights, bench)


def _takes_schemes(quantizer: type) -> bool:
    """Whether a Quantizer's class is told a scheme for each op, as those of torchquant are."""
    parameters = inspect.signature(quantizer).parameters.values()
    return any(p.name == "overrides" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check(exported: Any, quantizer: Any, schemes: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of `search` that make no sense."""
    if isinstance(schemes, str) or not schemes or not all(isinstance(s, str) for s in schemes):
        raise InputError(f'schemes is a list of names, such as ["w8", "w4_g64"], not {schemes!r}')
    if not (isinstance(quantizer, type) and issubclass(quantizer, Quantizer) and _takes_schemes(quantizer)):
        raise InputError(f"quantizer is a class of torchquant.quantizers, e.g. X86Quantizer, not {quantizer!r:.80}")
    if not isinstance(exported, GraphModule) or is_prepared(exported):
        raise InputError("search takes the float graph, from torchquant.export; it prepares it itself")
    fixed = sorted({"scheme", "overrides"} & set(options))
    if fixed:
        raise InputError(f"options cannot hold {' and '.join(fixed)}: that is what is searched")


def _add(
    prepared: GraphModule,
    measured: Mapping[str, float],
    scheme: str,
    costs: dict[str, dict[str, Choice]],
    shared: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
) -> None:
    """Add what one scheme costs at each op that it quantizes, and which weight, of which shape and bytes, it reads."""
    for name, (node, shape, source) in weighted_sites(prepared).items():
        weight = weight_of(prepared, node)
        shapes[name], sizes[name] = shape, source.meta["val"].element_size()
        if weight is None or node.name not in measured:
            continue
        costs.setdefault(name, {})[scheme] = Choice(scheme, _bytes(prepared, node, shape), measured[node.name])
        shared[name] = str(source.target if source.op == "get_attr" else source)


def _bytes(prepared: GraphModule, node: Any, shape: tuple[int, ...]) -> int:
    """Codes of as many bits as they need, a scale (16 bits for groups, else 32) and a zero point for each cell."""
    grid = weight_grid(prepared, node)
    bits = (grid.quant_max - grid.quant_min).bit_length()
    cells = grid.scale.numel()
    scale = 2 if grid.dialect == "block" else 4
    return math.ceil(math.prod(shape) * bits / 8) + cells * (scale + (0 if grid.symmetric else 1))


def _together(costs: Sequence[Mapping[str, Choice]], float_bytes: int, allow_float: bool) -> tuple[Choice, ...]:
    """What several ops that read one weight may all get: they share its codes, and their errors add up."""
    common = [scheme for scheme in costs[0] if all(scheme in cost for cost in costs)]
    picks = [Choice(s, costs[0][s].size_bytes, sum(cost[s].noise for cost in costs)) for s in common]
    if allow_float or not picks:
        picks.append(Choice(None, float_bytes, 0.0))
    return tuple(picks)


def _parsed(budget: str | float, weights: int) -> int:
    if isinstance(budget, Real) and not isinstance(budget, bool) and math.isfinite(budget) and budget > 0:
        return int(budget)
    read = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", budget) if isinstance(budget, str) else None
    unit = "" if read is None else read[2].lower() or "b"
    if read is None or unit not in (*_UNITS, "bpw"):
        raise InputError(f'budget {budget!r} is no size: write "4.5bpw", "3MB", "500KiB", "2ms", or a number of bytes')
    return int(float(read[1]) * (weights / 8 if unit == "bpw" else _UNITS[unit]))


def _size(choice: Choice) -> float:
    return float(choice.size_bytes)


def _time(choice: Choice) -> float:
    return choice.ms


def _milliseconds(budget: str | float) -> float | None:
    """A budget of time; None if it is one of bytes."""
    read = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*ms\s*", budget.lower()) if isinstance(budget, str) else None
    return None if read is None else float(read[1])


def _solved(choices: Sequence[Sequence[Choice]], most: float, cost: Cost) -> list[Choice]:
    """One choice each, with the least noise in all, of at most so many bytes or milliseconds.

    Where the solver went beyond the limit, within its tolerance, it gets one that is lower by as much.
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
