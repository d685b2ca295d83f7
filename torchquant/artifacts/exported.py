"""ExportedPrograms read as data: nothing that a `.pt2` file says is run.

`torch.export.load` unpickles weights and example inputs, evaluates the expressions of sizes, executes guards, imports
the modules that trees of arguments name, calls whatever function a node names, and writes names into source code. So
torch is given another archive, made here: tensors that were read without pickle and pickled again, and a graph in which
each of those places holds what torch itself writes there, and nothing else.
"""

from __future__ import annotations

import ast
import io
import json
import math
import operator
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from torchquant.files import archive
from torchquant.files.whole import reading
from torchquant.fx.trees import UnsafeContentError, check_tree

__all__ = ["load", "load_members"]

_GRAPH, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_CONFIGS = {
    "data/weights/model_weights_config.json": "data/weights/",
    "data/constants/model_constants_config.json": "data/constants/",
}
_FRAME = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_ADVICE = "export the model again, from where it was made"


def load(path: str | os.PathLike[str], advice: str = _ADVICE) -> ExportedProgram:
    """What `torch.export.save` wrote; example inputs that are no plain containers of tensors are left out.

    Raises:
        ArtifactError: no such file, truncated, damaged, of a form that this torch does not read, or with content that
            could run code: pickled objects that are no tensors, TorchScript objects, functions that are no operators.
    """
    return load_members(path, archive.members(path), advice)


def load_members(path: str | os.PathLike[str], members: Mapping[str, bytes], advice: str = _ADVICE) -> ExportedProgram:
    """The same of an archive that was read already; `path` is what errors name, with `advice`."""
    with reading(path, f"an ExportedProgram that torch {torch.__version__} reads", advice):
        return torch.export.load(_harmless(members))


def _harmless(members: Mapping[str, bytes]) -> io.BytesIO:
    """An archive with what a graph needs of `members`, and nothing in it that torch would run."""
    if _GRAPH not in members:
        raise UnsafeContentError(f"it has no {_GRAPH}")
    graph, inputs = json.loads(members[_GRAPH]), _plain_inputs(members.get(_INPUTS, b""))
    _Checker().visit(graph)
    if not inputs:
        graph["guards_code"] = []  # they speak of the example inputs
    stored = {name: members[name] for name in _FRAME if name in members}
    stored |= {_GRAPH: json.dumps(graph).encode(), _INPUTS: inputs}
    for config, folder in _CONFIGS.items():
        parsed = json.loads(members[config])
        stored[config] = json.dumps(parsed).encode()
        stored |= _tensors(members, folder, parsed["config"])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, content in stored.items():
            target.writestr(f"model/{name}", content)
    out.seek(0)
    return out


def _tensors(members: Mapping[str, bytes], folder: str, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The members that hold tensors, each in one form: as bytes, or pickled again."""
    stored: dict[str, bytes] = {}
    forms: dict[str, bool] = {}
    for name, about in config.items():
        _require(_is_path(name), name, "the name of a tensor")
        member, is_pickled = folder + str(about["path_name"]), about["use_pickle"]
        if not _TENSORS.fullmatch(member):
            raise UnsafeContentError(f"{name} is an object that only pickle or TorchScript could make")
        if forms.setdefault(member, is_pickled) is not is_pickled or not isinstance(is_pickled, bool):
            raise UnsafeContentError(f"{member} is pickled in one place, and not in another")
        stored[member] = _tensor_again(members[member]) if is_pickled else members[member]
    return stored


def _tensor_again(content: bytes) -> bytes:
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # its advice is to load it nevertheless
        raise UnsafeContentError("a pickle of more than a tensor stands in the place of one") from error
    if not isinstance(value, torch.Tensor):
        raise UnsafeContentError("a pickle that holds no tensor stands in the place of one")
    return _pickled(value)


def _plain_inputs(content: bytes) -> bytes:
    """The example inputs pickled again, or nothing if they are more than containers of tensors and numbers."""
    try:
        value = torch.load(io.BytesIO(content), weights_only=True)
        keys = (k for part in _parts(value) if isinstance(part, dict) for k in part if isinstance(k, str))
        return _pickled(value) if isinstance(value, tuple) and all(map(_is_quotable, keys)) else b""
    except Exception:
        return b""


def _parts(value: Any) -> Iterable[Any]:
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _parts(part)


def _pickled(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


# names and texts --------------------------------------------------------------------------------------------------


def _require(fits: bool, value: Any, what: str) -> None:
    if not fits:
        raise UnsafeContentError(f"{str(value)[:200]!r} cannot be {what}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_path(value: Any) -> bool:
    """Whether a text is the name of a parameter; names of modules may be `a-b`, or hold spaces."""
    return isinstance(value, str) and re.fullmatch(r"[\w.\-+/:@<>$~ ]*", value) is not None


def _is_quotable(value: Any) -> bool:
    """Whether a text may stand between quotes in source code."""
    return isinstance(value, str) and value.isprintable() and not set(value) & set("\"'\\")


# expressions ------------------------------------------------------------------------------------------------------


def _keywords_of(text: str) -> list[Any]:
    """The names of the keyword arguments in the tree of a call, which are written into source code."""
    spec = json.loads(text)[1]
    children = spec["children_spec"]
    if spec["type"] == "builtins.tuple" and len(children) == 2 and children[1]["type"] == "builtins.dict":
        context = json.loads(children[1]["context"])
        return list(context) if isinstance(context, list) else [context]
    return []


_MATH = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop)
_SYNTAX = (*_MATH, ast.cmpop, ast.Constant, ast.Load, ast.Name, ast.Call, ast.keyword)
_SYMPY = {
    *("Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "ExprCondPair", "Float"),
    *("FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "GreaterThan", "Identity", "IntTrueDiv", "Integer"),
    *("IsNonOverlappingAndDenseIndicator", "LShift", "LessThan", "Max", "Min", "Mod", "ModularIndexing", "Mul"),
    *("Ne", "Not", "Or", "Piecewise", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal"),
    *("RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat", "TruncToInt"),
    *("Tuple", "Unequality", "Where", "ceiling", "floor", "sqrt"),
}
_METHODS = ("size", "stride", "storage_offset", "dim", "numel", "item")
_GUARDS = ("max", "min", "abs", "int", "float", "bool", "len", "IsNonOverlappingAndDenseIndicator")
_MATHEMATICS = {name for name in dir(math) if not name.startswith("_")}
_LARGEST_EXPONENT = 64
_LONGEST = 20_000


def _check_expression(text: Any) -> None:
    """Refuse what `sympy.sympify`, which evaluates Python, would do more with than arithmetic."""
    for node in _syntax(text):
        fits = isinstance(node, _SYNTAX)
        if isinstance(node, ast.Call):
            fits = isinstance(node.func, ast.Name) and node.func.id in _SYMPY
        elif isinstance(node, ast.Constant):
            fits = not isinstance(node.value, str) or re.fullmatch(r"[\w.+-]*", node.value) is not None
        _require(fits and _is_small(node), text, "the expression of a size")


def _check_guard(text: Any) -> None:
    """Refuse what is no comparison of the sizes of inputs: `(L['x'].size()[0] // 2) != 1`."""
    for node in _syntax(text):
        fits = isinstance(node, (*_SYNTAX, ast.Attribute, ast.Subscript, ast.IfExp))
        if isinstance(node, ast.Name):
            fits = node.id in ("L", "math", "torch", "inf", *_GUARDS)
        elif isinstance(node, ast.Attribute):
            fits = node.attr in _METHODS or _is_math(node)
        elif isinstance(node, ast.Constant):
            fits = not isinstance(node.value, str) or _is_quotable(node.value)
        elif isinstance(node, ast.Call):
            fits = isinstance(node.func, (ast.Name, ast.Attribute))
        _require(fits and _is_small(node), text, "a guard")


def _is_math(node: ast.Attribute) -> bool:
    module = node.value.id if isinstance(node.value, ast.Name) else ""
    return (module == "math" and node.attr in _MATHEMATICS) or (module == "torch" and node.attr.startswith("sym_"))


def _syntax(text: Any) -> Iterable[ast.AST]:
    _require(isinstance(text, str) and len(text) <= _LONGEST, text, "an expression")
    try:
        return ast.walk(ast.parse(text.strip(), mode="eval"))
    except SyntaxError as error:
        raise UnsafeContentError(f"{text[:200]!r} is no expression") from error


_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")


def _is_small(node: ast.AST) -> bool:
    """Whether its numbers stay small: no power of a power, and none above the 64th."""
    if not _is_power(node):
        return True
    inner = [n for n in ast.walk(node) if n is not node]
    exponent = [node.right] if isinstance(node, ast.BinOp) else node.args[1:2]  # type: ignore[attr-defined]
    numbers = [n.value for part in exponent for n in ast.walk(part) if isinstance(n, ast.Constant)]
    return not any(map(_is_power, inner)) and all(
        isinstance(n, bool) or not isinstance(n, (int, float)) or abs(n) <= _LARGEST_EXPONENT for n in numbers
    )


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _POWERS
    return isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift))


# the graph --------------------------------------------------------------------------------------------------------

_SYMBOLIC: set[Callable[..., Any]] = {
    *(operator.eq, operator.ne, operator.le, operator.ge, operator.lt, operator.gt, operator.neg, operator.pos),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.and_, operator.or_, operator.lshift, operator.rshift, math.trunc, math.floor, math.ceil),
    *(getattr(torch, n) for n in dir(torch) if n.startswith("sym_")),
}
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|(_operator|math|torch)\.\w+")
_HIGHER_ORDER = {
    *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond", "flex_attention"),
    *("hints_wrapper", "invoke_subgraph", "map_impl", "out_dtype", "scan", "strict_mode"),
    *("tag_activation_checkpoint", "while_loop", "wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled"),
}
_NOT_WALKED = {"treespec_namedtuple_fields", "opset_version"}  # texts that stay texts
_NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("as_int", "dtype", "layout", "as_scalar_type", "as_memory_format", "as_layout"), (int,)),
    **dict.fromkeys(("min_val", "max_val"), (int, type(None))),
    "as_bool": (bool,),
}
_MAPS = {
    *("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"),
    *("range_constraints", "as_string_to_argument"),
}
_TARGETS = {"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"}


def _check_operator(text: Any) -> None:
    """Refuse what is neither an operator of the dispatcher nor one of numbers; files are none of its arguments."""
    fits = isinstance(text, str) and _OPERATOR.fullmatch(text) is not None
    resolved = _resolved(text) if fits else None
    if isinstance(resolved, torch._ops.OpOverload):
        arguments = resolved._schema.arguments
        fits = not any(str(a.type) == "str" and re.search("file|path|url", a.name) for a in arguments)
    elif isinstance(resolved, torch._ops.HigherOrderOperator):
        fits = resolved.name() in _HIGHER_ORDER
    else:
        fits = fits and resolved in _SYMBOLIC
    if not fits:
        hint = " (an operator of your own has to be imported before)" if str(text).startswith("torch.ops.") else ""
        raise UnsafeContentError(f"the graph calls {str(text)[:200]!r}, which is no operator that torch knows{hint}")


def _resolved(text: str) -> Any:
    module, *names = text.split(".")
    attribute: Any = {"torch": torch, "math": math}.get(module, operator)
    for name in names:
        attribute = getattr(attribute, name, None)
    return attribute


class _Checker:
    """Visits the JSON of a graph: by the name of a field, what it may hold."""

    def visit(self, value: Any) -> None:
        """Raise UnsafeContentError where a field holds what torch does not write there."""
        if isinstance(value, list):
            for part in value:
                self.visit(part)
        elif isinstance(value, dict):
            if "nodes" in value and "inputs" in value:
                self._quoted(value["inputs"])
            for field, part in value.items():
                self._field(field, part)

    def _field(self, field: str, value: Any) -> None:
        if field in _MAPS:  # whose keys are names that the model's author chose: `target`, `metadata`
            _require(isinstance(value, dict), value, f"a map ({field})")
            for name, part in value.items():
                _require(field == "range_constraints" or _is_name(name), name, "a name")  # those are of expressions
                self.visit(part)
        elif field in ("target", "as_operator"):
            _check_operator(value)
        elif field in ("name", "as_name"):
            _require(value in (None, "") or _is_name(value), value, "a name")
        elif field in _NUMBERS:
            _require(type(value) in _NUMBERS[field], value, f"in the place of a number ({field})")
        elif field == "metadata":
            _clean(value)
        elif field in _TARGETS:
            _require(_is_path(value), value, "the name of a parameter")
        elif field == "expr_str":
            _check_expression(value)
        elif field in ("in_spec", "out_spec"):
            check_tree(value)
            for name in _keywords_of(value) if field == "in_spec" else ():
                _require(_is_name(name), name, "the name of an argument")
        elif field == "forward_arg_names":
            for name in value or ():
                _require(_is_name(name), name, "the name of an argument")
        elif field == "guards_code":
            for guard in value:
                _check_guard(guard)
        elif field in ("as_custom_obj", "custom_obj", "custom_obj_values"):
            if not value:
                return
            raise UnsafeContentError("the graph holds an object that only pickle or TorchScript could make")
        elif field not in _NOT_WALKED:
            self._walk(field, value)

    def _walk(self, field: str, value: Any) -> None:
        if field in ("signature", "constant_input"):
            self._quoted(value)
        self.visit(value)

    def _quoted(self, value: Any) -> None:
        """Texts that are arguments of the graph come between quotes into its guards."""
        for part in _leaves(value, "as_string"):
            _require(_is_quotable(part), part, "an argument of a graph")


def _clean(metadata: Any) -> None:
    """Take from notes (where a node came from) whatever would end a comment, which is where torch may write them."""
    _require(isinstance(metadata, dict), metadata, "the notes of a node")
    for name, text in metadata.items():
        _require(isinstance(text, str), text, f"the note {name!r:.50} of a node")
        metadata[name] = "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _leaves(value: Any, field: str) -> Iterable[Any]:
    """What stands in `field`, however deep."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == field:
                yield part
            else:
                yield from _leaves(part, field)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, field)
