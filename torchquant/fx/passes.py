"""Rewrites that keep the float function: regions inlined, forms normalized, dead weights removed."""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.files.shelf import is_shelved
from torchquant.fx import ops
from torchquant.fx.reading import is_observer, observers

aten = torch.ops.aten
_LARGEST_ROTATION = 1024


def inline_regions(model: GraphModule) -> bool:
    """Inline the subgraphs that `torch.no_grad()` and `torch.autocast(enabled=False)` inside a forward leave behind.

    No Quantizer looks into them, so such a model would be left float without a word (executorch#22069). A region in
    which autocast is on computes something else than its ops say, and stays.
    Returns whether there were any; works in place.
    """
    regions = [(n, body) for n in model.graph.nodes if (body := _body_of(n)) is not None]
    for node, position in regions:
        _inline(model, node, body=node.args[position], arguments=node.args[position + 1 :])
    if regions:
        model.delete_all_unused_submodules()
        inline_regions(model)  # regions nest
        model.graph.lint()
        model.recompile()
    return bool(regions)


def _body_of(node: Node) -> int | None:
    """The position among a node's arguments of a subgraph that may be inlined, or None."""
    higher_order = torch.ops.higher_order
    if node.op != "call_function":
        return None
    if node.target is higher_order.wrap_with_set_grad_enabled:
        return 1
    is_off = node.target is higher_order.wrap_with_autocast and node.args[2] is False
    return 4 if is_off else None


def _inline(model: GraphModule, node: Node, body: Node, arguments: tuple[Node, ...]) -> None:
    inner: Any = model.get_submodule(str(body.target))
    values = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], arguments, strict=True))
    with model.graph.inserting_before(node):
        for inner_node in inner.graph.nodes:
            if inner_node.op == "placeholder":
                continue
            if inner_node.op == "output":
                results = inner_node.args[0]
                break
            values[inner_node] = copy = model.graph.node_copy(inner_node, lambda n: values[n])
            if inner_node.op == "get_attr":
                copy.target = f"{body.target}.{inner_node.target}"
            _refresh(copy)
    for user in list(node.users):
        if user.target is operator.getitem:
            result = values[results[user.args[1]]]
            result.meta.setdefault("nn_module_stack", user.meta.get("nn_module_stack", {}))
            user.replace_all_uses_with(result)
            model.graph.erase_node(user)
    if not node.users:
        model.graph.erase_node(node)
        if not body.users:
            model.graph.erase_node(body)


def _refresh(node: Node) -> None:
    """Give a node the fake value that it has here, so that views share memory with what they are views of."""
    inputs = [n.meta.get("val") for n in node.all_input_nodes]
    mode: Any = next((getattr(v, "fake_mode", None) for v in inputs if hasattr(v, "fake_mode")), None)
    if ops.is_op(node) and mode is not None and all(v is not None for v in inputs):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def constant_matmul_to_linear(model: GraphModule) -> int:
    """Rewrite `mm(x, W)`, `matmul(x, W)` and `addmm(b, x, W)` with a constant 2-D `W` as `linear(x, Wt, b)`.

    So one pattern covers projections that were not written as nn.Linear (GPT-2's Conv1D). Hadamard rotations, which
    nobody wants rounded, stay products. Returns how many.
    """
    rewritten = 0
    for node in list(model.graph.nodes):
        parts = _projection(node)
        if parts is None:
            continue
        x, weight, bias = parts
        if is_rotation(model, node):
            continue
        value = ops.constant_value(model, weight)
        name = fresh_name(
            model, f"{str(weight.target).replace('.', '_') if weight.op == 'get_attr' else weight.name}_t"
        )
        model.register_parameter(name, torch.nn.Parameter(value.t().contiguous(), requires_grad=False))
        with model.graph.inserting_before(node):
            transposed = model.graph.get_attr(name)
            transposed.meta["val"] = weight.meta["val"].t()
            is_vector = bias is not None and len(ops.shape_of(bias) or ()) == 1
            args = (x, transposed, bias) if is_vector else (x, transposed)
            linear = model.graph.call_function(aten.linear.default, args)
            linear.meta = dict(node.meta)
            result = linear
            if bias is not None and not is_vector:  # a linear takes one number for each output
                result = model.graph.call_function(aten.add.Tensor, (linear, bias))
                result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        model.graph.erase_node(node)
        rewritten += 1
    if rewritten:
        model.graph.eliminate_dead_code()
        model.recompile()
    return rewritten


def is_rotation(model: GraphModule, node: Node) -> bool:
    """Whether a node is a product with a constant Hadamard matrix."""
    parts = _projection(node)
    return parts is not None and parts[2] is None and _is_hadamard(ops.constant_value(model, parts[1]))


def _is_hadamard(value: torch.Tensor) -> bool:
    """Whether a matrix is orthogonal but for a factor, and all its entries are zero or of one magnitude."""
    if value.ndim != 2 or value.shape[0] != value.shape[1] or not 2 <= len(value) <= _LARGEST_ROTATION:
        return False
    most, matrix = value.abs().max(), value.float()
    if not bool(((value.abs() == most) | (value == 0)).all()) or int((value != 0).sum()) < 2 * len(value):
        return False
    product = matrix @ matrix.T
    return bool(torch.allclose(product, torch.eye(len(value), device=value.device) * product[0, 0], atol=1e-5))


def _projection(node: Node) -> tuple[Node, Node, Node | None] | None:
    if node.op != "call_function":
        return None
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight, bias = ops.argument(node, 0), ops.argument(node, 1), None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = (ops.argument(node, p) for p in (0, 1, 2))
        if bias is None or not ops.is_constant(bias):
            return None
    else:
        return None
    if x is None or weight is None or not ops.is_constant(weight) or len(ops.shape_of(weight) or ()) != 2:
        return None
    return None if ops.is_constant(x) else (x, weight, bias)


def fresh_name(model: GraphModule, name: str) -> str:
    """`name`, with underscores appended until no attribute has it."""
    taken = {n.target for n in model.graph.nodes if n.op == "get_attr"}
    while name in taken or hasattr(model, name):
        name += "_"
    return name


def add_buffer(model: GraphModule, name: str, value: torch.Tensor) -> Node:
    """A node that reads `value`, kept under `name` or one like it; put where the graph inserts now."""
    name = fresh_name(model, name.replace(".", "_"))
    model.register_buffer(name, value)
    node = model.graph.get_attr(name)
    node.meta["val"] = value
    return node


def put_in_place(model: GraphModule, node: Node, by: Node) -> None:
    """Put what an observer converts to in the observer's place; it takes the notes over, not the value."""
    by.meta = {k: v for k, v in node.meta.items() if k != "val"}
    node.replace_all_uses_with(by)
    model.graph.erase_node(node)


def remove_dead_weights(model: GraphModule) -> int:
    """Delete parameters and buffers that no node reads any more; returns their bytes.

    `convert_pt2e` leaves the float weights beside the integer ones it folded.
    """
    used = {str(n.target) for n in model.graph.nodes if n.op == "get_attr"}
    used_modules = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    live = {id(operator.attrgetter(name)(model)) for name in used}
    freed = 0
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in tensors:
        if name in used or any(name == m or name.startswith(m + ".") for m in used | used_modules):
            continue
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
        freed += 0 if id(value) in live else value.numel() * value.element_size()
    _drop_unused_observers(model, used_modules)
    return freed


def _drop_unused_observers(model: GraphModule, used_modules: set[str]) -> None:
    for name, module in list(model.named_children()):
        if is_observer(module) and name not in used_modules:
            delattr(model, name)


def _batch_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
    return aten.batch_norm.default(*args, **kwargs)


def hide_batch_norms(model: GraphModule) -> None:
    """Keep `convert_pt2e` from looking for convolutions that were trained with a BatchNorm behind them.

    In a graph with any BatchNorm it exports a hundred patterns, which takes half a minute, even where nothing was
    trained. Does nothing to a graph with fake quantizers. `show_batch_norms` is the way back.
    """
    if not any(isinstance(module, FakeQuantizeBase) for _, module in observers(model)):
        _retarget(model, aten.batch_norm.default, _batch_norm)


def show_batch_norms(model: GraphModule) -> None:
    """Undo `hide_batch_norms`."""
    _retarget(model, _batch_norm, aten.batch_norm.default)


def _retarget(model: GraphModule, old: Any, new: Any) -> None:
    for node in model.graph.nodes:
        if node.target is old:
            node.target = new
    model.recompile()


def fill_expanded_numbers(model: GraphModule) -> int:
    """Rewrite every constant without axes that is written into a tensor, as by `x[:, :4] = 0` and `x[0] = 0`.

    Inductor takes the constant for a number, and then fails at ops that want a tensor.
    """
    done = replace_each(model, _is_expanded_number, _filled)
    for node in [n for n in model.graph.nodes if n.target is aten.select_scatter.default]:
        source = node.args[1]
        if ops.shape_of(source) == () and ops.is_constant(source):
            with model.graph.inserting_before(node):
                node.update_arg(1, _number(model, source, []))
            done += 1
    return finished(model, done)


def _is_expanded_number(node: Node) -> bool:
    source = node.args[0] if node.target is aten.expand.default else None
    return isinstance(source, Node) and ops.shape_of(source) == () and ops.is_constant(source)


def _filled(model: GraphModule, node: Node) -> Node:
    assert isinstance(node.args[0], Node)
    return _number(model, node.args[0], node.args[1])


def _number(model: GraphModule, constant: Node, shape: Any) -> Node:
    """A tensor filled with the value of a constant without axes."""
    value = ops.constant_value(model, constant)
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return model.graph.call_function(aten.full.default, (shape, value.item()), options)


def weight_bytes(model: GraphModule) -> int:
    """Bytes of the tensors that the graph reads, each storage once."""
    names = {str(n.target) for n in model.graph.nodes if n.op == "get_attr"}
    tensors = {id(t): t for t in (operator.attrgetter(n)(model) for n in names) if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def replace_each(
    model: GraphModule, matches: Callable[[Node], bool], rewrite: Callable[[GraphModule, Node], Node | None]
) -> int:
    """Replace every node that `matches` by what `rewrite` builds in front of it (None: leave it); returns how many."""
    done = 0
    for node in list(model.graph.nodes):
        if not matches(node):
            continue
        with model.graph.inserting_before(node):
            replacement = rewrite(model, node)
        if replacement is not None:
            replacement.meta = {**node.meta, **replacement.meta}
            node.replace_all_uses_with(replacement)
            model.graph.erase_node(node)
            done += 1
    return finished(model, done)


def finished(model: GraphModule, done: int) -> int:
    """Tidy a graph in which `done` places changed; returns `done`."""
    if done:
        model.graph.eliminate_dead_code()
        model.graph.lint()
        model.recompile()
    return done


def copy_graph(model: GraphModule) -> GraphModule:
    """A copy whose graph, module tree and observers may be changed, with state of its own.

    The tensors that the graph reads are shared, those that it writes are not.
    """
    attributes = list(model.graph.find_nodes(op="get_attr"))
    written = {n.target for n in attributes if ops.is_overwritten(n)}
    read = [operator.attrgetter(str(n.target))(model) for n in attributes if n.target not in written]
    memo = {id(t): t for t in [*model.parameters(), *read, *_on_shelf(model)] if isinstance(t, torch.Tensor)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree, when it is copied
        twin = copy.deepcopy(model, memo)
    twins = dict(zip(model.graph.nodes, twin.graph.nodes, strict=True))
    for node in twin.graph.nodes:
        if (annotation := node.meta.get(Q_ANNOTATION_KEY)) is not None:
            node.meta[Q_ANNOTATION_KEY] = _with_nodes(annotation, twins)
    return twin


def _on_shelf(model: GraphModule) -> Iterator[torch.Tensor]:
    """What the observers keep on disk, which nobody changes."""
    for _, observer in observers(model):
        for module in observer.modules():
            grid = vars(module).get("grid")
            held = {**vars(module), **module._buffers, **(vars(grid) if hasattr(grid, "__dict__") else {})}
            yield from filter(is_shelved, held.values())


def _with_nodes(annotation: Any, twins: dict[Node, Node]) -> Any:
    """A Quantizer's annotation that names the nodes of a copied graph."""

    def place(edge_or_node: Any) -> Any:
        if isinstance(edge_or_node, Node):
            return twins.get(edge_or_node, edge_or_node)
        return tuple(twins.get(n, n) for n in edge_or_node)

    def spec(of: Any) -> Any:
        if isinstance(of, SharedQuantizationSpec):
            return SharedQuantizationSpec(place(of.edge_or_node))
        if isinstance(of, DerivedQuantizationSpec):
            return dataclasses.replace(of, derived_from=[place(p) for p in of.derived_from])
        return of

    twin = copy.copy(annotation)
    twin.input_qspec_map = {twins.get(n, n): spec(s) for n, s in annotation.input_qspec_map.items()}
    twin.output_qspec = spec(annotation.output_qspec)
    return twin


def static_observers(model: GraphModule) -> Iterator[tuple[Node, torch.nn.Module]]:
    """The observer nodes whose range must come from data."""
    for node, observer in observers(model):
        inner = getattr(observer, "activation_post_process", observer)
        if not getattr(inner, "is_dynamic", False):
            yield node, inner


def make_float(model: GraphModule, names: set[str]) -> None:
    """Run the named ops on what stands behind their dequantize ops: float activations and decoded weights."""
    for node in [n for n in model.graph.nodes if n.name in names]:
        for source in node.all_input_nodes:
            if not ops.is_dequantize(source):
                continue
            if ops.is_constant(source):
                name = fresh_name(model, f"{source.name}_decoded")
                model.register_buffer(name, ops.constant_value(model, source))
                with model.graph.inserting_before(node):
                    replacement = model.graph.get_attr(name)
            else:
                quantize = source.args[0]
                if not isinstance(quantize, Node) or not isinstance(quantize.args[0], Node):
                    continue
                replacement = quantize.args[0]
            node.replace_input_with(source, replacement)
    model.graph.eliminate_dead_code()
    model.recompile()
    remove_dead_weights(model)


def unshare_weights(model: GraphModule) -> int:
    """Give every conv and linear that is called more than once its own weight codes and bias; returns how many.

    Inductor's int8 patterns want a dequantize op with one user, and XNNPACK stores a bias in units of one user's
    input scale.
    """
    done, seen = 0, set()
    for node in list(model.graph.nodes):
        kind = ops.kind_of(node)
        if kind is None or kind.weight is None or not kind.compute:
            continue
        for position in (kind.weight, kind.weight + 1):
            source = ops.argument(node, position)
            stored = source.args[0] if source is not None and ops.is_dequantize(source) else source
            if source is None or not isinstance(stored, Node) or stored.op != "get_attr":
                continue
            if stored.target in seen:
                node.update_arg(position, _own_copy(model, node, source, stored))
                done += 1
            seen.add(stored.target)
    return finished(model, done)


def _own_copy(model: GraphModule, node: Node, source: Node, stored: Node) -> Node:
    name = fresh_name(model, f"{stored.target}_of_{node.name}".replace(".", "_"))
    model.register_buffer(name, ops.constant_value(model, stored).clone())
    with model.graph.inserting_before(node):
        copied = model.graph.get_attr(name)
        copied.meta = dict(stored.meta)
        if source is stored:
            return copied
        return model.graph.node_copy(source, lambda n: copied if n is stored else n)
