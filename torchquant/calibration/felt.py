"""What errors inside a network do to its output, to first order, by derivatives of the float function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from torchquant.calibration.evaluator import Env
from torchquant.calibration.metric import random_gradients
from torchquant.calibration.stream import Stream

__all__ = ["felt_errors", "felt_of_several"]

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

    def errors_of(node: Node, env: Env) -> dict[str, torch.Tensor]:
        error = error_of(node, env)
        return {} if error is None else {"": error}

    return felt_of_several(stream, sites, errors_of, seed).get("", {})


def felt_of_several(
    stream: Stream, sites: Sequence[Node], errors_of: Callable[[Node, Env], Mapping[str, torch.Tensor]], seed: int
) -> dict[str, dict[Node, float]]:
    """The same of several errors of each site, by name: they share the passes backward.

    Args:
        errors_of: name -> error of a site's value, alike in shape, from the float values so far.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = min(_MOST_DRAWS, max(_LEAST_DRAWS, -(-_DRAWS // max(stream.count, 1))))
    felt: dict[str, dict[Node, float]] = {}
    has_slope: dict[Node, bool] = {}
    for batch in range(stream.count):
        errors: dict[Node, Mapping[str, torch.Tensor]] = {}

        def look(node: Node, env: Env, errors: dict[Node, Mapping[str, torch.Tensor]] = errors) -> None:
            with torch.no_grad():
                if found := errors_of(node, env):
                    errors[node] = found

        measured, leaves = stream.float_with_gradients(batch, {}, dict.fromkeys(sites), look)
        kept = {node: value for node, value in measured.items() if node in errors}
        for _ in range(draws):
            for node, gradient in random_gradients(leaves, kept, generator):
                has_slope[node] = has_slope.get(node, False) or bool(gradient.any())
                for name, error in errors[node].items():
                    of_name = felt.setdefault(name, {})
                    of_name[node] = of_name.get(node, 0.0) + _energy(gradient * error) / draws
    return {name: {node: e for node, e in of.items() if has_slope[node]} for name, of in felt.items()}


def _energy(product: torch.Tensor) -> float:
    """Of the sums over each sample."""
    moved = product.double()
    samples = moved.flatten(1).sum(1) if moved.ndim > 1 else moved
    return float(samples.square().sum())
