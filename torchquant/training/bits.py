"""Fewer bits than a Quantizer's formats have: codes of 4, 3 or 2 bits in the integers that its target computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from torchquant.errors import InputError, SchemeError
from torchquant.formats.packed import bits_of
from torchquant.fx import ops
from torchquant.fx.patterns import match
from torchquant.fx.reading import observers
from torchquant.observers.minmax import reset
from torchquant.training.fakes import Fake, has_grid

__all__ = ["narrow"]


def narrow(
    prepared: GraphModule,
    *,
    weights: int | None = None,
    activations: int | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Give static integer grids of a prepared graph, of any Quantizer, fewer codes; in place, best before calibration.

    The dtype stays, so that kernels of 8 bits run what comes out: W4A4 on x86 is int8 weights from -8 to 7 and uint8
    activations from 0 to 15, of which `convert` stores the weights in 4 bits.

    Args:
        prepared: what `prepare_pt2e`, `prepare_qat_pt2e` or `torchquant.qat.prepare` returned.
        weights, activations: bits, 2 to 8; None: as they are.
        exclude: patterns (see `torchquant.fx.patterns.match`) of ops whose weight and inputs stay as they are, say the
            first and the last layer.

    Raises:
        InputError: bits out of range, or nothing in the graph that has more.
        SchemeError: a weight with no integer grid, or one that has fewer codes already.
        PatternError: a pattern matches nothing.
    """
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
            raise InputError(f"{name}={bits!r}: 2 to 8 bits")
    kept = {node for pattern in exclude for node in match(prepared, pattern)}
    places: dict[int, tuple[Any, bool, Node, set[Node]]] = {}
    for node, observer in observers(prepared):
        if not hasattr(observer, "obs_or_fqs"):
            is_weight = ops.is_constant(node.args[0])  # type: ignore[arg-type]
            _, _, _, readers = places.setdefault(id(observer), (observer, is_weight, node, set()))
            readers |= set(node.users)
    done = 0
    for observer, is_weight, node, readers in places.values():
        bits = weights if is_weight else activations
        if bits is not None and not readers & kept:
            done += _narrow_one(prepared, observer, bits, node, is_weight)
    if not done:
        raise InputError("no static integer grid of the graph was narrowed: none is left, or all are excluded")


def _narrow_one(prepared: GraphModule, observer: Any, bits: int, node: Node, is_weight: bool) -> int:
    inner = getattr(observer, "activation_post_process", observer)
    if not has_grid(inner):
        if is_weight:
            raise SchemeError(
                f"{_readers(node)}: {type(inner).__name__} has no integer grid of {bits} bits; exclude it"
            )
        return 0
    if hasattr(inner, "grid"):
        raise SchemeError(f"{_readers(node)}: an algorithm has chosen its codes already; narrow before tq.optimize")
    if isinstance(observer, Fake) and observer.learned:
        raise SchemeError(f"{_readers(node)}: its step is learned already; narrow before torchquant.qat.learn_steps")
    low, high = int(inner.quant_min), int(inner.quant_max)
    if bits_of(low, high) < bits:
        raise SchemeError(f"{_readers(node)}: its codes go from {low} to {high}, which is less than {bits} bits")
    codes = _codes(low, bits)
    if bits_of(low, high) == bits:
        codes = low, high
    for module in (observer, inner):
        for name, value in (("quant_min", codes[0]), ("quant_max", codes[1]), ("has_customized_qrange", True)):
            if hasattr(module, name):
                setattr(module, name, value)
    if hasattr(inner, "codes"):
        inner.codes = codes
    if is_weight:
        reset(inner, _readers(node))
        observer(ops.constant_value(prepared, node.args[0]))  # type: ignore[arg-type]
    elif isinstance(observer, Fake) and not observer.is_waiting:
        observer.take_qparams(*inner.calculate_qparams())
    return 1


def _codes(low: int, bits: int) -> tuple[int, int]:
    """The codes of so many bits of an unsigned or of a signed format."""
    return (0, 2**bits - 1) if low >= 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _readers(node: Node) -> str:
    return ", ".join(ops.module_path(user) or user.name for user in node.users) or node.name
