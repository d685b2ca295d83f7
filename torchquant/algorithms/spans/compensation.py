"""A span as it should be: float weights that make the best of what the quantized prefix gives them.

    T_i = W_i E[x xqT] E[xq xqT]^-1, damped     for each site, xq from the prefix and the T of the sites before it

What the span then makes of its quantized inputs is what its quantized self should make of them. The float output itself
asks for more: that the error of the prefix on the calibration data be undone, which a block has weights enough to
learn by heart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from torchquant.algorithms.layers.gram import Moments, choose_damp, compensated, moments
from torchquant.algorithms.layers.layerwise import DAMPS, Inside, float_weight, moved_bias
from torchquant.algorithms.layers.layout import Layout
from torchquant.calibration.stream import Task
from torchquant.fx.blocks import weight_of

__all__ = ["Compensated"]


class Compensated:
    """The span of a task with compensated float weights and biases, activations unquantized.

    Args:
        task: its data are read once for each site.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._weights: dict[Node, torch.Tensor] = {}
        self._biases: dict[Node, torch.Tensor] = {}
        for site in task.span.sites:
            self._solve(site)

    def _solve(self, site: Node) -> None:
        prepared = self._task.prepared
        weight, observed_weight = float_weight(prepared, site), weight_of(prepared, site)
        assert observed_weight is not None
        layout = Layout.of(site, weight.shape)
        matrix = layout.matrix(weight.float())
        before = self._task.evaluator("float", weights=dict(self._weights), biases=dict(self._biases))
        folds = moments(Inside(self._task, site, before), site, layout)
        whole = Moments.joined(folds).centre_()
        damp = choose_damp(matrix, [fold.centre_() for fold in folds], DAMPS)
        target = compensated(matrix, whole, damp)
        self._weights[observed_weight[0]] = layout.tensor(target)
        self._biases[site] = moved_bias(prepared, site, layout, target, whole.mean, whole.mean_q)

    def results(self, inputs: Mapping[Node, object]) -> list[torch.Tensor]:
        """The results of the span for inputs from the quantized prefix."""
        evaluator = self._task.evaluator("float", weights=self._weights, biases=self._biases)
        with torch.no_grad():
            env = evaluator.run(self._task.span.nodes, dict(inputs))
        return [env[node] for node in self._task.results]
