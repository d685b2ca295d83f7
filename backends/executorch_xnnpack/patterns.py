"""A converted graph written in the patterns that the XNNPACK partitioner takes as int8."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from torchquant.backends.executorch_xnnpack.limits import unshared
from torchquant.fx import ops, passes
from torchquant.fx.windows import is_spatial_pad

__all__ = ["drop_batch_counters", "own_storage", "prepare"]

aten = torch.ops.aten


def prepare(graph: GraphModule) -> None:
    """Rewrite a converted graph in place; its function stays the same, bit by bit."""
    _separate_repeats(graph)
    _join_pads(graph)
    _separate_scales(graph)
    _shield_pads(graph)
    _shield_means(graph)
    _infer_sizes(graph)
    _distinct_outputs(graph)
    _copy_permuted(graph)
    _give_each_user_its_dequantize(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def own_storage(graph: GraphModule) -> None:
    """Parameters and buffers that are views of larger tensors as tensors of their own.

    Of constants that share a storage ExecuTorch stores one, whatever their offsets and strides.
    """
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = operator.attrgetter(str(node.target))(graph)
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size():
            continue
        with graph.graph.inserting_before(node):
            own = passes.add_buffer(graph, f"{node.target}_own", value.detach().contiguous().clone())
        own.meta = dict(node.meta)
        node.replace_all_uses_with(own)
        graph.graph.erase_node(node)
    graph.recompile()


def drop_batch_counters(graph: GraphModule) -> None:
    """Remove what counts BatchNorm's batches, which a model that was trained as a graph keeps after training."""
    for node in [n for n in graph.graph.nodes if str(n.target).endswith("num_batches_tracked")]:
        counting = [node]
        for at in counting:
            counting += [user for user in at.users if user not in counting]
        if not any(n.op == "output" or ops.is_float(n) for n in counting):
            for at in sorted(counting, key=list(graph.graph.nodes).index, reverse=True):
                graph.graph.erase_node(at)
    graph.recompile()


def _separate_repeats(graph: GraphModule) -> None:
    """A concatenation of a tensor with itself, whose operands the partitioner counts once, with one node for each."""
    for node in [n for n in graph.graph.nodes if n.target is aten.cat.default]:
        operands = list(node.args[0])
        for i, operand in enumerate(operands):
            if operand in operands[:i]:
                with graph.graph.inserting_before(node):
                    operands[i] = _another(graph, operand)
        node.args = (operands, *node.args[1:])


def _another(graph: GraphModule, node: Node) -> Node:
    """A second node with the same value."""
    return graph.graph.node_copy(node) if ops.is_dequantize(node) else _reshaped(graph, node)


def _reshaped(graph: GraphModule, node: Node) -> Node:
    """A view of the node to its own shape, which the delegate keeps; itself where two sizes are unknown."""
    shape = ops.shape_of(node) or ()
    unknown = [i for i, s in enumerate(shape) if not isinstance(s, int)]
    if not shape or len(unknown) > 1:
        return node
    copied = graph.graph.call_function(aten.view.default, (node, [s if isinstance(s, int) else -1 for s in shape]))
    copied.meta = dict(node.meta)
    return copied


def _separate_scales(graph: GraphModule) -> None:
    """A reshape between a cat, pool or slice and a quantize op of another scale, so that it is computed in float."""
    for node, _, quantize in list(unshared(graph)):
        with graph.graph.inserting_before(quantize):
            quantize.replace_input_with(node, _another(graph, node))


def _join_pads(graph: GraphModule) -> None:
    """A pad of zeros between int8 tensors, in front of convolutions: read by them without a quantize op between.

    XNNPACK pads in int8 only so; each convolution gets a pad of its own.
    """
    for node in [n for n in graph.graph.nodes if ops.op_name(n) == "pad"]:
        source = node.args[0]
        quantize = next(iter(node.users)) if len(node.users) == 1 else None
        if quantize is None or not ops.is_dequantize(source) or not ops.is_quantize(quantize):
            continue
        readers = [(d, user) for d in quantize.users for user in d.users]
        same = source.args[1:6] == quantize.args[1:6]
        if not same or not all(_is_integer_convolution(u) for _, u in readers) or not is_spatial_pad(node):
            continue
        for dequantize, user in readers:
            with graph.graph.inserting_before(user):
                padded = graph.graph.node_copy(node)
            user.replace_input_with(dequantize, padded)


def _is_integer_convolution(node: Node) -> bool:
    weight = ops.argument(node, 1)
    return ops.op_name(node) in ("conv1d", "conv2d") and weight is not None and ops.is_dequantize(weight)


def _shield_pads(graph: GraphModule) -> None:
    """A reshape between a dequantize op and a pad that no convolution reads.

    ExecuTorch gives every pad of zeros behind a dequantize op an int8 output, also where its input stays float, and
    such a program fails to load.
    """
    for node in [n for n in graph.graph.nodes if ops.op_name(n) in ("pad", "im2col")]:
        source = node.args[0]
        read = all(_is_integer_convolution(user) for user in node.users) and is_spatial_pad(node)
        if ops.is_dequantize(source) and not read:
            with graph.graph.inserting_before(node):
                node.replace_input_with(source, _reshaped(graph, source))


def _shield_means(graph: GraphModule) -> None:
    """A reshape between a dequantize op and a mean of sizes that vary, so that it is computed in float.

    XNNPACK's int8 mean keeps what it planned for a smaller call, and is wrong in a larger one.
    """
    for node in [n for n in graph.graph.nodes if ops.op_name(n) in ("mean", "adaptive_avg_pool2d")]:
        source = node.args[0]
        if not any(ops.is_quantize(user) for user in node.users):
            continue  # it is float already
        if ops.is_dequantize(source) and not all(isinstance(s, int) for s in ops.shape_of(source) or ("unknown",)):
            with graph.graph.inserting_before(node):
                node.replace_input_with(source, _reshaped(graph, source))


def _copy_permuted(graph: GraphModule) -> None:
    """Permutes whose result is contiguous, as the delegate makes it: else a reshape behind one is a copy and a view.

    The copy between them would keep the delegate from computing the reshape in int8.
    """
    for node in [n for n in graph.graph.nodes if n.target is aten.permute.default and not ops.is_constant(n)]:
        node.target = aten.permute_copy.default


_RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int)


def _infer_sizes(graph: GraphModule) -> None:
    """Reshapes with one unknown size as views that infer it: the delegate takes no sizes that are computed."""
    for node in [n for n in graph.graph.nodes if n.target in _RESHAPES]:
        shape, x = ops.shape_of(node) or (), node.args[0]
        unknown = [s for s in shape if not isinstance(s, int)]
        if len(unknown) == 1:
            if not x.meta["val"].is_contiguous() or _is_behind_permute(x):
                x = _contiguous(graph, node, x)
            node.target = aten.view.default
            node.args, node.kwargs = (x, [s if isinstance(s, int) else -1 for s in shape]), {}


_PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.numpy_T.default)
_ORDERED = ("linear", "matmul", "embedding", "conv1d", "conv2d")  # ops that give contiguous tensors, whatever they read


def _is_behind_permute(x: Node) -> bool:
    """Whether a tensor may lie in the order that a permute made, which fake values do not know after a rewrite."""
    stack, seen = [x], {x}
    while stack:
        node = stack.pop()
        if node.target in _PERMUTES:
            return True
        if node.op == "call_function" and not ops.is_dequantize(node) and ops.op_name(node) not in _ORDERED:
            stack += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return False


def _contiguous(graph: GraphModule, node: Node, x: Node) -> Node:
    """A copy of `x` in front of a node, in the order in which the delegate has it anyway."""
    with graph.graph.inserting_before(node):
        copied = graph.graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    copied.meta = {**x.meta, "val": x.meta["val"].contiguous()}
    return copied


_COPIES = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default)


def _distinct_outputs(graph: GraphModule) -> None:
    """Outputs that are one value, or parameters, as values of their own: a delegate returns each node once."""
    output = next(n for n in graph.graph.nodes if n.op == "output")
    seen: set[Node] = set()
    values = []
    for value in output.args[0]:
        source = value
        while isinstance(source, Node) and source.target in _COPIES:
            source = source.args[0]
        if isinstance(source, Node) and (source in seen or source.op == "get_attr"):
            with graph.graph.inserting_before(output):
                value = _own_constant(graph, source) if source.op == "get_attr" else _reshaped(graph, source)
        seen.add(source)
        values.append(value)
    output.args = (tuple(values),)


def _own_constant(graph: GraphModule, node: Node) -> Node:
    return passes.add_buffer(graph, f"returned_{node.name}", ops.constant_value(graph, node).clone())


def _give_each_user_its_dequantize(graph: GraphModule) -> None:
    """One dequantize op for each place that reads it.

    The delegate marks a dequantize op as part of the int8 op that reads it; a float op beside it would read int8 too.
    """
    for node in [n for n in graph.graph.nodes if ops.is_dequantize(n) and not ops.is_constant(n)]:
        for user in list(node.users)[1:]:
            with graph.graph.inserting_before(user):
                copied = graph.graph.node_copy(node)
            user.replace_input_with(node, copied)
