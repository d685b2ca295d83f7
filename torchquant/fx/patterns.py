"""Which nodes a user means: module-name globs, `op:KIND` and `node:NAME`. Matching nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from torch.fx import GraphModule, Node

from torchquant.errors import PatternError
from torchquant.fx import ops


def match(model: GraphModule, pattern: str) -> set[Node]:
    """The op nodes that `pattern` names.

    `op:KIND` matches op kinds (globs allowed), `node:NAME` FX node names, anything else module paths: a
    module matches with all that is inside it.

    Raises:
        PatternError: nothing matches; the message offers the nearest names.
    """
    if not isinstance(pattern, str) or not pattern:
        raise PatternError(f"pattern {pattern!r} must be a non-empty string: a module glob, 'op:KIND' or 'node:NAME'")
    kind, separator, rest = pattern.partition(":")
    nodes = [n for n in model.graph.nodes if n.op == "call_function"]
    if separator and kind == "op":
        matches = {n for n in nodes if fnmatch.fnmatchcase(ops.op_name(n), rest)}
        known = {ops.op_name(n) for n in nodes}
    elif separator and kind == "node":
        matches = {n for n in nodes if fnmatch.fnmatchcase(n.name, rest)}
        known = {n.name for n in nodes}
    else:
        matches = {n for n in nodes if any(fnmatch.fnmatchcase(p, pattern) for p in _ancestors(ops.module_path(n)))}
        known = {p for n in nodes for p in _ancestors(ops.module_path(n))}
        rest = pattern
    if not matches:
        raise PatternError(f"pattern {pattern!r} matches nothing in the model. {_nearest(rest, known)}")
    return matches


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))] if path else []


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    return f"Nearest names: {', '.join(near)}." if near else "The model has no such names at all."
