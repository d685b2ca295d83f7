"""BRECQ: reconstruct block by block, errors weighed by the network's sensitivity to them.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021, section 3.

The paper weighs the error of a block's output by the squared gradient of the task loss (eq. 10). No labels are
needed here: the gradient is that of random projections of the network's output, which gives the Gauss-Newton
diagonal of the squared output error.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.contract import Clock
from torchquant.algorithms.layerwise import Inside, Layerwise, trial
from torchquant.algorithms.reconstruction import Reconstruction, SoftRounding
from torchquant.errors import InputError
from torchquant.fx.blocks import Span, blocks
from torchquant.fx.stream import Stream, Task
from torchquant.solved import Solution

__all__ = ["BRECQ"]

_START = AdaRound()


class BRECQ:
    """Learned rounding of all weights of a block against the block's float output.

    Each block starts from AdaRound's answers for its layers, on the inputs that the blocks in front of it lead to, and
    ends with what was learned only if that has the smaller error.

    Args:
        iterations: for each block. lr, step_lr, bias_lr: Adam's step sizes for the rounding, for the logarithms of
            activation steps, and for biases.
        lam, beta, warm_up: of the rounding term, as in `AdaRound`; the data term is 1 for a weight at the start.
        fisher: weigh errors by sensitivity; if not, all alike.
        draws: random projections that measure it.
        learn_steps, learn_biases: besides the rounding.
        start: what a block starts from; None: what stands in the graph.
        min_sites, max_sites: convolutions and linears in a block.
    """

    drop = 0.0

    def __init__(
        self,
        iterations: int = 500,
        *,
        lr: float = 1e-2,
        step_lr: float = 1e-3,
        bias_lr: float = 1e-3,
        lam: float = 10.0,
        beta: tuple[float, float] = (20.0, 2.0),
        warm_up: float = 0.2,
        fisher: bool = True,
        draws: int = 2,
        learn_steps: bool = True,
        learn_biases: bool = True,
        start: Layerwise | None = _START,
        min_sites: int = 2,
        max_sites: int = 8,
    ) -> None:
        if not 1 <= min_sites <= max_sites:
            raise InputError(
                f"min_sites {min_sites} and max_sites {max_sites} must satisfy 1 <= min_sites <= max_sites"
            )
        self.iterations, self.lr, self.step_lr, self.bias_lr = iterations, lr, step_lr, bias_lr
        self.lam, self.beta, self.warm_up = lam, beta, warm_up
        self.fisher, self.draws = fisher, draws
        self.learn_steps, self.learn_biases = learn_steps, learn_biases
        self.start, self.min_sites, self.max_sites = start, min_sites, max_sites

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """Blocks between the graph's cut points."""
        return blocks(prepared, excluded, min_sites=self.min_sites, max_sites=self.max_sites)

    def begin(self, stream: Stream, spans: Sequence[Span], seed: int) -> None:
        """Measure the sensitivities."""
        if self.fisher:
            stream.sensitivities(spans, seed, self.draws)

    def solve(self, task: Task, clock: Clock) -> Solution:
        """Learn one block."""
        first = Solution() if self.start is None else _layer_by_layer(self.start, task, clock)
        learned = Reconstruction(
            task,
            clock,
            SoftRounding,
            drop=self.drop,
            sensitive=self.fisher,
            learn_steps=self.learn_steps,
            learn_biases=self.learn_biases,
            start=first,
        )
        learned.run(
            self.iterations,
            lr=self.lr,
            step_lr=self.step_lr,
            bias_lr=self.bias_lr,
            lam=self.lam,
            beta=self.beta,
            warm_up=self.warm_up,
        )
        answer = learned.answer()
        return answer if not first or task.error(trial(task, answer)) <= task.error(trial(task, first)) else first


def _layer_by_layer(start: Layerwise, task: Task, clock: Clock) -> Solution:
    found = Solution()
    for site in task.span.sites:
        answer = start.solve(Inside(task, site, found), clock)
        found.weights |= answer.weights
        found.biases |= answer.biases
    return found
