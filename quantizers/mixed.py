"""A Quantizer that follows a plan: each weight in its own scheme."""

from __future__ import annotations

import os
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant.errors import InputError
from torchquant.precision.plan import Plan
from torchquant.quantizers.engine import CapabilityQuantizer

__all__ = ["MixedPrecisionQuantizer"]


class MixedPrecisionQuantizer(Quantizer):
    """Another Quantizer of torchquant's, with the scheme of each weight from a plan.

    Args:
        quantizer: its class, e.g. `X86Quantizer`.
        plan: what `search(...).plan(budget)` gave, or a file that `Plan.save` wrote.
        options: further arguments of the class, but for scheme and overrides.

    Raises:
        InputError: the plan is for another Quantizer, or (raised by `prepare_pt2e`) does not fit the model.
        SchemeError: a scheme that the Quantizer does not know.
    """

    def __init__(
        self, quantizer: type[CapabilityQuantizer], plan: Plan | str | os.PathLike[str], **options: Any
    ) -> None:
        super().__init__()
        if not (isinstance(quantizer, type) and issubclass(quantizer, CapabilityQuantizer)):
            raise InputError(f"quantizer is a class of torchquant.quantizers, e.g. X86Quantizer, not {quantizer!r:.80}")
        if not isinstance(plan, (Plan, str, os.PathLike)):
            raise InputError(f"plan is a Plan or the path of its file, not {plan!r:.80}")
        fixed = sorted({"scheme", "overrides"} & set(options))
        if fixed:
            raise InputError(f"the plan says {' and '.join(fixed)}; leave them out, or edit the plan")
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        if self.plan.quantizer != quantizer.__name__:
            raise InputError(f"the plan was made for {self.plan.quantizer}, not for {quantizer.__name__}")
        self._inner = quantizer(self.plan.scheme, overrides=self.plan.schemes, **options)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """As the other Quantizer does."""
        return self._inner.transform_for_annotation(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Refuse a model that the plan does not fit; annotate as the other Quantizer does, with the plan's schemes."""
        self.plan.check(model)
        return self._inner.annotate(model)

    def validate(self, model: GraphModule) -> None:
        """As the other Quantizer does."""
        self._inner.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """As the other Quantizer does."""
        self._inner.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)
