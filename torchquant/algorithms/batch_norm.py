"""BatchNorm re-estimation: match the mean and the gain of each output channel to the float network's.

Hubara, Nahshan, Hanani, Banner, Soudry: "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021,
section 5 (batch-norm tuning). `prepare_pt2e` has folded BatchNorm into the convolution in front of it, so its two
parameters live on in the bias and in the scale of the weight: that is where they are corrected, for linears as well.

    y, yq                              outputs of the layer: float function, and quantized on the quantized prefix
    gamma = cov(y, yq) / var(yq)       the least-squares gain: a factor on the channel's weight scale; the codes stay
    b <- E[y] - gamma (E[yq] - b)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchquant.algorithms.bias_correction import bias_now, output_moments
from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.calibration.stream import Task
from torchquant.fx import ops
from torchquant.fx.blocks import Span, layers, weight_grid, weight_of
from torchquant.fx.grids import Grid
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution, SolvedWeight

__all__ = ["BatchNormReestimation"]

_GAIN = (0.5, 2.0)


class BatchNormReestimation:
    """Corrects gain and bias of each output channel. Weights with one scale for several channels keep their gain."""

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """Each site for itself."""
        return layers(prepared, excluded)

    def solve(self, task: Task, clock: Clock) -> Solution:
        """Scale and bias of one site."""
        (site,) = task.span.sites
        moments, bias, grid = output_moments(task), bias_now(task), weight_grid(task.prepared, site)
        gain = torch.ones_like(moments.mean)
        if _is_per_output(site, grid):
            gain = torch.where(moments.variance_q > 0, moments.covariance / moments.variance_q.clamp(min=1e-30), gain)
            gain = gain.clamp(*_GAIN)
        solution = Solution(biases={site.name: moments.mean - gain * (moments.mean_q - bias)})
        if bool((gain != 1).any()):
            solution.weights[site.name] = _codes(task, site, grid), grid.with_scale(grid.scale * gain)
        return solution


def _is_per_output(site: Node, grid: Grid) -> bool:
    kind = ops.kind_of(site)
    return kind is not None and kind.axis == 0 and grid.dialect == "channel" and grid.axis == 0


def _codes(task: Task, site: Node, grid: Grid) -> torch.Tensor:
    weight = weight_of(task.prepared, site)
    assert weight is not None
    if isinstance(weight[1], SolvedWeight):
        return weight[1].codes
    return grid.encode(float_weight(task.prepared, site))
