"""BatchNorm and dropout become modules that know training from evaluation, and are written back at the end."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from torchquant.fx import ops, passes
from torchquant.fx.blocks import SOLVABLE
from torchquant.fx.reading import observer_of
from torchquant.training.fakes import Fake
from torchquant.training.norms import FoldedBias, Folding, TrainedDropout, TrainedNorm, turn_signs

__all__ = [
    "Dropped",
    "fold_now",
    "insert_dropouts",
    "insert_norms",
    "lift_dropouts",
    "remove_attention_dropouts",
    "remove_transparent",
]

aten = torch.ops.aten
_DROPOUTS: dict[str, Any] = {
    "dropout": aten.dropout.default,
    "dropout_": aten.dropout.default,
    "feature_dropout": aten.feature_dropout.default,
    "feature_dropout_": aten.feature_dropout.default,
    "alpha_dropout": aten.alpha_dropout.default,
    "alpha_dropout_": aten.alpha_dropout.default,
}
Dropped = tuple[str, Any, float]  # name of the node in front, function, p


# dropout ----------------------------------------------------------------------------------------------------------


def lift_dropouts(model: GraphModule) -> list[Dropped]:
    """Take out dropouts, which no Quantizer should mind, and say where they were; see `insert_dropouts`."""
    lifted = []
    for node in [n for n in model.graph.nodes if _dropout_of(n) is not None]:
        source, p = node.args[0], float(node.args[1])
        if len(source.users) == 1 or p == 0:
            lifted += [(source.name, _dropout_of(node), p)] if p else []
            node.replace_all_uses_with(source)
            model.graph.erase_node(node)
    model.recompile()
    return lifted


def _dropout_of(node: Node) -> Any:
    return _DROPOUTS.get(ops.overload_of(node).partition(".")[0])


def remove_attention_dropouts(model: GraphModule) -> list[str]:
    """Take out the dropout inside attention, which knows no evaluation; returns remarks, also on other random ops."""
    remarks = []
    for node in [n for n in model.graph.nodes if ops.draws_numbers(n) and _dropout_of(n) is None]:
        p = ops.arguments(node).get("dropout_p")
        if p is None:
            remarks.append(f"{node.name} ({ops.op_name(node)}) draws random numbers in evaluation too")
            continue
        node.args = tuple(0.0 if name == "dropout_p" else node.args[i] for i, name in _names(node))
        node.kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in node.kwargs.items()}
        remarks.append(f"the dropout of {p} inside {node.name} is lost: a graph cannot switch it off in evaluation")
    model.recompile()
    return remarks


def _names(node: Node) -> list[tuple[int, str]]:
    """Position and schema name of each positional argument."""
    schema = ops.schema_of(node)
    assert schema is not None
    return [(i, argument.name) for i, argument in enumerate(schema.arguments[: len(node.args)])]


def insert_dropouts(model: GraphModule, lifted: list[Dropped]) -> list[str]:
    """Put dropouts behind the nodes behind which they were, and for those still in the graph; returns remarks."""
    remarks, named = [], {node.name: node for node in model.graph.nodes}
    for name, function, p in lifted:
        if name not in named:
            remarks.append(f"a dropout of {p} behind {name} is lost: the Quantizer rewrote what it stood behind")
            continue
        _put_behind(model, named[name], TrainedDropout(function, p))
    for node in [n for n in model.graph.nodes if _dropout_of(n) is not None]:
        module = TrainedDropout(_dropout_of(node), float(node.args[1]))
        _put_behind(model, node.args[0], module, only=node)
    model.recompile()
    return remarks


def _put_behind(model: GraphModule, source: Node, module: nn.Module, only: Node | None = None) -> None:
    name = passes.fresh_name(model, f"{source.name}_dropout")
    model.add_submodule(name, module)
    with model.graph.inserting_after(source):
        call = model.graph.call_module(name, (source,))
    call.meta = {key: source.meta[key] for key in ("val", "nn_module_stack") if key in source.meta}
    if only is not None:
        only.replace_all_uses_with(call)
        model.graph.erase_node(only)
    else:
        source.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def remove_transparent(model: GraphModule) -> None:
    """Take out the modules that do nothing in evaluation."""
    for node in [n for n in model.graph.nodes if n.op == "call_module"]:
        if getattr(model.get_submodule(str(node.target)), "is_transparent", False):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            model.delete_submodule(str(node.target))


# BatchNorm --------------------------------------------------------------------------------------------------------


def insert_norms(model: GraphModule) -> list[str]:
    """A `TrainedNorm` for each BatchNorm; returns remarks.

    It is folded at convert behind an op whose weight has a scale for each output channel (or for parts of one), and at
    once where one scale is for several channels: these would have to be trained on folded weights.
    """
    _drop_counters(model)
    reads = Counter(str(n.target) for n in model.graph.nodes if n.op == "get_attr" for _ in n.users)
    remarks = []
    for node in [n for n in model.graph.nodes if ops.overload_of(n) == "batch_norm.default"]:
        _, weight, bias, mean, var, _, momentum, eps, *_ = node.args
        if mean is None or var is None:
            continue
        own = all(n is None or reads[str(n.target)] == 1 for n in (weight, bias, mean, var))
        conv = _convolution_of(model, node, reads) if own else None
        by_output = conv is not None and _has_scale_by_output(model, conv)
        tensors: list[Any] = [None if n is None else _value(model, n) for n in (weight, bias, mean, var)]
        if not momentum:
            remarks.append(
                f"BatchNorm {node.name} has momentum 0, as which export also writes None (an average over all "
                "batches): its running statistics stay in training"
            )
        norm = TrainedNorm(*tensors, momentum=float(momentum), eps=float(eps), folded=by_output)
        if conv is not None and not by_output:
            fold_now(model, conv, norm)
            node.replace_all_uses_with(conv)
            remarks.append(
                f"BatchNorm {node.name} is folded before training: its weight has one scale for several outputs"
            )
        else:
            _replace_norm(model, node, norm, conv)
        model.graph.erase_node(node)
    model.graph.eliminate_dead_code()
    passes.remove_dead_weights(model)
    model.recompile()
    return remarks


def _replace_norm(model: GraphModule, node: Node, norm: TrainedNorm, conv: Node | None) -> None:
    if conv is not None:
        kind, bias = ops.kind_of(conv), _bias_of(model, conv)
        assert kind is not None
        turn_signs(_value(model, conv.args[1].args[0]), bias, norm, kind.axis)  # type: ignore[union-attr, arg-type]
        fake: Any = observer_of(model, conv.args[1])  # type: ignore[arg-type]
        fake.folding = Folding(norm, kind.axis)
        _fold_bias(model, conv, norm)
    name = passes.fresh_name(model, f"{node.name}_norm")
    model.add_submodule(name, norm)
    with model.graph.inserting_before(node):
        call = model.graph.call_module(name, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)


def _fold_bias(model: GraphModule, conv: Node, norm: TrainedNorm) -> None:
    name = passes.fresh_name(model, f"{conv.name}_bias")
    model.add_submodule(name, FoldedBias(norm))
    with model.graph.inserting_before(conv):
        call = model.graph.call_module(name, (ops.argument(conv, 2),))
    conv.args = (*conv.args[:2], call, *conv.args[3:])


def _convolution_of(model: GraphModule, norm: Node, reads: Counter[str]) -> Node | None:
    """The op in front of a BatchNorm into whose quantized weight its factors can go, or None."""
    source = norm.args[0]
    if not isinstance(source, Node) or ops.op_name(source) not in SOLVABLE or len(source.users) != 1:
        return None
    value = source.meta.get("val")
    if ops.op_name(source) == "linear" and not (isinstance(value, torch.Tensor) and value.ndim == 2):
        return None  # its outputs are the last axis, and BatchNorm's channels the second
    observed = ops.argument(source, 1)
    weight = observed.args[0] if observed is not None and observer_of(model, observed) is not None else None
    if not isinstance(weight, Node) or weight.op != "get_attr" or reads[str(weight.target)] != 1:
        return None
    if observed is None or len(observed.users) != 1:
        return None
    groups = ops.arguments(source).get("groups", 1)
    transposed = ops.op_name(source).startswith("conv_transpose")
    bias = _bias_node(source)
    plain = bias is None or (bias.op == "get_attr" and reads[str(bias.target)] == 1)
    return source if plain and not (transposed and groups != 1) else None


def _has_scale_by_output(model: GraphModule, conv: Node) -> bool:
    """Whether no scale of the weight is for two output channels."""
    fake, kind = observer_of(model, conv.args[1]), ops.kind_of(conv)  # type: ignore[arg-type]
    if not isinstance(fake, Fake) or not fake.has_grid or kind is None:
        return False
    shape = _value(model, conv.args[1].args[0]).shape  # type: ignore[union-attr, arg-type]
    grid = fake.grid_over(shape) if not fake.is_waiting else None
    return grid is not None and grid.block[kind.axis] == 1


def _bias_node(conv: Node) -> Node | None:
    """What holds the bias of an op, behind the observer of a derived spec or not."""
    bias = ops.argument(conv, 2)
    return bias.args[0] if bias is not None and bias.op == "call_module" else bias  # type: ignore[return-value]


def _bias_of(model: GraphModule, conv: Node) -> Any:
    node = _bias_node(conv)
    return None if node is None else _value(model, node)


@torch.no_grad()
def fold_now(model: GraphModule, conv: Node, norm: TrainedNorm) -> torch.Tensor:
    """Multiply a norm into the weight and bias of the op in front of it; returns the factor (channels,)."""
    folded = ops.argument(conv, 2)
    is_call = folded is not None and folded.op == "call_module"
    if is_call and isinstance(model.get_submodule(str(folded.target)), FoldedBias):  # type: ignore[union-attr]
        conv.update_arg(2, folded.args[0])  # type: ignore[union-attr]
        model.graph.erase_node(folded)  # type: ignore[arg-type]
        model.delete_submodule(str(folded.target))  # type: ignore[union-attr]
    kind, node = ops.kind_of(conv), _bias_node(conv)
    assert kind is not None
    weight = _value(model, conv.args[1].args[0])  # type: ignore[union-attr, arg-type]
    factor, offset = norm.factors()
    weight.mul_(factor.reshape([-1 if i == kind.axis else 1 for i in range(weight.ndim)]))
    if node is not None:
        _value(model, node).mul_(factor).add_(offset)
        return factor
    name = passes.fresh_name(model, f"{conv.name}_folded_bias")
    model.register_parameter(name, nn.Parameter(offset.clone()))
    with model.graph.inserting_before(conv):
        bias = model.graph.get_attr(name)
    bias.meta["val"] = offset
    conv.args = (*conv.args[:2], bias, *conv.args[3:])
    return factor


def _drop_counters(model: GraphModule) -> None:
    """`num_batches_tracked += 1` of a graph exported in training mode."""
    for node in [n for n in model.graph.nodes if n.op == "get_attr" and str(n.target).endswith("num_batches_tracked")]:
        readers = [user for user in node.users if ops.op_name(user) in ("add", "copy_")]
        behind = [last for user in readers for last in user.users]
        for last in dict.fromkeys([*behind, *readers, node]):
            if not last.users:
                model.graph.erase_node(last)


def _value(model: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(model)
