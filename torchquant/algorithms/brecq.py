"""BRECQ: reconstruct block by block, errors weighed by the network's sensitivity to them.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021, section 3.

The paper weighs the error of a block's output by the squared gradient of the task loss (eq. 10). No labels are
needed here: the gradient is that of random projections of the network's output, which gives the Gauss-Newton
diagonal of the squared output error. Within the block the codes move by Gauss-Newton steps (see `gauss_newton`), and
then activation steps and biases are learned with the codes as they are, as the paper does (section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.fx import GraphModule

from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.layers.layerwise import Inside, Layerwise, trial
from torchquant.algorithms.spans.compensation import Compensated
from torchquant.algorithms.spans.gauss_newton import improve_codes
from torchquant.algorithms.spans.objective import Objective
from torchquant.algorithms.spans.reconstruction import Reconstruction, standing
from torchquant.calibration.stream import Stream, Task
from torchquant.errors import InputError
from torchquant.fx.blocks import Span, blocks
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

__all__ = ["BRECQ"]

_START = AdaRound()


class BRECQ:
    """Codes, activation steps and biases of a block against what the block should make of its inputs.

    Each block starts from AdaRound's answers for its layers, on the inputs that the blocks in front of it lead to and
    with errors weighed by the network's output, and ends with a smaller error or with these.

    Args:
        iterations: of learning steps and biases, for each block. rounds: of Gauss-Newton steps on the codes, at most.
        step_lr, bias_lr: Adam's step sizes for logarithms of activation steps, and for biases.
        fisher: weigh errors by sensitivity; if not, all alike.
        draws: random projections that measure it.
        compensate: aim at what the block with compensated float weights makes of its quantized inputs (see
            `compensation`); if not, at its float output.
        learn_steps, learn_biases: besides the codes.
        start: what a block starts from; None: what stands in the graph.
        min_sites, max_sites: convolutions and linears in a block.
    """

    drop = 0.0

    def __init__(
        self,
        iterations: int = 200,
        *,
        rounds: int = 20,
        step_lr: float = 1e-3,
        bias_lr: float = 1e-3,
        fisher: bool = True,
        draws: int = 2,
        compensate: bool = True,
        learn_steps: bool = True,
        learn_biases: bool = True,
        start: Layerwise | None = _START,
        min_sites: int = 4,
        max_sites: int = 8,
    ) -> None:
        if not 1 <= min_sites <= max_sites:
            raise InputError(
                f"min_sites {min_sites} and max_sites {max_sites} must satisfy 1 <= min_sites <= max_sites"
            )
        self.iterations, self.rounds, self.step_lr, self.bias_lr = iterations, rounds, step_lr, bias_lr
        self.fisher, self.draws, self.compensate = fisher, draws, compensate
        self.learn_steps, self.learn_biases = learn_steps, learn_biases
        self.start, self.min_sites, self.max_sites = start, min_sites, max_sites

    def spans(self, prepared: GraphModule, excluded: frozenset[str]) -> list[Span]:
        """Blocks between the graph's cut points."""
        return blocks(prepared, excluded, min_sites=self.min_sites, max_sites=self.max_sites)

    def begin(self, stream: Stream, spans: Sequence[Span], seed: int) -> None:
        """Measure the sensitivities, and those that the start asks for."""
        places = self.start is not None and self.start.weigh_places
        if self.fisher or places:
            stream.sensitivities(spans, seed, self.draws, elements=self.fisher, metrics=self.fisher, places=places)

    def solve(self, task: Task, clock: Clock) -> Solution:
        """Learn one block."""
        first = standing(task) if self.start is None else _layer_by_layer(self.start, task, clock)
        aim = Compensated(task) if self.compensate else None
        objective = Objective(task, sensitive=self.fisher, aim=aim)

        def improved() -> Solution:
            return improve_codes(objective, first, clock, rounds=self.rounds, drop=self.drop, biases=self.learn_biases)

        answer = self._learn(objective, clock.part(task, improved), clock)
        answer.notes = first.notes
        return answer

    def _learn(self, objective: Objective, first: Solution, clock: Clock) -> Solution:
        """Steps and biases, if that makes the error smaller."""
        sites = {site.name: site for site in objective.task.span.sites}
        learned = Reconstruction(
            objective,
            clock,
            {sites[name]: weight for name, weight in first.weights.items()},
            {sites[name]: bias for name, bias in first.biases.items() if self.learn_biases},
            learn_steps=self.learn_steps,
            drop=self.drop,
        )
        learned.run(self.iterations, step_lr=self.step_lr, bias_lr=self.bias_lr)
        answer = learned.answer()
        answer.biases = first.biases | answer.biases
        before, after = (objective.of(trial(objective.task, s)) for s in (first, answer))
        return answer if after <= before else first


def _layer_by_layer(start: Layerwise, task: Task, clock: Clock) -> Solution:
    solution = Solution()
    for site in task.span.sites:
        inside = Inside(task, site, trial(task, solution))
        answer = clock.part(inside, partial(start.solve, inside, clock))
        solution.weights |= answer.weights
        solution.biases |= answer.biases
        solution.notes += answer.notes
    return solution
