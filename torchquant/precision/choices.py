"""What each weight of a model may get, and what that takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant.errors import InputError
from torchquant.fx.blocks import weight_grid, weight_of
from torchquant.fx.reading import is_prepared
from torchquant.precision.plan import weighted_sites
from torchquant.precision.solver import Choice

__all__ = ["add_choices", "check_search", "together"]


def _takes_schemes(quantizer: type) -> bool:
    """Whether a Quantizer's class is told a scheme for each op, as those of torchquant are."""
    parameters = inspect.signature(quantizer).parameters.values()
    return any(p.name == "overrides" or p.kind is p.VAR_KEYWORD for p in parameters)


def check_search(exported: Any, quantizer: Any, schemes: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of `search` that make no sense."""
    if isinstance(schemes, str) or not schemes or not all(isinstance(s, str) for s in schemes):
        raise InputError(f'schemes is a list of names, such as ["w8", "w4_g64"], not {schemes!r}')
    if not (isinstance(quantizer, type) and issubclass(quantizer, Quantizer) and _takes_schemes(quantizer)):
        raise InputError(f"quantizer is a class of torchquant.quantizers, e.g. X86Quantizer, not {quantizer!r:.80}")
    if not isinstance(exported, GraphModule) or is_prepared(exported):
        raise InputError("search takes the float graph, from torchquant.export; it prepares it itself")
    fixed = sorted({"scheme", "overrides"} & set(options))
    if fixed:
        raise InputError(f"options cannot hold {' and '.join(fixed)}: that is what is searched")


def add_choices(
    prepared: GraphModule,
    measured: Mapping[str, float],
    scheme: str,
    costs: dict[str, dict[str, Choice]],
    shared: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
) -> None:
    """Add what one scheme costs at each op that it quantizes, and which weight, of which shape and bytes, it reads."""
    for name, (node, shape, source) in weighted_sites(prepared).items():
        weight = weight_of(prepared, node)
        shapes[name], sizes[name] = shape, source.meta["val"].element_size()
        if weight is None or node.name not in measured:
            continue
        costs.setdefault(name, {})[scheme] = Choice(scheme, _bytes(prepared, node, shape), measured[node.name])
        shared[name] = str(source.target if source.op == "get_attr" else source)


def _bytes(prepared: GraphModule, node: Any, shape: tuple[int, ...]) -> int:
    """Codes of as many bits as they need, a scale (16 bits for groups, else 32) and a zero point for each cell."""
    grid = weight_grid(prepared, node)
    bits = (grid.quant_max - grid.quant_min).bit_length()
    cells = grid.scale.numel()
    scale = 2 if grid.dialect == "block" else 4
    return math.ceil(math.prod(shape) * bits / 8) + cells * (scale + (0 if grid.symmetric else 1))


def together(costs: Sequence[Mapping[str, Choice]], float_bytes: int, allow_float: bool) -> tuple[Choice, ...]:
    """What several ops that read one weight may all get: they share its codes, and their errors add up."""
    common = [scheme for scheme in costs[0] if all(scheme in cost for cost in costs)]
    picks = [Choice(s, costs[0][s].size_bytes, sum(cost[s].noise for cost in costs)) for s in common]
    if allow_float or not picks:
        picks.append(Choice(None, float_bytes, 0.0))
    return tuple(picks)
