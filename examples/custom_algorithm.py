"""A rounding algorithm of your own, in one file: the best of many random roundings, on torchao's own Quantizer.

python examples/custom_algorithm.py
"""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.algorithms.layers.layerwise import Answer, Layerwise
from torchquant.algorithms.layers.rounding import Problem
from torchquant.solving.contract import Clock


class BestOfManyRoundings(Layerwise):
    """Rounds each weight up with the probability of its fraction, `draws` times, and keeps each row's best rounding.

    `Layerwise` streams the data, forms the layer's second moments, corrects the bias and writes the codes back, for
    convolutions and linears on any Quantizer's grids. What is left to say is how one layer is rounded.
    """

    def __init__(self, draws: int = 200) -> None:
        super().__init__()
        self.draws = draws

    def choose(self, problem: Problem, clock: Clock) -> Answer:
        """Codes (groups, outputs, inputs) and a factor on each of the grid's scales."""
        generator = clock.generator()
        steps = problem.target / problem.scale
        best = problem.nearest()
        error = problem.contributions(best).sum(-1)
        for _ in range(self.draws):
            drawn = torch.floor(steps + torch.rand(steps.shape, generator=generator))
            codes = problem.clamp(drawn + problem.zero_point)
            candidate_error = problem.contributions(codes).sum(-1)
            better = candidate_error < error
            best = torch.where(better[..., None], codes, best)
            error = torch.where(better, candidate_error, error)
            if clock.is_over:
                break
        return Answer(best, torch.ones(problem.count))


def main() -> None:
    """Quantize a small CNN with torchao's Quantizer, plain and with the new algorithm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    batches = [torch.rand(16, 3, 8, 8) for _ in range(4)]
    exported = torch.export.export(model.eval(), (batches[0],), strict=True).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    tq.calibrate(prepared, batches)
    print(tq.optimize(prepared, batches, [BestOfManyRoundings()]))
    print(tq.compare(model, convert_pt2e(prepared), batches))


if __name__ == "__main__":
    main()
