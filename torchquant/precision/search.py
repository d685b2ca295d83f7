"""Which scheme for which weight: the least error of the network's output under a budget, by an exact solver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant import flow
from torchquant.calibration import batches as data
from torchquant.calibration.calibrate import calibrate
from torchquant.errors import InputError, SchemeError
from torchquant.fx.reading import observers
from torchquant.measure.metric import Metric, check_drop, check_metric
from torchquant.precision.choices import add_choices, check_search, together
from torchquant.precision.costs import noises
from torchquant.precision.measured import Bench
from torchquant.precision.plan import Plan
from torchquant.precision.solver import Choice, Cost, parsed_bytes, parsed_ms, size_of, solved, time_of
from torchquant.types import check_whole

__all__ = ["Choice", "Search", "search"]

_MOST_POINTS = 1000


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
        size = parsed_bytes(budget, self.weights)
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
        limit = parsed_ms(budget)
        search = self if limit is None else self._timed()
        cost, most = size_of, float(self.bytes_of(budget)) if limit is None else 0.0
        if limit is not None:
            cost, most = time_of, search._left_ms(limit)
        best = search._written(solved(list(search.choices.values()), most, cost), budget)
        if measure and search.bench is not None:
            best = search._never_below_uniform(best, budget, metric, cost, most)
        return best

    def within(self, metric: Metric, max_drop: float, *, max_evaluations: int = 12) -> Plan:
        """The smallest plan found with which a metric loses at most `max_drop`: higher bits only where they are needed.

        Budgets between the smallest and the largest plan are bisected; each is spent at the least estimated error, and
        the metric decides. `about` says what it was for the float model and for the plan, and how often it was asked.

        Args:
            metric: `metric(model)`, a number, higher is better, on data that nothing else has seen.
            max_drop: how much less than the float model's, in the metric's own unit.
            max_evaluations: how often the metric may be asked, three times at least.

        Raises:
            InputError: even the largest plan loses more; or the metric raises or is not finite for the float model.
        """
        check_drop(max_drop)
        check_whole(max_evaluations, "max_evaluations", 3, _MOST_POINTS)
        if self.bench is None:
            raise InputError("this search has no graph to measure: search again")
        exact = self.bench.float_score(metric)
        best, score = self._measured(self.most_bytes, metric)
        if score < exact - max_drop:
            raise InputError(
                f"the metric is {exact:.6g} for the float model and {score:.6g} with the largest plan: more than "
                f"{max_drop:g} is lost. Offer schemes of more bits, or allow_float=True"
            )
        asked, size, low = 2, self.least_bytes, self.least_bytes - 1
        while asked < max_evaluations and low < size < best.about["weight_bytes"]:
            plan, score = self._measured(size, metric)
            asked += 1
            best, low = (plan, low) if score >= exact - max_drop else (best, size)
            size = (low + int(best.about["weight_bytes"])) // 2
        about = {"budget": f"a metric at most {max_drop:g} lower", "float_metric": exact, "evaluations": asked}
        return replace(best, about={**best.about, **about})

    def _measured(self, size: int, metric: Metric) -> tuple[Plan, float]:
        """The plan of so many bytes, and what the metric says of it."""
        assert self.bench is not None
        plan = self.plan(size, measure=False)
        score, db = self.bench.figure(plan, metric)
        about = {"metric": score, "measured_db": _rounded(db), "measured_on": self.bench.measured_on}
        return replace(plan, about={**plan.about, **about}), score

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
            "measured_db": _rounded(db),
            "measured_on": self.bench.measured_on,
            **({"metric": score} if metric is not None else {}),
        }
        if fitting:
            scheme = max(fitting, key=lambda s: measured[s][0])
            (other, other_db), _ = measured[scheme]
            about |= {"uniform": scheme, "uniform_db": _rounded(other_db)}
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
    check_search(exported, quantizer, schemes, options or {})
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
        add_choices(graph, measured.get(scheme, {}), scheme, costs, shared, shapes, sizes)
    if not costs:
        raise InputError(f"{quantizer.__name__} quantizes no weight of this model in {', '.join(schemes)}")
    choices: dict[tuple[str, ...], tuple[Choice, ...]] = {}
    weights = 0
    for weight in dict.fromkeys(shared.values()):
        names = tuple(name for name in costs if shared[name] == weight)
        if names:
            numel = math.prod(shapes[names[0]])
            weights += numel
            choices[names] = together([costs[name] for name in names], numel * sizes[names[0]], allow_float)
    bench = Bench(exported, kept, judged, quantizer, options or {})
    return Search(quantizer.__name__, schemes[0], choices, shapes, weights, bench)


def _rounded(db: float) -> float | None:
    return round(db, 2) if math.isfinite(db) else None
