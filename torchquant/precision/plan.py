"""A plan: which scheme each weight gets. Written as JSON that people can read, edit and put under version control."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from torchquant.errors import InputError
from torchquant.files.whole import write_whole
from torchquant.fx import ops
from torchquant.fx.patterns import match
from torchquant.fx.reading import observer_of

__all__ = ["Plan", "weighted_sites"]

_KIND, _VERSION = "torchquant-plan", 1
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Plan:
    """Which scheme each weighted op of a model gets.

    Args:
        quantizer: name of the Quantizer's class that knows the schemes.
        scheme: of all other ops.
        schemes: pattern of one op (its module path, or `node:NAME`) -> scheme, or None for float. Ops that are not
            named get `scheme` where they can.
        shapes: pattern -> shape of its weight, of all ops with a weight: what the plan was made for.
        about: how it came about (budget, bytes, expected dB); for people, and not read again.
    """

    quantizer: str
    scheme: str
    schemes: Mapping[str, str | None]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        about = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.about.items()}
        fields = {"kind": _KIND, "version": _VERSION, **asdict(self), "about": about}
        return json.dumps(fields, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "the text") -> Plan:
        """Of what `to_json` gave, edited or not.

        Raises:
            InputError: it is no plan, or one with another version, missing or unknown fields, or values of other types.
        """
        try:
            read = json.loads(text, object_pairs_hook=_once)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{where} is no JSON: {error}") from error
        if not isinstance(read, dict) or read.get("kind") != _KIND:
            raise InputError(f"{where} is no plan: its kind is not {_KIND!r}")
        if read.get("version") != _VERSION or isinstance(read["version"], bool):
            raise InputError(f"{where} is a plan of version {read.get('version')!r}; this torchquant reads {_VERSION}")
        wrong = [name for name, check in _FIELDS.items() if name in read and not check(read[name])]
        missing = [name for name in ("quantizer", "scheme", "schemes") if name not in read]
        unknown = sorted(read.keys() - _FIELDS.keys() - {"kind", "version"})
        for names, what in ((missing, "lacks"), (unknown, "has the unknown"), (wrong, "has no sensible")):
            if names:
                raise InputError(f"{where}: the plan {what} {', '.join(names)}")
        shapes = {name: tuple(shape) for name, shape in read.get("shapes", {}).items()}
        return Plan(read["quantizer"], read["scheme"], read["schemes"], shapes, read.get("about", {}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all; raises InputError if `path` is no path."""
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"a plan is saved to a path, not to {path!r:.80}")
        return write_whole(path, lambda part: part.write_text(self.to_json(), encoding="utf-8"))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or see `from_json`.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"a plan is read from a path, not from {path!r:.80}")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as a plan: {error}") from error
        return Plan.from_json(text, str(path))

    def check(self, model: GraphModule) -> None:
        """Raise InputError unless the plan is for this model: every op with its weight's shape, and no other."""
        if not isinstance(model, GraphModule):
            raise InputError(f"a plan is checked against a GraphModule, from torchquant.export, not {model!r:.80}")
        present = weighted_sites(model)
        gone = [name for name in self.schemes if name not in present]
        gone += [name for name in self.shapes if name not in present and name not in gone]
        new = [name for name in present if name not in self.shapes] if self.shapes else []
        other = [
            f"{name} is {list(present[name][1])}, was {list(shape)}"
            for name, shape in self.shapes.items()
            if name in present and tuple(shape) != present[name][1]
        ]
        parts = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
            for names, what in (
                (gone, "ops are not there"),
                (new, "are not in the plan"),
                (other, "have other weights"),
            )
            if names
        ]
        by_weight: dict[Node, set[str | None]] = {}
        for name in (n for n in self.schemes if n in present):
            by_weight.setdefault(present[name][2], set()).add(self.schemes[name])
        torn = [str(weight) for weight, schemes in by_weight.items() if len(schemes) > 1]
        parts += [f"ops that read one weight have several schemes: {', '.join(torn[:_SHOWN])}"] if torn else []
        if parts:
            raise InputError(f"the plan does not fit the model. {'; '.join(parts)}. Search again, or edit the plan")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice, where the last one would win without a word."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice[:_SHOWN]))} stands in it twice")
    return dict(pairs)


def _is_schemes(value: Any) -> bool:
    return isinstance(value, dict) and all(scheme is None or isinstance(scheme, str) for scheme in value.values())


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) for shape in value.values()
    )


_FIELDS = {
    "quantizer": lambda value: isinstance(value, str),
    "scheme": lambda value: isinstance(value, str),
    "schemes": _is_schemes,
    "shapes": _is_shapes,
    "about": lambda value: isinstance(value, dict),
}


def weighted_sites(model: GraphModule) -> dict[str, tuple[Node, tuple[int, ...], Node]]:
    """Pattern -> op, shape of its constant weight, and where that stands: of every op that has one, in graph order.

    The pattern is the module's path where it names this op alone, `node:NAME` elsewhere.
    """
    found = {}
    for node in model.graph.nodes:
        kind = ops.kind_of(node)
        source = None if kind is None or kind.weight is None else ops.argument(node, kind.weight)
        if source is not None and observer_of(model, source) is not None:
            source = ops.argument(source, 0)
        shape = ops.shape_of(source) if source is not None and ops.is_constant(source) else None
        if source is None or shape is None or not all(isinstance(n, int) for n in shape):
            continue
        path = ops.module_path(node)
        alone = (
            bool(path) and not set(path) & set("[]*?:") and [n for n in match(model, path) if _has_weight(n)] == [node]
        )
        found[path if alone else f"node:{node.name}"] = node, tuple(int(n) for n in shape), source
    return found


def _has_weight(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is not None and kind.weight is not None
