"""AutoRound: learn how each weight is rounded, and how far its grid reaches, by the signs of gradients.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", Findings of EMNLP 2024, arXiv 2309.05516, section 3; the best iterate is kept as in the authors' code.

    W                the weight        V (like W)  in [-0.5, 0.5]   alpha, beta (cells,)  in [0, 1]
    s  = (alpha max W - beta min W) / (2^bits - 1),   z = round(n - beta min W / s)
    Wq = s (clip(round(W / s + z + V), n, m) - z)                                                   eq. 3, 4
    minimize  |block(Wq, xq) - block(W, x)|^2   over V, alpha, beta by  p <- p - lr sign(dL / dp)    eq. 5

n, m are the limits of the codes. `max W` and `min W` are the ends of the grid that stands in the graph, which for
min-max observers are those of the weights. A symmetric grid has alpha alone. `xq` comes from the quantized prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from torchquant.algorithms.layers.layerwise import Answer, float_weight, floored, trial
from torchquant.algorithms.layers.offset_rounding import fake_quantize
from torchquant.algorithms.spans.compensation import Compensated
from torchquant.algorithms.spans.objective import Objective
from torchquant.algorithms.spans.reconstruction import LearnedWeight, Reconstruction, rounded, standing
from torchquant.calibration.parallel import total, total_all_
from torchquant.calibration.stream import Task
from torchquant.errors import InputError
from torchquant.fx.blocks import Span, blocks, weight_of
from torchquant.fx.grids import Grid
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["AutoRound", "SignRounded"]

_FEW_CODES = 15  # steps between the ends of a grid of 4 bits, for which the paper chose its learning rates
_LEAST = 1e-3  # of the grid's scale: a range that alpha and beta make smaller has no codes to tell apart


class AutoRound:
    """Rounding offsets and ranges of the weights of a block by signed gradient descent, for any Quantizer's grids.

    Convolutions and linears; weights in groups, per channel and per tensor, symmetric or affine. Where the Quantizer
    fixes a scale (`FixedQParamsQuantizationSpec`) the offsets alone are learned, and the notes say so. What a block
    ends with is the best of the best iterate, the last one, and rounding to nearest on the grids as they were, on all
    calibration data.

    Args:
        steps: for each block; the paper's 200, or 1000 for 2 bits.
        lr: step size of the offsets; None: 1 / steps. It falls linearly to zero.
        range_lr: step size of alpha and beta; None: `lr`. Above 4 bits it is less in proportion, or one step would cut
            off several codes.
        clip_range: what alpha and beta are kept within; (1, 1) leaves the ranges as they are.
        batch_size: samples (rows of the batches) in a step, at least.
        compensate: aim at what the block with compensated float weights makes of its quantized inputs (see `BRECQ`);
            if not, at its float output, as the paper does.
        min_sites, max_sites: convolutions and linears in a block. A layer of a Llama has 7, one of BERT 6.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        steps: int = 200,
        *,
        lr: float | None = None,
        range_lr: float | None = None,
        clip_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 8,
        compensate: bool = False,
        min_sites: int = 5,
        max_sites: int = 8,
    ) -> None:
        if any(type(n) is not int or n < 1 for n in (steps, batch_size)):
            raise InputError(f"steps is {steps!r} and batch_size {batch_size!r}; both must be whole numbers from 1")
        for name, rate in (("lr", lr), ("range_lr", range_lr)):
            if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
                raise InputError(f"{name} is {rate!r}; it must be a number above 0, or None")
        if not isinstance(clip_range, (tuple, list)) or len(clip_range) != 2:
            raise InputError(f"clip_range is {clip_range!r}; it must be two numbers, the least and the largest")
        if not 0 <= clip_range[0] <= 1 <= clip_range[1] < math.inf:
            raise InputError(f"clip_range is {clip_range}; it must hold 1, where alpha and beta start, from 0 upwards")
        if not 1 <= min_sites <= max_sites:
            raise InputError(
                f"min_sites {min_sites} and max_sites {max_sites} must satisfy 1 <= min_sites <= max_sites"
            )
        self.steps, self.batch_size, self.compensate = steps, batch_size, compensate
        self.lr = 1 / steps if lr is None else lr
        self.range_lr, self.clip_range = self.lr if range_lr is None else range_lr, clip_range
        self.min_sites, self.max_sites = min_sites, max_sites

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """Blocks between the graph's cut points."""
        return blocks(prepared, excluded, min_sites=self.min_sites, max_sites=self.max_sites)

    def solve(self, task: Task, clock: Clock) -> Solution:
        """Learn one block."""
        objective = Objective(task, sensitive=False, aim=Compensated(task) if self.compensate else None)
        now, notes = standing(task), list[str]()
        weights: dict[Node, SignRounded] = {}
        for site in task.span.sites:
            limits = self.clip_range
            if _is_fixed(task.prepared, site):
                limits = (1.0, 1.0)
                notes.append(f"{site.name}: its scale is fixed by its spec: only how it is rounded is learned")
            weights[site] = SignRounded(float_weight(task.prepared, site), now.weights[site.name][1], limits)
        start = _answers(weights)
        learned = Reconstruction(objective, clock, weights, {}, learn_steps=False)
        best = sign_descent(learned, weights, self.steps, self.lr, self.range_lr, self.batch_size)
        candidates = [_answers(weights), start]
        for site, state in best.items():
            weights[site].load_state_dict(state)
        candidates.insert(0, _answers(weights))
        answer = min(candidates, key=lambda s: objective.of(trial(task, s)))
        answer.notes = notes
        return answer


class SignRounded(LearnedWeight):
    """A weight W rounded with an offset V, on a grid whose ends are multiplied by alpha and beta.

    Args:
        weight: float, in the shape of the layer's weight.
        grid: where it starts: alpha = beta = 1.
        limits: least and largest alpha and beta; equal ones leave the grid as it is.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, limits: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        self._weight, self.grid, self.limits = weight.float(), grid, limits
        self.learns_range = limits[0] < limits[1]
        self.offset = nn.Parameter(torch.zeros(weight.shape))
        ends = 1 if grid.symmetric else 2
        self.ends = nn.Parameter(torch.ones(ends, grid.scale.numel()), requires_grad=self.learns_range)

    def forward(self) -> torch.Tensor:
        """The quantized weight, with gradients by V, alpha and beta."""
        scale, zero_point = self._grid()
        return fake_quantize(self._weight, self.offset, scale, zero_point, self.grid)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points (cells,)."""
        grid, zeros = self.grid, self.grid.zero_point.float()
        least = grid.scale * _LEAST
        if grid.symmetric or not self.learns_range:
            return torch.maximum(grid.scale * self.ends[0], least), zeros
        low, high = (grid.quant_min - zeros) * grid.scale * self.ends[1], (grid.quant_max - zeros) * grid.scale
        scale = torch.maximum((high * self.ends[0] - low) / (grid.quant_max - grid.quant_min), least)
        return scale, rounded(grid.quant_min - low / scale).clamp(grid.quant_min, grid.quant_max)

    @torch.no_grad()
    def move_(self, lr: float, range_lr: float) -> None:
        """A step against the signs of the gradients; of alpha and beta no wider, in codes, than in 4 bits."""
        range_lr *= min(1.0, _FEW_CODES / (self.grid.quant_max - self.grid.quant_min))
        for parameter, rate, limits in ((self.offset, lr, (-0.5, 0.5)), (self.ends, range_lr, self.limits)):
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=rate).clamp_(*limits)

    @torch.no_grad()
    def answer(self) -> tuple[torch.Tensor, Grid]:
        """Codes and grid, on scales as they are stored."""
        grid = self.grid
        if bool((self.ends != 1).any()):
            scale, zero_point = self._grid()
            grid = floored(grid, Answer(self.offset, scale / grid.scale, None if grid.symmetric else zero_point))
        scale, zero_point = grid.expand(self._weight.shape)
        codes = torch.round(self._weight / scale + self.offset) + zero_point
        return codes.clamp(grid.quant_min, grid.quant_max), grid


def sign_descent(
    learned: Reconstruction,
    weights: Mapping[Node, SignRounded],
    steps: int,
    lr: float,
    range_lr: float,
    batch_size: int,
) -> dict[Node, dict[str, torch.Tensor]]:
    """Move the weights of a block; returns their state at the step of least error on the samples it saw.

    Each process draws from its own batches, and counts by how many it has.
    """
    parameters = [p for w in weights.values() for p in w.parameters() if p.requires_grad]
    count = learned.task.count
    share = count / max(total(count)[0], 1)
    least, best = math.inf, dict[Node, dict[str, torch.Tensor]]()
    for step in range(steps):
        if learned.clock.is_over:
            break
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        error = total(_backward(learned, share, batch_size) if count else 0.0)[0]
        total_all_([p.grad for p in parameters if p.grad is not None])
        if error < least:
            least = error
            best = {site: {k: v.clone() for k, v in w.state_dict().items()} for site, w in weights.items()}
        for weight in weights.values():
            weight.move_(lr * (1 - step / steps), range_lr * (1 - step / steps))
    return best


def _backward(learned: Reconstruction, share: float, batch_size: int) -> float:
    """Add the gradients of the error on at least `batch_size` samples; returns the error, mean over these."""
    errors, drawn = 0.0, 0
    with torch.enable_grad():
        while drawn < batch_size:
            error, count = learned.sampled()
            (error * (share / max(batch_size, count))).backward()
            errors, drawn = errors + float(error.detach()), drawn + count
    return share * errors / drawn


def _answers(weights: Mapping[Node, SignRounded]) -> Solution:
    return Solution({site.name: weight.answer() for site, weight in weights.items()})


def _is_fixed(prepared: GraphModule, site: Node) -> bool:
    """Whether the Quantizer says the scale of a weight, whatever the weight is."""
    source = weight_of(prepared, site)
    assert source is not None
    observer = getattr(source[1], "original", source[1])
    return isinstance(getattr(observer, "activation_post_process", observer), FixedQParamsObserver)
