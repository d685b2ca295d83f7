"""What errors inside a network do to its output, to first order, by derivatives of the float function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from torchquant.calibration.evaluator import Env
from torchquant.calibration.metric import random_gradients
from torchquant.calibration.stream import Stream

__all__ = ["felt_errors"]

_LEAST_DRAWS, _MOST_DRAWS, _DRAWS = 4, 16, 32  # a batch, and of all batches together


def felt_errors(
    stream: Stream, sites: Sequence[Node], error_of: Callable[[Node, Env], torch.Tensor | None], seed: int
) -> dict[Node, float]:
    """For each site, the energy of what its own error makes of the network's output: sum of |J e|^2 over all batches.

    (r . J e)^2 with r standard normal has the mean |J e|^2, and r . J is one pass backward for all sites. Samples (the
    first axis) are taken as independent; within one, errors add up with their signs.

    Args:
        error_of: the error of a site's value, alike in shape, from the float values so far; None: leave it out.

    Returns:
        Without sites whose value is no float tensor, that the output has no derivative by, or whose derivative is zero
        throughout: a rounding in the network, an index made of it.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = min(_MOST_DRAWS, max(_LEAST_DRAWS, -(-_DRAWS // max(stream.count, 1))))
    felt, has_slope = dict[Node, float](), dict[Node, bool]()
    for batch in range(stream.count):
        errors: dict[Node, torch.Tensor] = {}

        def look(node: Node, env: Env, errors: dict[Node, torch.Tensor] = errors) -> None:
            with torch.no_grad():
                error = error_of(node, env)
            if error is not None:
                errors[node] = error

        measured, leaves = stream.float_with_gradients(batch, {}, dict.fromkeys(sites), look)
        kept = {node: value for node, value in measured.items() if node in errors}
        for _ in range(draws):
            for node, gradient in random_gradients(leaves, kept, generator):
                moved = (gradient * errors[node]).double()
                samples = moved.flatten(1).sum(1) if moved.ndim > 1 else moved
                felt[node] = felt.get(node, 0.0) + float(samples.square().sum()) / draws
                has_slope[node] = has_slope.get(node, False) or bool(gradient.any())
    return {node: energy for node, energy in felt.items() if has_slope[node]}
