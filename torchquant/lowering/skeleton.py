"""The way from a converted graph to a proven artefact, the same for every target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.fx import GraphModule

from torchquant.artifacts.program import Metadata, Program, Proof
from torchquant.calibration import batches as data
from torchquant.errors import LoweringError
from torchquant.fx import passes
from torchquant.fx.flat import Flat, flat
from torchquant.fx.sites import mark_sites, site_edges
from torchquant.fx.storing import is_packed, unpack_weights
from torchquant.fx.subclasses import has_parts, split_parts
from torchquant.fx.work import work
from torchquant.lowering.accounts import accountable_sites, left_float
from torchquant.lowering.judging import Run
from torchquant.lowering.proof import Verdict, cases_of, hold_against
from torchquant.lowering.stages import stages
from torchquant.lowering.target import Target
from torchquant.surroundings import unchanged
from torchquant.types import Site

__all__ = ["Artefact", "Cases", "Hold", "Lowering", "Run", "Stage", "lower"]

Cases = Sequence[tuple[torch.Tensor, ...]]
Hold = Callable[..., Verdict]  # hold(graph, run, build=...): `hold_against` with all else given
Stage = Callable[[str], None]
P = TypeVar("P", bound=Program)


@dataclass(frozen=True)
class Artefact:
    """What a target has built.

    Args:
        run: takes the tensors of a case, returns those of the graph's outputs.
        kernels: name of a matrix kernel or delegate -> how many the artefact has.
        fused: compute ops that it runs quantized.
        graph: what it is held against: the graph it was built from, or another one in its place.
        left_float: what runs in float beyond what the sites say, `{"3 softmax": "why"}`.
        inside: names of sites that are computed in float inside of its quantized kernels, between their codes.
    """

    run: Run
    kernels: Mapping[str, int]
    fused: int
    graph: GraphModule
    left_float: Mapping[str, str] = field(default_factory=dict)
    inside: Collection[str] = ()


class Lowering(ABC, Generic[P]):
    """The steps of a lowering that are the target's own, called once each, in this order. One object is one lowering.

    Attributes:
        target: what is lowered to.
        op_error: relative accuracy of the target's float arithmetic.
        plans_sizes: the artefact is made for the largest sizes, so it is proven at those too.
        device: where the artefact runs.
        sites, allowed: of the graph, once it is accounted for; `allowed` are names of nodes that may run in float.
        wanted: the sites that are to run quantized.
    """

    target: ClassVar[Target]
    op_error: float = torch.finfo(torch.float32).eps
    plans_sizes: ClassVar[bool] = False
    device: torch.device = torch.device("cpu")
    sites: tuple[Site, ...] = ()
    allowed: frozenset[str] = frozenset()
    wanted: tuple[Site, ...] = ()

    @property
    def compute(self) -> tuple[Site, ...]:
        """The wanted sites that multiply matrices."""
        return tuple(s for s in self.wanted if s.compute)

    def require(self, quantized: GraphModule) -> None:
        """Raise for what is missing here, before anything is read."""

    @abstractmethod
    def refuse(self, quantized: GraphModule) -> None:
        """Raise LoweringError for what the target would drop, change in silence, or fail on without saying where."""

    def reference(self, quantized: GraphModule) -> Flat:
        """What is built and held: the graph as a pure function of tensors, its nodes marked, `allowed` ones float."""
        floats = passes.copy_graph(quantized)
        passes.make_float(floats, set(self.allowed))
        self.adapt(floats)
        mark_sites(floats)
        return flat(floats)

    def adapt(self, graph: GraphModule) -> None:
        """Write in the graph what the target computes instead of it, whatever it says."""

    @abstractmethod
    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        """Build the artefact, count its kernels against `compute`, and raise LoweringError if any is missing.

        Args:
            cases: tensors to build with (the first) and to run on.
            stage: called with what is being done, for people to see.
        """

    @abstractmethod
    def build_again(self, graph: GraphModule) -> Run:
        """An artefact of the same graph with further outputs, for the proof in depth."""

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """Hold the artefact against its graph."""
        return hold(artefact.graph, artefact.run, build=self.build_again)

    def account(self) -> tuple[Site, ...]:
        """The sites as they turned out in the artefact."""
        return self.sites

    @abstractmethod
    def finish(self, about: Metadata) -> P:
        """The program."""


@unchanged()
def lower(
    steps: Lowering[P],
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    progress: bool = True,
) -> P:
    """Check, refuse, build, count, run, hold and account, in this order, with the target's own `steps`.

    The caller's graph is not changed.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove the artefact with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.lowering.proof.hold_against` says.
        progress: show on stderr what is being done.

    Raises:
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: what a step raises, or the artefact does not hold.
    """
    name = steps.target.name
    steps.require(quantized)
    quantized = _plain(quantized)
    steps.sites, allowed = accountable_sites(quantized, allow_float, steps.target.capabilities)
    steps.allowed = frozenset(allowed)
    steps.wanted = tuple(s for s in steps.sites if s.status == "quantized" and s.node not in allowed)
    _refuse_formats(steps)
    steps.refuse(quantized)
    reference = steps.reference(quantized)
    batch = data.example_of(quantized) if example_inputs is None else example_inputs
    cases = cases_of(reference, batch, largest=steps.plans_sizes)
    cases = [tuple(t.to(steps.device) for t in case) for case in cases]
    with stages(f"lowering for {name}", progress) as stage:
        artefact = steps.build(reference, cases, stage)
        sites = steps.account()
        stage("running and proving it")
        hold = partial(hold_against, batches=cases, min_sqnr_db=min_sqnr_db, op_error=steps.op_error, target=name)
        verdict = steps.hold(hold, artefact)
    left = {**left_float(sites, allowed, artefact.inside), **artefact.left_float}
    proof = Proof.of(verdict, artefact.kernels, len(steps.compute), artefact.fused, left)
    states, returns = reference.initial, reference.overwritten
    facts = facts_about(quantized, sites)
    return steps.finish(Metadata(reference.signature, sites, proof, states=states, returns=returns, facts=facts))


def facts_about(quantized: GraphModule, sites: Sequence[Site]) -> dict[str, Any]:
    """What a program keeps of its graph, so that its report can be made again."""
    return {
        "edges": [list(edge) for edge in site_edges(quantized, sites)],
        "weight_bytes": passes.weight_bytes(quantized),
        "work": [asdict(row) for row in work(quantized)],
    }


def _plain(quantized: GraphModule) -> GraphModule:
    """The graph, or a copy of it that reads its weights as constants, in which nothing is packed."""
    if not isinstance(quantized, GraphModule):
        return quantized
    if not has_parts(quantized) and not any(map(is_packed, quantized.graph.nodes)):
        return quantized
    twin = passes.copy_graph(quantized)
    split_parts(twin)
    unpack_weights(twin)
    return twin


def _refuse_formats(steps: Lowering[Any]) -> None:
    """Raise LoweringError for weights in a format of their own that the target runs in none of its schemes."""
    formats = {s.weight.format.name for s in steps.target.schemes.values() if s.weight is not None}
    for site in steps.compute:
        if site.weight is not None and site.weight.format and site.weight.format not in formats:
            raise LoweringError(
                f"{site.op} {site.node} ({site.module or 'root'}) has a weight in {site.weight.format}, and "
                f"{steps.target} has no kernel for that. Exclude the op, or pass allow_float=['node:{site.node}'] to "
                "have it decoded."
            )
