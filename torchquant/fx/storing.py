"""What a converted graph keeps of its weights: their codes alone, packed, each once.

The ops that unpack stand in front of the dequantize op, so `ops.constant_value` gives the codes of a packed graph as of
any other, and whoever reads a graph through `GraphReading` sees no difference.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.files.freed import give_back
from torchquant.files.shelf import kept
from torchquant.formats.packed import LARGEST_BITS, bits_of, pack_codes
from torchquant.fx import ops, passes
from torchquant.fx.reading import GraphReading

__all__ = [
    "fold",
    "fold_codes",
    "is_packed",
    "pack_weight",
    "pack_weights",
    "sink_constants",
    "unpack_weights",
]

_FOLDED = ("quantize_per_tensor", "quantize_per_channel", "quantize_affine")
_NARROW = (torch.int8, torch.uint8)


def fold_codes(model: GraphModule, *, pack: bool = True) -> int:
    """Compute the quantize ops of constants and keep their codes, one weight after the other; returns how many.

    As `convert_pt2e` with `fold_quantize`, which holds all codes beside all float weights before it drops any.

    Args:
        pack: at once, see `pack_weights`.
    """
    constants = [n for n in model.graph.nodes if ops.qdq_name(n) in _FOLDED and ops.is_constant(n)]
    for node in constants:
        fold(model, node, pack=pack)
        give_back()
    if pack:
        sink_constants(model)
    return passes.finished(model, len(constants))


def fold(model: GraphModule, node: Node, *, pack: bool = True) -> None:
    """Put the codes that a quantize op makes of a constant in its place; the constant goes, if nobody else reads it."""
    number = getattr(model, "_frozen_param_count", 0)  # torchao's count, and its names
    while hasattr(model, f"_frozen_param{number}"):
        number += 1
    model.__dict__["_frozen_param_count"] = number + 1
    name = f"_frozen_param{number}"
    model.register_buffer(name, ops.constant_value(model, node))
    with model.graph.inserting_before(node):
        codes = model.graph.get_attr(name)
    codes.meta = {k: v for k, v in node.meta.items() if k != "val"}
    node.replace_all_uses_with(codes)
    sources = node.all_input_nodes
    model.graph.erase_node(node)
    for source in sources:
        _drop(model, source)
    for user in list(codes.users) if pack else ():
        pack_weight(model, user)
    _drop(model, codes)
    if hasattr(model, name):
        setattr(model, name, kept(getattr(model, name)))


def _drop(model: GraphModule, node: Node) -> None:
    """Erase a constant that nothing reads, what it alone was computed from, and its tensor."""
    if node._erased or node.users or not (node.op == "get_attr" or ops.is_constant(node)):
        return
    sources = node.all_input_nodes
    model.graph.erase_node(node)
    node.meta.clear()  # nodes refer to each other, so that one goes late, and its meta may hold the tensor
    if node.op == "get_attr" and not any(n.target == node.target for n in model.graph.find_nodes(op="get_attr")):
        owner, _, leaf = str(node.target).rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    for source in sources:
        _drop(model, source)


def pack_weights(converted: GraphModule) -> int:
    """Store the weights of a converted graph in as few bits as their codes have; in place, returns the bytes saved.

    Codes below 8 bits are packed, and the scales and zero points of groups are kept in float16 and int8 where those
    hold them exactly, so a weight of 4 bits with a scale for each 32 takes 0.59 byte instead of 1.25. The graph
    computes the same, bit by bit: a weight is unpacked and decoded right before the op that reads it, one at a time.
    `torchquant.convert` and `torchquant.quantize` do so by themselves; call it behind torchao's `convert_pt2e`.

    Args:
        converted: what `convert_pt2e` returned, of any Quantizer.
    """
    before = passes.weight_bytes(converted)
    for node in list(converted.graph.nodes):
        pack_weight(converted, node)
    sink_constants(converted)
    converted.graph.eliminate_dead_code()
    passes.remove_dead_weights(converted)
    converted.recompile()
    return before - passes.weight_bytes(converted)


def pack_weight(model: GraphModule, node: Node) -> None:
    """Pack what a node reads, if that is a dequantize op of stored codes."""
    codes = ops.argument(node, 0) if ops.is_dequantize(node) else None
    if codes is None or codes.op != "get_attr" or not ops.is_constant(codes):
        return
    quantized = GraphReading(model).op(node)  # a reading of its own: it remembers scales
    if quantized is None or quantized.qparams.format:
        return
    low, high, value = quantized.qparams.quant_min, quantized.qparams.quant_max, _tensor(model, codes)
    arguments = ops.arguments(node)
    for name in ("scale", "scales", "zero_point", "zero_points"):
        if isinstance(parameter := arguments.get(name), Node) and parameter.op == "get_attr":
            _narrow(model, parameter)
    if low is None or high is None or value.dtype not in _NARROW or not value.numel():
        return
    low, bits = int(low), bits_of(int(low), int(high))
    if bits <= LARGEST_BITS and low <= int(value.min()) and int(value.max()) <= int(high):
        form = (bits, low, list(value.shape), value.dtype)
        _store(model, codes, pack_codes(value, bits, low), torch.ops.torchquant.unpack_codes.default, form)


def _narrow(model: GraphModule, parameter: Node) -> None:
    """Keep the scales or zero points of groups in fewer bits, where those hold them."""
    value = _tensor(model, parameter)
    if value.ndim < 2 or not value.numel():
        return
    narrow: torch.Tensor | None = None
    if value.dtype == torch.float32 and torch.equal(value.half().float(), value):
        narrow = value.half()
    elif value.dtype in (torch.int32, torch.int64):
        low, high = int(value.min()), int(value.max())
        fitting = [d for d in _NARROW if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max]
        narrow = value.to(fitting[0]) if fitting else None
    if narrow is not None:
        _store(model, parameter, narrow, torch.ops.torchquant.widen.default, (value.dtype,))


def _store(
    model: GraphModule, read: Node, value: torch.Tensor, op: torch._ops.OpOverload, form: tuple[Any, ...]
) -> None:
    """Keep `value` in the place of the tensor that a node reads, and let all its readers read `op(value, *form)`."""
    twins = [n for n in model.graph.find_nodes(op="get_attr") if n.target == read.target]
    readers = sorted((user, twin) for twin in twins for user in twin.users)
    with model.graph.inserting_before(readers[0][0]):
        stored = passes.add_buffer(model, f"{read.target}_packed", kept(value))
    del stored.meta["val"]
    for reader, twin in readers:
        with model.graph.inserting_before(reader):
            reader.replace_input_with(twin, model.graph.call_function(op, (stored, *form)))
    for twin in twins:
        _drop(model, twin)


def is_packed(node: Node) -> bool:
    """Whether a node unpacks a tensor that `pack_weights` stored in fewer bits."""
    return ops.qdq_name(node) in ("unpack_codes", "widen")


def unpack_weights(converted: GraphModule) -> int:
    """Undo `pack_weights`, in place; returns how many tensors were packed.

    For what looks for plain constants: our lowerings, which do so on a copy, and tools of others (ExecuTorch's
    partitioners, torchao's passes) that are handed what `torchquant.convert` or `quantize` returned.

    Args:
        converted: a graph of `torchquant.convert`, or one of which `pack_weights` packed the weights.
    """
    done, names = 0, dict[str, str]()
    for node in [n for n in converted.graph.nodes if is_packed(n) and ops.is_constant(n)]:
        source = node.args[0]
        assert isinstance(source, Node)
        with converted.graph.inserting_before(node):
            if str(source.target) in names:
                plain = converted.graph.get_attr(names[str(source.target)])
            else:
                name = str(source.target).rpartition("_packed")[0] or str(source.target)
                plain = passes.add_buffer(converted, name, ops.constant_value(converted, node))
                names[str(source.target)] = str(plain.target)
        node.replace_all_uses_with(plain)
        converted.graph.erase_node(node)
        done += 1
    if done:
        passes.finished(converted, done)
        passes.remove_dead_weights(converted)
    return done


def sink_constants(model: GraphModule) -> None:
    """Move what is computed of constants alone to right before its first reader.

    `torch.export` reads all parameters at the top of a graph, and observers stand behind them; run so, a converted
    graph would hold every weight decoded before the first is used.
    """
    constant: set[Node] = set()
    for node in model.graph.nodes:
        reads = node.all_input_nodes
        if node.op == "get_attr":
            constant |= set() if ops.is_overwritten(node) else {node}
        elif node.op == "call_function" and reads and constant.issuperset(reads) and not ops.written(node):
            constant.add(node)
    for node in [n for n in reversed(model.graph.nodes) if n in constant and n.op == "call_function" and n.users]:
        min(node.users).prepend(node)


def _tensor(model: GraphModule, node: Node) -> torch.Tensor:
    value: torch.Tensor = operator.attrgetter(str(node.target))(model).detach()
    return value
