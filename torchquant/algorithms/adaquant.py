"""AdaQuant: learn the weights themselves, their scale, the input's step and the bias, layer by layer.

Hubara, Nahshan, Hanani, Banner, Soudry: "Accurate Post Training Quantization With Small Calibration Sets", ICML
2021 (first "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming"), section 3.

    min over V, s_w, s_x, b of |W X - (Q(W + V) Q(X) + b)|^2, eq. 4, by gradients straight through the rounding
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.algorithms.spans.objective import Objective
from torchquant.algorithms.spans.reconstruction import Reconstruction, StraightThrough, standing
from torchquant.calibration.stream import Task
from torchquant.fx.blocks import Span, layers
from torchquant.fx.reading import observer_of
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["AdaQuant"]


class AdaQuant:
    """Weights, scales, input steps and biases of one layer after the other.

    Args:
        iterations: for each layer.
        lr: Adam's step size for weights, in steps of their scale.
        scale_lr: for logarithms of scales and input steps.
        bias_lr: for biases.
    """

    def __init__(
        self, iterations: int = 300, *, lr: float = 1e-2, scale_lr: float = 1e-3, bias_lr: float = 1e-3
    ) -> None:
        self.iterations, self.lr, self.scale_lr, self.bias_lr = iterations, lr, scale_lr, bias_lr

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """Each site, with the observer of its input where that stands right before it and feeds nothing else."""
        return [_with_input(prepared, span.sites[0]) for span in layers(prepared, excluded)]

    def solve(self, task: Task, clock: Clock) -> Solution:
        """Learn one layer."""
        now, (site,) = standing(task), task.span.sites
        codes, grid = now.weights[site.name]
        weight = StraightThrough(float_weight(task.prepared, site), grid, codes)
        objective = Objective(task, sensitive=False)
        learned = Reconstruction(objective, clock, {site: weight}, {site: now.biases[site.name]}, learn_steps=True)
        learned.run(self.iterations, lr=self.lr, step_lr=self.scale_lr, bias_lr=self.bias_lr)
        return learned.answer()


def _with_input(prepared: GraphModule, site: Node) -> Span:
    source = site.args[0]
    if isinstance(source, Node) and observer_of(prepared, source) is not None and list(source.users) == [site]:
        between = source.next
        while between is not site and (between.op == "get_attr" or observer_of(prepared, between) is not None):
            between = between.next
        if between is site:
            return Span((source, site), (site,))
    return Span((site,), (site,))
