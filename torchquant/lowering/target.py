"""A target: where quantized models run, and what it computes there in which scheme."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from torchquant.errors import SchemeError
from torchquant.fx import ops
from torchquant.types import Capability, Scheme

if TYPE_CHECKING:  # to import it takes seconds
    from torchao.quantization.pt2e.quantizer import Quantizer

__all__ = ["Target", "brief"]


@dataclass(frozen=True)
class Target:
    """What Quantizers, reports and the command line know of a target. It is light to import; what lowers to it is not.

    Args:
        name: in proofs, files and on the command line.
        module: where `lower` and `load` are; empty if nothing lowers to it.
        quantizer: `module:class` of the Quantizer that annotates for it.
        suffix: of its artefacts' files.
        schemes: by name; the first one is the default.
        capabilities: a row for each kind of op that it knows of.
        dtypes: of the activations that its quantized kernels take.
        is_code: loading one of its files runs what is in it.
        here: options of `lower` and `load` that this machine asks for, and what to tell people about that.
    """

    name: str
    module: str
    quantizer: str
    suffix: str
    schemes: Mapping[str, Scheme]
    capabilities: tuple[Capability, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    is_code: bool = False
    here: Callable[[], tuple[dict[str, Any], str]] = lambda: ({}, "")

    def __post_init__(self) -> None:
        names = [row.op for row in self.capabilities]
        for row in self.capabilities:
            _check(self.name, row)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SchemeError(f"target {self.name!r}: {', '.join(twice)} have more than one row of capabilities")
        used = {scheme for row in self.capabilities for scheme in row.schemes}
        if unknown := sorted(used - set(self.schemes)):
            raise SchemeError(f"target {self.name!r}: its capabilities name schemes it does not have: {unknown}")

    def __str__(self) -> str:
        return self.name

    def row(self, op: str) -> Capability | None:
        """What the target does with a kind of op, or None if it knows nothing of it."""
        return next((row for row in self.capabilities if row.op == op), None)

    def why_float(self, op: str) -> str:
        """Why the target runs a kind of op in no scheme; empty if it runs it in one."""
        row = self.row(op)
        if row is None:
            return f"{self.name} has no entry for {op}"
        return "" if row.schemes else row.reason

    def backend(self) -> ModuleType:
        """The module with `lower` and `load`, imported when it is first asked for.

        Raises:
            SchemeError: there is none, or it cannot be found.
        """
        try:
            return import_module(self.module)
        except (ModuleNotFoundError, ValueError) as error:
            if isinstance(error, ModuleNotFoundError) and not self.module.startswith(str(error.name)):
                raise  # what the module itself needs is missing
            what = f"has no module {self.module!r}" if self.module else "is not lowered by torchquant"
            raise SchemeError(f"target {self.name!r} {what}, so it has no lower() and load()") from error

    def quantizer_class(self) -> type[Quantizer]:
        """The class of the Quantizer that annotates for this target."""
        module, _, name = self.quantizer.partition(":")
        return getattr(import_module(module), name)


def _check(target: str, row: Capability) -> None:
    """Raise SchemeError for a row with schemes that no op could ever match."""
    kind = ops.BY_NAME.get(row.op)
    if row.schemes and kind is None:
        raise SchemeError(f"target {target!r}: no kind of op is named {row.op!r}; torchquant.fx.ops.KINDS has them all")
    if row.role == "weighted" and kind is not None and not kind.weighted:
        raise SchemeError(f"target {target!r}: the role of {row.op!r} is 'weighted', and it has no weight")


_FEW_BITS = re.compile(r"w(\d)(a8|)(_symmetric|)(?:_g(\d+))?")  # see `weight_schemes`


def brief(schemes: Iterable[str]) -> str:
    """Names of schemes for people to read: weights of few bits in all combinations of their parts as one."""
    names = list(schemes)
    parts = [match.groups(default="") for name in names if (match := _FEW_BITS.fullmatch(name))]
    kinds = [list(dict.fromkeys(values)) for values in zip(*parts, strict=True)]
    if len(parts) < 2 or len(parts) != math.prod(map(len, kinds)):
        families = [[name for name in names if ("a8" in name) == is_a8] for is_a8 in (False, True)]
        return ", ".join(map(brief, families) if all(families) and parts else names)
    bits, activations, symmetric, groups = ([kind for kind in of if kind] for of in kinds)
    optional = [
        f"[{part[0]}]" if "" in of else part[0]
        for of, part in zip(kinds[1:3], (activations, symmetric), strict=True)
        if part
    ]
    endings = f"_g{{{','.join(groups)}}}" if groups else ""
    width = f"{{{','.join(bits)}}}" if len(bits) > 1 else bits[0]
    family = f"w{width}{''.join(optional)}{f'[{endings}]' if '' in kinds[3] and groups else endings}"
    return ", ".join([*(name for name in names if not _FEW_BITS.fullmatch(name)), family])
