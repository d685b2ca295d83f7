"""Rotations of the residual stream and of the heads' values, folded into the weights: no outliers, the same function.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman: "QuaRot: Outlier-Free 4-Bit Inference in
Rotated LLMs", NeurIPS 2024, stages 1a and 1b; R1 and R2 of Liu et al., "SpinQuant: LLM Quantization with Learned
Rotations", ICLR 2025, with random signs and nothing learned.

    x (rows, d)     the residual stream: x <- x R1, R1 (d, d) orthogonal, a Hadamard matrix with random signs
    v (rows, h)     values of a head: v <- v R2, taken back by the linear behind the attention

What makes a value takes R in its outputs, what reads it takes R in its inputs; gains of normalizations go into what
reads these. An RMSNorm commutes with any R. A LayerNorm does with one that keeps 1 as it is, R 1 = 1, so that no mean
has to be moved into the layers in front (as SliceGPT and QuaRot do) and the op stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch.fx import GraphModule, Node

from torchquant.algorithms.channels import folding
from torchquant.algorithms.channels.orthogonal import rotation
from torchquant.algorithms.channels.rotating import Branch, Edits
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.norms import Norm, norms_of
from torchquant.fx.producers import shape_behind
from torchquant.fx.spaces import Space, space_of

__all__ = ["Rotate"]

_NUMBERS = re.compile(r"_?\d+")
_TIED = ("gain", "untie", "leave")
Norms = Mapping[Node, Norm]


class Rotate:
    """Rotates residual streams and the values of attention heads, for the sake of what rounds their weights or values.

    Spaces are found in the flow of data of any prepared graph: all that additions, reshapes, caches and the like tie
    together. What cannot be rotated stays as it is, and `notes` say why: a stream that something else than linears,
    convolutions, normalizations and lookups makes or reads; normalizations whose output is added to the stream (BERT,
    Gemma 3); keys and values in few bits, which have a rotation of their own. Nothing is added to the graph but where
    `tied` says so.

    Args:
        stream: rotate residual streams (R1). heads: rotate values of attention heads (R2).
        tied: what to do where a table of embeddings is also the head, behind a normalization whose gain only the head
            may take. `gain`: both stay one tensor, and the gain becomes a float linear of d x d numbers in front of the
            head, the only op at run time; `untie`: the head gets a tensor of its own; `leave`: the stream is not
            rotated.
        seed: of the signs.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        stream: bool = True,
        heads: bool = True,
        tied: Literal["gain", "untie", "leave"] = "gain",
        seed: int = 0,
    ) -> None:
        if tied not in _TIED:
            raise InputError(f"tied is {tied!r}; it must be one of {', '.join(map(repr, _TIED))}")
        if not stream and not heads:
            raise InputError("neither streams nor heads are to be rotated: pass stream=True or heads=True")
        if type(seed) is not int or seed < 0:
            raise InputError(f"seed is {seed!r}; it must be an int of 0 or more")
        self.stream, self.heads, self.tied, self.seed = stream, heads, tied, seed
        self.notes: list[str] = []

    def transform(self, prepared: GraphModule, batches: Sequence[Any]) -> int:
        """Rotate in place, float function unchanged; returns how many spaces changed. Recalibrate afterwards."""
        self.notes, changed = [], 0
        if self.stream:
            changed += self._rotate_streams(prepared)
        if self.heads:
            changed += self._rotate_heads(prepared)
        folding.tidy(prepared)
        return changed

    def _rotate_streams(self, prepared: GraphModule) -> int:
        norms = list(norms_of(prepared))
        known = _by_node(norms)
        seen, changed = set[Node](), 0
        for norm in norms:
            seed = _input_of(norm)
            if seed in seen:
                continue
            space = space_of(prepared, seed, -1, norm.size, known)
            seen |= space.axes.keys() | {seed}
            seen |= {_input_of(n) for n in space.norms}
            branches = [] if space.reason else [_branch(prepared, n, known) for n in space.norms]
            reasons = [space.reason, *(b for b in branches if isinstance(b, str)), _refusal(prepared, space)]
            if reason := next(filter(None, reasons), ""):
                self._leave(f"stream at {seed.name}: left as it is", reason)
                continue
            changed += self._apply(prepared, space, [b for b in branches if isinstance(b, Branch)], "stream", seed)
        return changed

    def _rotate_heads(self, prepared: GraphModule) -> int:
        known, changed = _by_node(norms_of(prepared)), 0
        for node, value in list(_values(prepared)):
            space = space_of(prepared, value, -1, int(shape_behind(value)[-1]), known)
            reason = space.reason or ("a normalization reads it" if space.norms else _refusal(prepared, space))
            if not reason:
                changed += self._apply(prepared, space, [], "values", value)
            elif ops.op_name(node) == "attention":
                self._leave(f"values of {node.name}: left as they are", reason)
        return changed

    def _leave(self, what: str, reason: str) -> None:
        """Note what is left as it is: of places that differ in numbers alone, as layers do, the first."""
        kinds = {_NUMBERS.sub("", note) for note in self.notes}
        if _NUMBERS.sub("", f"{what}: {reason}") not in kinds:
            self.notes.append(f"{what}: {reason}")

    def _apply(self, prepared: GraphModule, space: Space, branches: list[Branch], what: str, seed: Node) -> int:
        """Rotate one space, if the weights that several ops share let it; returns how many were."""
        keeps_mean = any(branch.norm.centred for branch in branches)
        edits = Edits(prepared, space, branches, rotation(space.size, self.seed, keeps_mean=keeps_mean))
        for tie in edits.ties():
            if not tie.tables or not tie.layers or tie.norm is None:
                names = " and ".join(n.name for n in (*tie.tables, *tie.layers)[:2])
                self._leave(f"{what} at {seed.name}: left", f"{names} share a weight, of which R makes two")
                return 0
            name = tie.layers[0].name
            if self.tied == "leave":
                self._leave(f"{what} at {seed.name}: left", f"{name} shares its weight with a table")
                return 0
            if self.tied == "gain":
                edits.keep_gain(tie.norm)
                self.notes.append(
                    f"{name} shares its weight with a table: a float linear in front of it takes the gain"
                )
            else:
                self.notes.append(f"{name} has a weight of its own now, that of the table with another rotation")
        edits.apply()
        return 1


def _by_node(norms: Iterator[Norm] | list[Norm]) -> Norms:
    return {node: norm for norm in norms for node in (*norm.inputs, norm.result)}


def _input_of(norm: Norm) -> Node:
    source = ops.argument(norm.inputs[0], 0)
    assert source is not None
    return source


def _branch(prepared: GraphModule, norm: Norm, norms: Norms) -> Branch | str:
    """A normalization and the layers that read it, or why its gain cannot go into these."""
    space = space_of(prepared, norm.result, -1, norm.size, norms, behind=norm.result)
    if space.reason:
        return f"the output of {norm.result.name} is not read by layers alone: {space.reason}"
    others = [w.node for w in space.writers] + [n.result for n in space.norms] + space.states
    if others:
        return f"the output of {norm.result.name} is not read by layers alone: {others[0].name} takes part"
    return Branch(norm, tuple(space.readers))


def _refusal(prepared: GraphModule, space: Space) -> str:
    """Why a space without contradictions is left alone."""
    if space.reason:
        return ""
    if not space.writers or not (space.readers or space.norms):
        return "no layer makes it" if not space.writers else "no layer reads it"
    held = [s for s in space.states if bool(ops.constant_value(prepared, s).any())]
    if held:
        return f"the state {held[0].name} is not zero at export"
    return "a single feature has no rotation" if space.size < 2 else ""


def _values(prepared: GraphModule) -> Iterator[tuple[Node, Node]]:
    """The attentions, as an op or as a product of two matrices, each with what it sums."""
    for node in prepared.graph.nodes:
        name = ops.op_name(node)
        value = ops.argument(node, 2 if name == "attention" else 1) if name in ("attention", "matmul") else None
        shape = () if value is None or ops.is_constant(value) else shape_behind(value)
        if value is not None and shape and isinstance(shape[-1], int):
            yield node, value
