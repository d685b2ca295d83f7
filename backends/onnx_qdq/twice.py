"""What the targets share that are reached by way of ONNX: each model is run twice, and what stays float is told."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule

from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.lowering.accounts import names
from torchquant.lowering.proof import Verdict
from torchquant.lowering.skeleton import Artefact, Hold, Lowering, P, Run
from torchquant.types import Site

__all__ = ["Kernels", "RunTwice"]


@dataclass(frozen=True)
class Kernels:
    """What a runtime runs of a model.

    Args:
        counts: name of an integer kernel -> how many.
        integer: names of the sites whose products are in them.
        why: name of each other site -> why it runs in float.
    """

    counts: Mapping[str, int]
    integer: frozenset[str]
    why: Mapping[str, str]


class RunTwice(Lowering[P]):
    """With the runtime's integer kernels, and without them, which proves the translation by itself.

    Attributes:
        runtime: what the kernels are of, in words.
        plainly: how each operator is computed without them, in words.
        kernels: what the artefact runs.
    """

    op_error = 1e-6  # of the runtimes' exp, erf and tanh
    runtime: ClassVar[str]
    plainly: ClassVar[str]
    kernels: Kernels
    _is_plain = False

    @abstractmethod
    def plain(self) -> Run:
        """The artefact without integer kernels."""

    @abstractmethod
    def written_and_run(self, graph: GraphModule, *, plain: bool) -> Run:
        """Another graph, written and run with or without integer kernels."""

    def counted(self, run: Run, kernels: Kernels, graph: GraphModule) -> Artefact:
        """The artefact, with a warning of what has codes, yet is computed in float."""
        self.kernels = kernels
        sites = [s for s in self.compute if s.node in kernels.why]
        if sites:
            reasons = "; ".join(sorted({kernels.why[s.node] for s in sites}))
            quantizer = self.target.quantizer_class().__name__
            warnings.warn(
                f"{self.target}: {len(sites)} ops have codes in the file, yet {self.runtime} computes them in float: "
                f"{names(sites)}. {reasons}. {quantizer} annotates what it runs in integers.",
                TorchquantWarning,
                stacklevel=7,
            )
        return Artefact(run, kernels.counts, len(kernels.integer), graph)

    def account(self) -> tuple[Site, ...]:
        why = self.kernels.why
        return tuple(replace(s, status="unsupported", reason=why[s.node]) if s.node in why else s for s in self.sites)

    def build_again(self, graph: GraphModule) -> Run:
        return self.written_and_run(graph, plain=self._is_plain)

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """Without integer kernels, then with them: what fails in the second alone is the runtime's or the CPU's."""
        self._is_plain = True
        translation = hold(artefact.graph, self.plain(), build=self.build_again)
        self._is_plain = False
        level = f"{translation.comparison.sqnr_db:.1f} dB with each operator {self.plainly}"
        try:
            verdict = hold(artefact.graph, artefact.run, build=self.build_again)
        except LoweringError as error:
            advice = self.target.here()[1] or "report it, or exclude the ops that are named"
            raise LoweringError(
                f"{error}\nThe translation is right ({level}): {self.runtime}'s kernels are off; {advice}."
            ) from error
        return replace(verdict, reason="; ".join(filter(None, (verdict.reason, level))))
