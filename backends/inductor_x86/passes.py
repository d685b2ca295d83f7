"""Rewrites of what is left to Inductor, so that it finds its int8 patterns and mixes nothing up."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.passes import fresh_name, replace_each

__all__ = ["detach_activations", "flatten_quantized_linears", "rename_folded_weights"]

aten = torch.ops.aten


def rename_folded_weights(model: GraphModule) -> None:
    """Give the codes that `convert_pt2e` folded names of their own.

    Inductor's freezing calls its packed weights `_frozen_param0` too, and AOTInductor then stores whichever comes first
    under the name: the kernel is handed the wrong tensor, and crashes.
    """
    renamed: dict[str, str] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_frozen_param"):
            target = str(node.target)
            if target not in renamed:
                renamed[target] = fresh_name(model, f"codes{target.removeprefix('_frozen_param')}")
                model.register_buffer(renamed[target], getattr(model, target))
            node.target = renamed[target]
    for target in renamed:
        delattr(model, target)
    model.recompile()


def flatten_quantized_linears(model: GraphModule) -> int:
    """Give every linear behind a quantize op a 2-D input, by moving the reshape in front of the quantize op.

    Inductor turns a linear on a permuted 3-D or 4-D input into a batched matmul, which no int8 pattern
    matches. Per-tensor quantization commutes with reshapes, so the function stays the same.
    """
    return replace_each(model, _is_deep_quantized_linear, _flattened_linear)


def detach_activations(model: GraphModule) -> int:
    """Put activations behind an int8 conv1d on a view of its result, where Inductor does not fuse them into it.

    Inductor does fuse SiLU and hardswish, but oneDNN's int8 conv1d refuses every activation except ReLU when it runs.
    """
    return replace_each(model, _is_behind_quantized_conv1d, _detached)


_FUSED = frozenset(
    {"gelu", "hardsigmoid", "hardswish", "hardtanh", "sigmoid", "silu", "tanh"}
)  # with a product or alone


def _is_behind_quantized_conv1d(node: Node) -> bool:
    conv = ops.argument(node, 0) if ops.op_name(node) in _FUSED else None
    x = ops.argument(conv, 0) if conv is not None and ops.op_name(conv) == "conv1d" else None
    return x is not None and ops.is_dequantize(x)


def _detached(model: GraphModule, node: Node) -> Node:
    call, target = model.graph.call_function, node.target
    view = call(aten.unsqueeze.default, (node.args[0], 0))
    activation = call(target, (view, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
    activation.meta = {k: v for k, v in node.meta.items() if k != "val"}
    return call(aten.squeeze.dim, (activation, 0))


def _is_deep_quantized_linear(node: Node) -> bool:
    if node.target is not aten.linear.default or not ops.is_dequantize(x := node.args[0]):  # type: ignore[arg-type]
        return False
    quantize = x.args[0]  # type: ignore[union-attr]
    shape = ops.shape_of(node)
    return isinstance(quantize, Node) and ops.is_quantize(quantize) and shape is not None and len(shape) > 2


def _flattened_linear(model: GraphModule, node: Node) -> Node:
    call = model.graph.call_function
    dequantize, *rest = node.args
    assert isinstance(dequantize, Node)
    quantize = dequantize.args[0]
    assert isinstance(quantize, Node)
    x = quantize.args[0]
    assert isinstance(x, Node)
    shape = ops.shape_of(node)
    features = ops.shape_of(x)
    assert shape is not None
    assert features is not None
    flat = call(aten.reshape.default, (x, [-1, features[-1]]))
    codes = call(quantize.target, (flat, *quantize.args[1:]), dict(quantize.kwargs))  # type: ignore[arg-type]
    values = call(dequantize.target, (codes, *dequantize.args[1:]), dict(dequantize.kwargs))  # type: ignore[arg-type]
    linear = call(aten.linear.default, (values, *rest))
    linear.meta = {k: v for k, v in node.meta.items() if k != "val"}
    sizes = [s if isinstance(s, int) else call(aten.sym_size.int, (x, i)) for i, s in enumerate(shape[:-1])]
    return call(aten.reshape.default, (linear, [*sizes, shape[-1]]))
