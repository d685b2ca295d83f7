"""Composite ops rewritten, function unchanged, into the arithmetic that delegates take.

A delegate that knows linear, bmm, softmax and elementwise ops, yet neither attention, LayerNorm nor a mean over
the last axis, otherwise cuts a transformer into dozens of pieces. All rewrites need static shapes; what has
dynamic ones is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.fx import ops
from torchquant.fx.rewrites.arithmetic import (
    TENSOR_FORM,
    attention,
    batch_norm,
    bilinear,
    clamp,
    hard_sigmoid,
    instance_norm,
    layer_norm,
    log_sigmoid,
    mean,
    mish,
    reversed_subtraction,
    rms_norm,
    scalar_operand,
    softplus,
    spatial_mean,
    total,
    vector_norm,
    whole_pool,
)
from torchquant.fx.rewrites.builder import Builder, Rule, apply, is_static
from torchquant.fx.rewrites.constants import fold_constants
from torchquant.fx.rewrites.shapes import (
    COPIES,
    cropped,
    expand,
    needless,
    reshaped,
    select,
    shuffle,
    single,
    stack,
    transpose,
    viewed,
)

aten = torch.ops.aten
_NEEDLESS = (
    *COPIES,
    aten.dropout.default,
    aten.slice.Tensor,
    aten.reshape.default,
)


_RESHAPES = (
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


# forms that are one and the same to a Quantizer: applied before it annotates
FORMS: dict[Any, Rule] = {
    **dict.fromkeys((aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_max.default), clamp),
    **dict.fromkeys(_RESHAPES, reshaped),
    **dict.fromkeys(_NEEDLESS, needless),
    **dict.fromkeys((aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default), shuffle),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), cropped),
    aten.view.default: viewed,
    aten.select.int: select,
    aten.stack.default: stack,
    aten.cat.default: single,
    aten.mean.dim: spatial_mean,
    aten.avg_pool2d.default: whole_pool,
}


RULES: dict[Any, Rule] = {
    **FORMS,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.instance_norm.default: instance_norm,
    aten.scaled_dot_product_attention.default: attention,
    aten.mean.dim: lambda b, node: spatial_mean(b, node) or mean(b, node),
    aten.sum.dim_IntList: total,
    aten.linalg_vector_norm.default: vector_norm,
    aten.rsub.Scalar: reversed_subtraction,
    aten.hardsigmoid.default: hard_sigmoid,
    aten.bilinear.default: bilinear,
    aten.softplus.default: softplus,
    aten.mish.default: mish,
    aten.log_sigmoid.default: log_sigmoid,
    aten.transpose.int: transpose,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    **dict.fromkeys((*TENSOR_FORM, *TENSOR_FORM.values()), scalar_operand),
}


def decompose(model: GraphModule) -> int:
    """Apply every rule where it fits, fold what depends on constants alone; returns how many nodes changed."""
    _fill_values(model)
    fold_constants(model)
    return rewrite(model, RULES)


def normalize(model: GraphModule) -> int:
    """Write ops that have several forms in the one that a Quantizer and its target know; returns how many changed.

    A clamp becomes a ReLU or a hardtanh, a chunk slices, a select or squeeze a reshape, a pixel shuffle reshapes and a
    permute; copies and dropout vanish. The last node that stands for another keeps its name.
    """
    return rewrite(model, FORMS)


def expand_batch_norms(model: GraphModule) -> int:
    """Write every BatchNorm without statistics of its own as arithmetic; returns how many there were."""
    return apply(model, {aten.batch_norm.default: batch_norm})


def rewrite(model: GraphModule, rules: Mapping[Any, Rule]) -> int:
    return _split_chunks(model) + apply(model, rules)


def _fill_values(model: GraphModule) -> None:
    """Give dequantize nodes, which `convert_pt2e` makes without a fake value, that of what they stand for."""
    for node in model.graph.nodes:
        source = node.args[0] if ops.is_dequantize(node) and "val" not in node.meta else None
        if isinstance(source, Node) and source.op != "get_attr" and source.args:
            value = source.args[0].meta.get("val") if isinstance(source.args[0], Node) else None
            if value is not None:
                node.meta["val"] = value


_SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unbind.int,
)


def _split_chunks(model: GraphModule) -> int:
    """Each used part of a chunk, split or unbind as a slice."""
    done = 0
    for node in [n for n in model.graph.nodes if n.op == "call_function" and n.target in _SPLITS]:
        parts, x = node.meta.get("val"), node.args[0]
        axis = ops.arguments(node).get("dim", 0)
        if (
            not isinstance(parts, (list, tuple))
            or not isinstance(axis, int)
            or not isinstance(x.meta.get("val"), torch.Tensor)
        ):
            continue
        unbound = node.target is aten.unbind.int
        sizes = [1 if unbound else p.shape[axis] for p in parts]
        if not all(isinstance(size, int) for size in sizes) or (unbound and not is_static(x)):
            continue
        ends = torch.tensor(sizes).cumsum(0).tolist()
        for user in [u for u in node.users if u.target is operator.getitem]:
            i = user.args[1]
            b = Builder(model, user)
            part = b.call(aten.slice.Tensor, x, axis, ends[i] - sizes[i], ends[i])
            if unbound:
                part = b.call(aten.reshape.default, part, list(parts[i].shape))
            user.replace_all_uses_with(part)
            model.graph.erase_node(user)
            part.name = user.name
        done += 1
    return done
