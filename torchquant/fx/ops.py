"""What an aten op computes: one table for every Quantizer, report and backend. Matching is on ops, never classes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class OpKind:
    """A family of aten ops that compute the same thing.

    Args:
        name: the name used in tables, patterns (`op:NAME`) and reports.
        overloads: aten overload names, e.g. `conv2d.default`.
        compute: multiplies matrices or looks up weights; left float, it must be accounted for one by one.
        data: positions of the float activations among the arguments; None: all of them.
        moves: only moves data, so that values and qparams stay the same.
        weight: position of the weight, and `axis` its output-channel axis.
        layers: position of a list of the parameters of several layers, see `weights_of`.
    """

    name: str
    overloads: tuple[str, ...]
    compute: bool = False
    data: tuple[int, ...] | None = (0,)
    moves: bool = False
    weight: int | None = None
    axis: int = 0
    layers: int | None = None

    @property
    def weighted(self) -> bool:
        return self.weight is not None or self.layers is not None


KINDS: tuple[OpKind, ...] = (
    OpKind("conv1d", ("conv1d.default", "conv1d.padding"), True, weight=1),
    OpKind("conv2d", ("conv2d.default", "conv2d.padding"), True, weight=1),
    OpKind("conv3d", ("conv3d.default", "conv3d.padding"), True, weight=1),
    OpKind("conv_transpose1d", ("conv_transpose1d.default",), True, weight=1, axis=1),
    OpKind("conv_transpose2d", ("conv_transpose2d.input",), True, weight=1, axis=1),
    OpKind("conv_transpose3d", ("conv_transpose3d.input",), True, weight=1, axis=1),
    OpKind("linear", ("linear.default",), True, weight=1),
    OpKind("matmul", ("matmul.default", "bmm.default", "mm.default"), True, data=(0, 1)),
    OpKind("addmm", ("addmm.default", "baddbmm.default"), True, data=(1, 2)),
    OpKind("einsum", ("einsum.default",), True, data=None),
    OpKind("attention", ("scaled_dot_product_attention.default",), True, data=(0, 1, 2)),
    OpKind(
        "embedding",
        ("embedding.default", "embedding_bag.default", "embedding_bag.padding_idx"),
        True,
        data=(),
        weight=0,
    ),
    OpKind("bilinear", ("bilinear.default",), True, data=(0, 1), weight=2),
    OpKind("recurrent", ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input"), True, layers=2),
    OpKind(
        "recurrent_cell",
        ("lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default"),
        True,
        data=(),
    ),
    OpKind("add", ("add.Tensor", "add_.Tensor"), data=(0, 1)),
    OpKind("sub", ("sub.Tensor", "sub_.Tensor"), data=(0, 1)),
    OpKind("mul", ("mul.Tensor", "mul_.Tensor"), data=(0, 1)),
    OpKind("div", ("div.Tensor", "div_.Tensor"), data=(0, 1)),
    OpKind("cat", ("cat.default", "concat.default", "stack.default"), data=None),
    OpKind("max_pool2d", ("max_pool2d.default", "max_pool2d_with_indices.default")),
    OpKind("avg_pool", ("avg_pool2d.default", "avg_pool1d.default", "avg_pool3d.default")),
    OpKind("adaptive_avg_pool2d", ("adaptive_avg_pool2d.default",)),
    OpKind("mean", ("mean.dim", "mean.default")),
    OpKind("pad", ("pad.default", "constant_pad_nd.default")),
    OpKind("relu", ("relu.default", "relu_.default")),
    OpKind(
        "hardtanh",
        ("hardtanh.default", "hardtanh_.default", "relu6.default", "relu6_.default", "clamp.default", "clamp_.default"),
    ),
    OpKind("gelu", ("gelu.default",)),
    OpKind("silu", ("silu.default", "silu_.default")),
    OpKind("sigmoid", ("sigmoid.default", "sigmoid_.default")),
    OpKind("tanh", ("tanh.default", "tanh_.default")),
    OpKind("hardswish", ("hardswish.default", "hardswish_.default")),
    OpKind("hardsigmoid", ("hardsigmoid.default", "hardsigmoid_.default")),
    OpKind("leaky_relu", ("leaky_relu.default", "leaky_relu_.default")),
    OpKind("elu", ("elu.default", "elu_.default")),
    OpKind("prelu", ("prelu.default",)),
    OpKind("softmax", ("softmax.int", "_softmax.default", "log_softmax.int")),
    OpKind("layer_norm", ("layer_norm.default", "native_layer_norm.default", "rms_norm.default")),
    OpKind("group_norm", ("group_norm.default", "instance_norm.default")),
    OpKind(
        "batch_norm", ("batch_norm.default", "_native_batch_norm_legit_no_training.default", "cudnn_batch_norm.default")
    ),
    OpKind(
        "interpolate",
        (
            "upsample_nearest2d.vec",
            "upsample_bilinear2d.vec",
            "upsample_nearest2d.default",
            "upsample_bilinear2d.default",
        ),
    ),
    OpKind(
        "reshape",
        (
            "view.default",
            "reshape.default",
            "flatten.using_ints",
            "unsqueeze.default",
            "squeeze.dim",
            "squeeze.dims",
            "squeeze.default",
            "permute.default",
            "transpose.int",
            "t.default",
            "contiguous.default",
            "unflatten.int",
            "expand.default",
            "clone.default",
            "alias.default",
            "movedim.int",
            "numpy_T.default",
            "detach.default",
            "dropout.default",
            "pixel_shuffle.default",
            "channel_shuffle.default",
        ),
        moves=True,
    ),
    OpKind(
        "slice",
        ("slice.Tensor", "select.int", "chunk.default", "split.Tensor", "split_with_sizes.default", "narrow.default"),
        moves=True,
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}
_BY_OVERLOAD = {overload: kind for kind in KINDS for overload in kind.overloads}
_CONVOLUTIONS = {(dim, bool(t)): f"conv{'_transpose' if t else ''}{dim}d" for dim in (1, 2, 3) for t in (0, 1)}


def overload_of(node: Node) -> str:
    """The aten overload that a node calls, e.g. `conv2d.default`; empty for everything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return f"{target._schema.name.removeprefix('aten::')}.{target._overloadname}"


def kind_of(node: Node) -> OpKind | None:
    """The op kind of a node, or None if the table has no entry for it (`aten.convolution` by rank)."""
    name, target = overload_of(node), node.target
    if not name:
        return None
    if target is torch.ops.aten.convolution.default:
        dims = len(node.args[3])  # type: ignore[arg-type]
        return BY_NAME.get(_CONVOLUTIONS.get((dims, bool(node.args[6])), ""))
    return _BY_OVERLOAD.get(name)


def is_op(node: Node) -> bool:
    """Whether the node calls an operator (not a getter, an observer, or a higher-order op)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_higher_order(node: Node) -> bool:
    """Whether the node calls an op that runs graphs of its own (`cond`, a region of autocast)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def body_of(read: Node) -> GraphModule | None:
    """The graph that a node reads for a higher-order op to run, if that is what it reads."""
    value: Any = operator.attrgetter(str(read.target))(read.graph.owning_module) if read.op == "get_attr" else None
    return value if isinstance(value, GraphModule) else None


def op_name(node: Node) -> str:
    """The op kind's name, or the bare op name for an op outside the table; what else a node is if it calls no op."""
    kind = kind_of(node)
    if kind is not None:
        return kind.name
    if node.op != "call_function":
        return node.op  # a buffer or an input may be named like an op
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)


def schema_of(node: Node) -> torch.FunctionSchema | None:
    """The schema of the operator that a node calls, by overload or by packet (as torchao calls its affine ops)."""
    target = node.target
    if node.op != "call_function":
        return None
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by schema name; those left out are missing."""
    schema = schema_of(node)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def draws_numbers(node: Node) -> bool:
    """Whether a node gives other random numbers in each call; dropout in evaluation does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    values = {a.name: a.default_value for a in target._schema.arguments} | arguments(node)
    switches = [values[name] for name in ("train", "training") if name in values]
    chances = [values[name] for name in ("p", "dropout_p", "dropout") if name in values]
    return False not in switches and 0 not in chances


def written(node: Node) -> list[Node]:
    """The arguments that an operator call writes into."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable:
        return []
    operands = arguments(node)
    values = [operands.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [n for n in pytree.tree_leaves(values) if isinstance(n, Node)]


def qdq_name(node: Node) -> str:
    """The name of an op that quantizes, dequantizes or chooses qparams, in any dialect; else empty."""
    schema = schema_of(node)
    namespace, _, name = schema.name.partition("::") if schema is not None else ("", "", "")
    return name if namespace in ("quantized_decomposed", "torchao", "torchquant") else ""


def is_dequantize(node: Node) -> bool:
    return qdq_name(node).startswith("dequantize")


def has_own_scale(node: Node) -> bool:
    """Whether the node quantizes or dequantizes by a scale that is found at run time."""
    scale = arguments(node).get("scale", arguments(node).get("scales")) if qdq_name(node) else None
    return isinstance(scale, Node) and scale.target is operator.getitem


def is_quantize(node: Node) -> bool:
    return qdq_name(node).startswith("quantize")


def is_part(node: Node) -> bool:
    """Whether a node reads one of the tensors that a tensor subclass is made of (see `torchquant.fx.subclasses`)."""
    return node.op == "call_function" and str(node.target) == "export.access_subclass_inner_tensor.default"


def argument(node: Node, position: int) -> Node | None:
    """The node at `position` of the arguments, or None if there is none or it is a literal."""
    value = node.args[position] if position < len(node.args) else None
    return value if isinstance(value, Node) else None


def weights_of(node: Node, kind: OpKind) -> list[Node]:
    """The weights that an op multiplies by: one, or of each layer and direction those of its input and its state."""
    if kind.layers is not None:
        biases = 2 * bool(arguments(node)["has_biases"])
        return [p for own in layer_parameters(node) for p in (*own[:2], *own[2 + biases :])]
    weight = argument(node, kind.weight) if kind.weight is not None else None
    return [] if weight is None else [weight]


def layer_parameters(node: Node) -> list[list[Node]]:
    """Of each layer and direction of a recurrent op: both weights, both biases or none, a projection's weight."""
    operands = arguments(node)
    parameters, count = operands["params"], operands["num_layers"] * (1 + bool(operands["bidirectional"]))
    each = len(parameters) // count
    return [list(parameters[i * each : (i + 1) * each]) for i in range(count)]


def data_inputs(node: Node, kind: OpKind) -> list[Node]:
    """The nodes that feed the op's activations, in order, lists (as of `cat`) flattened."""
    if kind.data is not None:
        return [arg for p in kind.data if (arg := argument(node, p)) is not None]
    return [n for n in node.all_input_nodes if is_float(n)]


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def measured_nodes(model: GraphModule) -> list[Node]:
    """The float tensors to compare: float outputs, and for an integer output the floats that it is computed from."""
    output = next(n for n in model.graph.nodes if n.op == "output")
    measured: dict[Node, None] = {}
    for node in output.all_input_nodes:
        for source in [node] if is_float(node) or "val" not in node.meta else float_sources(node)[0]:
            measured[source] = None
    return list(measured)


def float_sources(node: Node) -> tuple[list[Node], list[Node]]:
    """The computed float tensors nearest to a node that holds none, and the nodes between, the node itself first."""
    sources: dict[Node, None] = {}
    between, stack = {node: None}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.op in ("placeholder", "get_attr"):
                continue
            if is_float(source) or "val" not in source.meta:  # observers and dequantize ops carry none
                sources[source] = None
            elif source not in between:
                between[source] = None
                stack.append(source)
    return list(sources), list(between)


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a node's tensor value, or None."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def is_constant(node: Node) -> bool:
    """Whether the value comes from parameters and buffers alone (`get_attr`, possibly through pure ops).

    A buffer that the graph writes is none: it is state.
    """
    known: dict[Node, bool] = {}
    stack = [node]
    while stack:
        at = stack[-1]
        if at in known:
            stack.pop()
            continue
        inputs = at.all_input_nodes
        if at.op == "get_attr":
            known[at] = not is_overwritten(at)
        elif at.op != "call_function" or not inputs or any(not known.get(n, True) for n in inputs):
            known[at] = False
        elif unknown := [n for n in inputs if n not in known]:
            stack += unknown[:1]
        else:
            known[at] = True
    return known[node]


def is_overwritten(node: Node) -> bool:
    """Whether an op of the graph writes into the node's memory, through views or not."""
    return any(node in written(user) or (_views(user) and is_overwritten(user)) for user in node.users)


def _views(node: Node) -> bool:
    """Whether an op may return its first argument's memory."""
    schema = schema_of(node)
    if node.target is operator.getitem:
        return True
    alias = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
    return alias is not None and not alias.is_write


def constant_value(model: GraphModule, node: Node) -> torch.Tensor:
    """The value of a node that depends on parameters and buffers alone (see `is_constant`)."""
    values: dict[Node, Any] = {}
    stack = [node]
    while stack:
        at = stack[-1]
        missing = [n for n in at.all_input_nodes if n not in values]
        if missing:
            stack += missing
            continue
        stack.pop()
        if at.op == "get_attr":
            values[at] = operator.attrgetter(str(at.target))(model).detach()
            continue
        target: Any = at.target
        inputs: Any = torch.fx.node.map_arg((at.args, at.kwargs), values.__getitem__)
        with torch.no_grad():
            values[at] = target(*inputs[0], **inputs[1])
    constant: torch.Tensor = values[node]
    return constant


def module_path(node: Node) -> str:
    """Dotted path of the module whose forward called the op; empty for the root module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for prefix in ("L['self'].", "L['self']"):
        path = path.removeprefix(prefix)
    return path
