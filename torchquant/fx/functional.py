"""Writes in place, through views or not, as values: `x[:, :4] = y` becomes `x = slice_scatter(x, y, 1, 0, 4)`.

PT2E puts a quantize and a dequantize op, which copy, between a tensor and its readers: whoever reads the copy does not
see what is written into the tensor later. A graph without writes has no such order to lose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.errors import ExportError
from torchquant.fx import ops
from torchquant.fx.memory import memory_of, name_of, source_of

__all__ = ["functionalize", "where", "writes_in_place"]

aten = torch.ops.aten
_KEPT_META = ("nn_module_stack", "stack_trace", "custom", "source_fn_stack")
_GEOMETRY = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_")  # write no value
_RESIZING = ("resize_", "resize_as_", "set_")  # make another memory of it


def writes_in_place(model: GraphModule) -> bool:
    """Whether any op of the graph writes into a tensor."""
    return any(ops.written(node) for node in model.graph.nodes)


def functionalize(model: GraphModule) -> int:
    """Rewrite every write in place as a value; changes the graph, whose function stays the same.

    What a buffer or an input holds at the end is copied into it by the last ops of the graph. Ops of other namespaces
    than torch's own stay as they are.

    Returns:
        How many writes there were.

    Raises:
        ExportError: an op that writes has no form without the write, or writes through a view of an unknown kind.
    """
    if _is_functional(model):
        return 0
    _merge_reads(model)
    done = _Functionalized(model).run()
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return done


def _is_functional(model: GraphModule) -> bool:
    """Whether all writes are those at the end that `functionalize` leaves, so that the graph stays the very same."""
    place = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in place:
        for target in _written_by_aten(node):
            kept = node.target is aten.copy_.default and target.op in ("get_attr", "placeholder") and not node.users
            if not kept or any(place[user] > place[node] for user in target.users):
                return False
    return True


def _merge_reads(model: GraphModule) -> None:
    """One node for each attribute that the graph reads: each write must be seen by all readers."""
    first: dict[str, Node] = {}
    for node in [n for n in model.graph.nodes if n.op == "get_attr"]:
        known = first.setdefault(str(node.target), node)
        if known is not node:
            node.replace_all_uses_with(known)
            model.graph.erase_node(node)
    _refuse_shared_memory(model, first)


def _refuse_shared_memory(model: GraphModule, reads: dict[str, Node]) -> None:
    """Raise ExportError if an attribute is written whose memory has another name: a write must be seen under both."""
    names: dict[int, list[str]] = {}
    for name in reads:
        value: Any = operator.attrgetter(name)(model)
        if isinstance(value, torch.Tensor) and value.numel():
            names.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(ops.is_overwritten(reads[name]) for name in shared):
            raise ExportError(
                f"{' and '.join(shared)} share their memory, and the model writes into it: give each its own "
                "(`.clone()`), or use one name in the model's forward"
            )


class _Functionalized:
    """One walk over the graph, in which every node that shares memory knows whose memory it shares and how old it is.

    The keys of these tables are nodes of the original graph; the values of `now` may be new nodes.
    """

    def __init__(self, model: GraphModule) -> None:
        self.model, self.graph = model, model.graph
        self.parent: dict[Node, Node] = {}  # what a node is a view of
        self.arguments: dict[Node, tuple[Any, Any]] = {}  # of a view
        self.now: dict[Node, Node] = {}  # the node that holds the present value
        self.age: dict[Node, int] = {}  # writes into the memory that this value has seen
        self.writes: dict[Node, int] = {}  # root of the memory -> writes so far
        self.at: Node = next(iter(model.graph.nodes))

    def run(self) -> int:
        writers: list[Node] = []
        sources = {node: source_of(node) for node in self.graph.nodes}
        for node, source in sources.items():
            self.at = node
            if node.op == "output":
                self._keep()
            targets, call_arguments = _written_by_aten(node), (node.args, node.kwargs)
            node.args, node.kwargs = (torch.fx.node.map_arg(a, self.current) for a in call_arguments)
            if name_of(node) in _GEOMETRY:
                _rename(node)
            elif targets:
                self._write(node, targets)
                writers.append(node)
                continue
            self.now[node] = node
            if source is not None:
                self.parent[node], self.arguments[node] = source, call_arguments
            self.age[node] = self.writes.get(self.root(node), 0)
        for node in reversed(writers):
            self.graph.erase_node(node)
        return len(writers)

    # reading -----------------------------------------------------------------------------------------------------

    def root(self, node: Node) -> Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def current(self, node: Node) -> Node:
        """The node that holds the value that a read of `node` sees at this place."""
        writes = self.writes.get(self.root(node), 0)
        if self.age[node] != writes:  # something was written since: look at the memory again
            self.now[node] = self._again(node, self.current(self.parent[node]))
            self.age[node] = writes
        return self.now[node]

    def _again(self, view: Node, source: Node) -> Node:
        if view not in self.arguments:  # the result of a write, which is what was written into
            return source
        parent = self.parent[view]
        _check_strided(view)
        args, kwargs = torch.fx.node.map_arg(self.arguments[view], lambda n: source if n is parent else self.current(n))
        return self.call(view.target, *args, like=view, **kwargs)

    # writing -----------------------------------------------------------------------------------------------------

    def _write(self, node: Node, targets: list[Node]) -> None:
        """Put the value of the op without its write into every view and into the memory itself."""
        if len(targets) != 1:
            raise ExportError(f"{where(node)} writes into {len(targets)} tensors at once; write it without the write")
        target = targets[0]
        self._assign(target, self._shaped(self._value(node), self.current(target)))
        self.parent[node], self.now[node] = target, self.now[target]
        self.age[node] = self.age[target]

    def _value(self, node: Node) -> Any:
        """What the op writes."""
        name, arguments = name_of(node), ops.arguments(node)
        if name == "copy_":
            return arguments["src"]
        if name in ("fill_", "zero_"):
            return arguments.get("value", 0)
        overload, kwargs = _without_write(node.target), {k: v for k, v in node.kwargs.items() if k != "out"}
        if overload is None or name in _RESIZING:
            raise ExportError(
                f"{where(node)} writes in place, and has no form without the write; use one in the model's forward"
            )
        return self.call(overload, *node.args, like=node, **kwargs)

    def _shaped(self, value: Any, held: Node) -> Node:
        """`value` with the dtype and shape of the tensor that it is written into."""
        wanted = self._fake(held)
        if not isinstance(value, Node):
            return self.call(aten.full_like.default, held, value)
        fake = self._fake(value)
        if fake.dtype != wanted.dtype or fake.device != wanted.device:
            value = self.call(aten._to_copy.default, value, dtype=wanted.dtype, device=wanted.device)
        return value if _same_shape(fake, wanted) else self.call(aten.expand.default, value, self.sizes(held))

    def _assign(self, view: Node, value: Node) -> None:
        """`value` stands in `view` now: put it into what that is a view of, up to the memory."""
        chain = [(view, value)]
        while chain[-1][0] in self.parent:
            node, new = chain[-1]
            chain.append((self.parent[node], self._put(node, new)))
        root = chain[-1][0]
        self.writes[root] = self.writes.get(root, 0) + 1
        for node, new in chain:
            if not isinstance(node.meta.get("val"), (list, tuple)):  # those are taken apart again when they are read
                self.now[node], self.age[node] = new, self.writes[root]

    def _put(self, view: Node, value: Node) -> Node:
        """The new value of the tensor that `view` is a view of, once `value` is written through the view."""
        if view not in self.arguments or isinstance(view.meta.get("val"), (list, tuple)):
            return value
        if view.target is operator.getitem:
            return self._put_part(view, value)
        _check_strided(view)
        whole, name, arguments = self.current(self.parent[view]), name_of(view), ops.arguments(view)
        if view.target is aten.view.dtype:
            return self.call(aten.view.dtype, value, self._fake(whole).dtype)
        if name in ("real", "imag") and not self._fake(whole).is_complex():
            return value
        if name in _SCATTER:
            rest = {k: v for k, v in arguments.items() if k != "self"}
            return self.call(_SCATTER[name], whole, value, **rest)
        if name == "narrow" and isinstance(arguments["start"], int):
            dim, start = arguments["dim"], arguments["start"]
            end = start + arguments["length"] or torch.iinfo(torch.int64).max
            return self.call(aten.slice_scatter.default, whole, value, dim, start, end)
        if name in _INVERSE:
            return _INVERSE[name](self, whole, value, arguments)
        if name in _SAME and _same_shape(view.meta["val"], self._fake(whole)):
            return value
        if name in _RESHAPING:
            return self.call(aten.reshape.default, value, self.sizes(whole))
        raise ExportError(
            f"{where(view)} makes a view through which is written, and torchquant knows no such views; write to a "
            "slice of the tensor itself, or make the new value without a write (torch.where, torch.cat)"
        )

    def _put_part(self, part: Node, value: Node) -> Node:
        """As `_put`, for one of the results of chunk, split or unbind."""
        several = self.parent[part]
        whole, index, name = self.current(self.parent[several]), part.args[1], name_of(several)
        dim = _SPLIT_DIMS.get(name, ops.arguments(several).get("dim", 0))
        dim = 0 if name == "hsplit" and several.meta["val"][0].ndim == 1 else dim
        assert isinstance(index, int)
        if name == "unbind":
            return self.call(aten.select_scatter.default, whole, value, dim, index)
        sizes = [t.shape[dim] for t in several.meta["val"]]
        index %= len(sizes)
        if name not in _PARTS or not all(isinstance(s, int) for s in sizes[: index + 1]):
            raise ExportError(f"{where(several)} makes views, through which is written; slice the tensor instead")
        start = sum(sizes[:index])
        return self.call(aten.slice_scatter.default, whole, value, dim, start, start + sizes[index])

    def _keep(self) -> None:
        """Copy what buffers and inputs shall hold into them."""
        roots = [r for r in self.writes if r.op in ("get_attr", "placeholder")]
        values = [self.now[root] for root in roots]
        for i, (root, value) in enumerate(zip(roots, values, strict=True)):
            below = memory_of(value)
            if below in roots and below is not root:  # read before that is written
                values[i] = self.call(aten.clone.default, value)
        for root, value in zip(roots, values, strict=True):
            with self.graph.inserting_before(self.at):
                kept = self.graph.call_function(aten.copy_.default, (root, value))
            kept.meta = {"val": root.meta.get("val")}

    # building ----------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        """A new node in front of the present one, with its fake value."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in (like or self.at).meta.items() if k in _KEPT_META}
        values = torch.fx.node.map_arg((args, kwargs), self._fake)
        mode = next((v.fake_mode for v in pytree.tree_leaves(values) if hasattr(v, "fake_mode")), None)
        with mode or torch.no_grad(), enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def _fake(self, node: Node) -> Any:
        if node.meta.get("val") is None and node.op == "get_attr":
            value: Any = operator.attrgetter(str(node.target))(self.model)
            mode = next((v.fake_mode for n in self.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value.detach()
        if node.meta.get("val") is None and node.all_input_nodes and (node.op == "call_module" or ops.qdq_name(node)):
            return self._fake(node.all_input_nodes[0])  # observers, and what convert makes of them
        if node.meta.get("val") is None:
            raise ExportError(f"{node.name} has no recorded shape, and a tensor near it is written in place")
        return node.meta["val"]

    def sizes(self, node: Node) -> list[Any]:
        """The sizes of a node's value, as numbers and nodes."""
        shape = self._fake(node).shape
        return [s if isinstance(s, int) else self.call(aten.sym_size.int, node, i) for i, s in enumerate(shape)]


# views ---------------------------------------------------------------------------------------------------------------


def _permuted(f: _Functionalized, whole: Node, value: Node, arguments: dict[str, Any]) -> Node:
    dims = [d % len(arguments["dims"]) for d in arguments["dims"]]
    return f.call(aten.permute.default, value, [dims.index(i) for i in range(len(dims))])


def _transposed(f: _Functionalized, whole: Node, value: Node, arguments: dict[str, Any]) -> Node:
    first, second = arguments.get("dim0", arguments.get("axis0")), arguments.get("dim1", arguments.get("axis1"))
    return f.call(aten.transpose.int, value, first, second)


def _moved(f: _Functionalized, whole: Node, value: Node, arguments: dict[str, Any]) -> Node:
    overload = aten.movedim.int if isinstance(arguments["source"], int) else aten.movedim.intlist
    return f.call(overload, value, arguments["destination"], arguments["source"])


def _matrix_turned(f: _Functionalized, whole: Node, value: Node, arguments: dict[str, Any]) -> Node:
    return f.call(aten.transpose.int, value, -2, -1)


def _reversed(f: _Functionalized, whole: Node, value: Node, arguments: dict[str, Any]) -> Node:
    return f.call(aten.permute.default, value, list(range(value.meta["val"].ndim))[::-1])


_SCATTER: dict[str, Any] = {
    "slice": aten.slice_scatter.default,
    "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
    "as_strided": aten.as_strided_scatter.default,
}
_INVERSE: dict[str, Callable[[_Functionalized, Node, Node, dict[str, Any]], Node]] = {
    "permute": _permuted,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transposed),
    "movedim": _moved,
    **dict.fromkeys(("t", "numpy_T"), _reversed),
    **dict.fromkeys(("mT", "matrix_H", "adjoint", "mH"), _matrix_turned),
    "view_as_real": lambda f, whole, value, arguments: f.call(aten.view_as_complex.default, value),
    "view_as_complex": lambda f, whole, value, arguments: f.call(aten.view_as_real.default, value),
    "real": lambda f, whole, value, arguments: f.call(aten.complex.default, value, f.call(aten.imag.default, whole)),
    "imag": lambda f, whole, value, arguments: f.call(aten.complex.default, f.call(aten.real.default, whole), value),
}
_SPLIT_DIMS = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
_PARTS = ("chunk", "split", "split_with_sizes", "tensor_split", *_SPLIT_DIMS)
_SAME = ("alias", "detach", "dropout", "lift_fresh", "to", "_to_copy", "expand", "expand_as")
_RESHAPING = (
    *("view", "reshape", "_unsafe_view", "ravel", "flatten", "unflatten", "contiguous", "view_as", "reshape_as"),
    *("squeeze", "squeeze_", "unsqueeze", "unsqueeze_"),
)


def where(node: Node) -> str:
    module = ops.module_path(node)
    return f"{name_of(node)} ({node.name}" + (f" in {module})" if module else ")")


def _written_by_aten(node: Node) -> list[Node]:
    """What torch's own ops write into; an op of somebody else's stays as it is."""
    target = node.target
    return ops.written(node) if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" else []


def _without_write(target: Any) -> Any:
    """The overload that computes what `target` writes: `add_.Tensor` -> `add.Tensor`, `add.out` -> `add.Tensor`."""
    name, in_place = target._schema.name.split("::")[-1], True
    if name.startswith("__i") and name.endswith("__"):
        name = f"__{name[3:]}"
    elif name.endswith("_"):
        name = name[:-1]
    else:
        in_place = False  # an `out=` form
    parameters = [(a.name, str(a.type)) for a in target._schema.arguments if in_place or a.alias_info is None]
    packet = getattr(aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return next((o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == parameters), None)


def _check_strided(view: Node) -> None:
    """Refuse `as_strided` on what is not the whole of a contiguous memory: its offset and strides are the memory's."""
    if name_of(view) != "as_strided":
        return
    whole = view.all_input_nodes[0]
    value = whole.meta.get("val")
    is_whole = isinstance(value, torch.Tensor) and value.is_contiguous() and value.storage_offset() == 0
    if not is_whole or memory_of(whole) is not whole:
        raise ExportError(
            f"{where(view)} makes a view of a view, and something is written into their memory; slice the tensor"
        )


def _rename(node: Node) -> None:
    """Make a view of `unsqueeze_` and its like, which write no value; all later readers read the node already."""
    node.target = _without_write(node.target)


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.ndim == b.ndim and all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True))
