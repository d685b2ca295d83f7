"""What every backend returns: a callable artefact with its proof."""

from __future__ import annotations

import operator
import os
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch

from torchquant.errors import InputError
from torchquant.files import archive, tensors, typed
from torchquant.files.whole import reading
from torchquant.fx.signature import InputSpec, Signature
from torchquant.fx.work import Work
from torchquant.measure.verify import Comparison, OutputComparison
from torchquant.types import QParams, Site

if TYPE_CHECKING:
    from torchquant.lowering.proof import Verdict

__all__ = ["Metadata", "Program", "Proof", "State", "metadata_from", "read_metadata", "write_metadata"]

_STATES = "states/initial.safetensors"
_LIMITS = ("quant_min", "quant_max")  # None where an observer has none


@dataclass(frozen=True)
class Proof:
    """What lowering found when it ran the artefact.

    Args:
        kernels: name of a matrix kernel or delegate -> how many the artefact has.
        annotated: compute ops that the converted graph quantizes; `fused`: those the artefact runs so.
        comparison: the artefact's output against the converted graph's.
        left_float: for each group of ops that run in float (`3 softmax`), why.
        outcome: `holds`, or `undecided`: nothing speaks against the artefact, and not enough for it.
        reason: how that was decided, where the outputs alone did not do it.
    """

    kernels: Mapping[str, int]
    annotated: int
    fused: int
    comparison: Comparison
    left_float: Mapping[str, str]
    outcome: str = "holds"
    reason: str = ""

    @staticmethod
    def of(
        verdict: Verdict, kernels: Mapping[str, int], annotated: int, fused: int, left_float: Mapping[str, str]
    ) -> Proof:
        """What was counted, with what comparing found."""
        return Proof(kernels, annotated, fused, verdict.comparison, left_float, verdict.outcome, verdict.reason)


@dataclass(frozen=True)
class Metadata:
    """What a program knows about itself: how it is called, the sites of its graph, its proof.

    Args:
        overwrites_inputs: the artefact writes into the tensors it is given, so a call must hand it copies.
        states: name -> initial value of what one call hands to the next: inputs and outputs behind the model's own.
        returns: positions among the input tensors whose new values are returned last, because the model writes them.
        in_place: names of states that the artefact writes into the tensors it is given; the others are returned.
        facts: what else is known of the graph, as JSON has it: `edges` between its sites, `weight_bytes`, the `work` of
            its matrix products; of the artefact, `regions`, and `race_ms`: what was timed when it was lowered.
    """

    signature: Signature
    sites: tuple[Site, ...]
    proof: Proof | None
    overwrites_inputs: bool = False
    states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    returns: tuple[int, ...] = ()
    in_place: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class State(threading.local):
    """What a program hands from one call to the next; each thread has its own, from the initial values on."""

    def __init__(self, initial: Mapping[str, torch.Tensor]) -> None:
        self.initial = initial
        self.values = {name: _own(value) for name, value in initial.items()}

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take other values; raises InputError unless they have the names, dtypes and shapes of the initial ones."""
        if not isinstance(values, Mapping) or set(values) != set(self.initial):
            raise InputError(f"the state of this program is {sorted(self.initial)}, each a tensor; got {values!r:.200}")
        for name, wanted in self.initial.items():
            InputSpec(name, str(wanted.dtype), tuple(wanted.shape)).check(values[name], "the state")
        self.values = {name: _own(values[name]) for name in self.initial}


def _own(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


class Program(ABC):
    """A lowered model: call it like the model, save it, ask what it holds.

    A model that keeps state in buffers (a cache, a filter) is a program with `state`: each call starts from what the
    last call in the same thread left, the first from what the model held when it was exported.
    """

    target: str
    inputs: tuple[InputSpec, ...]
    sites: tuple[Site, ...]
    proof: Proof | None
    _state: State = State({})

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the artefact; raises InputError on inputs it was not built for."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artefact whole; raises ArtifactError if the folder cannot be written."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """No pickles and no deep copies: the artefact behind a program cannot be copied in memory."""
        raise TypeError(f"a {type(self).__name__} cannot be pickled or copied; write it with .save(path) and load that")

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Size of the artefact as saved."""

    def _finish(self, about: Metadata, tensors: Sequence[torch.Tensor], values: Sequence[Any]) -> Any:
        """The model's outputs, of all that the artefact returned for `tensors`; the rest goes where it belongs."""
        in_place = set(about.in_place)
        returned_states = [name for name in about.states if name not in in_place]
        states = len(returned_states)
        count = len(values) - states - len(about.returns)
        outputs, after, returned = values[:count], values[count : count + states], values[count + states :]
        for position, value in zip(about.returns, returned, strict=True):
            tensors[position].copy_(value)
        if states:  # a caller may write into what it is given
            memory = _memory_of((*outputs, *tensors))
            kept = [t.clone() if t.untyped_storage().data_ptr() in memory else t for t in after]
            self._state.values = {**self._state.values, **dict(zip(returned_states, kept, strict=True))}
        if about.in_place:  # the next call writes into these
            memory = _memory_of([self._state.values[name] for name in about.in_place])
            outputs = [t.clone() if _memory_of([t]) & memory else t for t in outputs]
        return about.signature.outputs(outputs)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it keeps of the graph that it was lowered from, see `Metadata`; empty where that is not known."""
        about = getattr(self, "_about", None)
        return about.facts if isinstance(about, Metadata) else {}

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """A copy of this thread's state, by the names of the model's buffers; empty where the model keeps none.

        Assign what was read before to go on with another stream of inputs.
        """
        return {name: value.clone() for name, value in self._state.values.items()}

    @state.setter
    def state(self, values: Mapping[str, torch.Tensor]) -> None:
        self._state.set(values)

    def reset(self) -> None:
        """Go back to the initial state, in this thread."""
        self._state.set(self._state.initial)


def _memory_of(values: Sequence[Any]) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in values if isinstance(v, torch.Tensor)}


def write_metadata(package: Path, target: str, about: Metadata) -> None:
    """Add what a program knows about itself to its archive, and a digest of all that is in it."""
    assert about.proof is not None
    sites = [{**asdict(replace(s, activation=None, weight=None)), **_tensors_of(s)} for s in about.sites]
    payload = {
        "signature": about.signature.to_json(),
        "sites": sites,
        "proof": asdict(about.proof),
        "overwrites_inputs": about.overwrites_inputs,
        "states": list(about.states),
        "returns": list(about.returns),
        "in_place": list(about.in_place),
        "facts": dict(about.facts),
    }
    if about.states:
        with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as out:
            root = out.namelist()[0].partition("/")[0]
            out.writestr(f"{root}/{_STATES}", tensors.stored(about.states))
    archive.seal(package, target, payload)


def read_metadata(package: Path, target: str) -> Metadata:
    """What `write_metadata` stored; raises ArtifactError if `package` is no archive of `target`, or is damaged."""
    return metadata_from(package, *archive.contents(package, target))


def metadata_from(path: str | os.PathLike[str], stored: Mapping[str, Any], members: Mapping[str, bytes]) -> Metadata:
    """What an archive of a program says about it; raises ArtifactError if that makes no sense.

    Args:
        path: what errors name.
        stored, members: as `archive.contents` gives them.
    """
    with reading(path, "what torchquant writes about a program"):
        proof = {**stored["proof"], "comparison": _comparison_of(stored["proof"]["comparison"])}
        about = Metadata(
            Signature.from_json(stored["signature"]),
            tuple(_site_of(s) for s in stored["sites"]),
            typed.made(Proof, proof),
            bool(stored["overwrites_inputs"]),
            _states_in(path, members, stored["states"]),
            tuple(map(operator.index, stored["returns"])),
            tuple(stored.get("in_place", ())),
            facts_of(stored.get("facts", {})),
        )
        if not set(about.in_place) <= set(about.states):
            raise ValueError(f"{about.in_place} are no states")
        if not all(0 <= i < len(about.signature.tensors) for i in about.returns):
            raise ValueError(f"{about.returns} are no inputs")
        return about


def facts_of(stored: Any) -> dict[str, Any]:
    """The facts as they were written; raises ValueError or TypeError if they are of other types."""
    facts = dict(stored)
    edges = [(str(source), str(target)) for source, target in facts.get("edges", [])]
    regions = [(operator.index(size), tuple(map(str, sites))) for size, sites in facts.get("regions", [])]
    work = [asdict(typed.made(Work, row)) for row in facts.get("work", [])]
    race = {str(name): float(ms) for name, ms in dict(facts.get("race_ms", {})).items()}
    known: dict[str, Any] = {"edges": edges, "regions": regions, "work": work, "race_ms": race}
    weight_bytes = {"weight_bytes": operator.index(facts["weight_bytes"])} if "weight_bytes" in facts else {}
    return {name: value for name, value in known.items() if name in facts} | weight_bytes


def _comparison_of(stored: Mapping[str, Any]) -> Comparison:
    outputs = [{**o, "lost": None if o["lost"] is None else tuple(o["lost"])} for o in stored["outputs"]]
    return typed.made(Comparison, {**stored, "outputs": tuple(typed.made(OutputComparison, o) for o in outputs)})


def _states_in(
    path: str | os.PathLike[str], members: Mapping[str, bytes], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The initial values in the order in which the artefact takes them, which safetensors does not keep."""
    values = tensors.read(path, members[_STATES], sealed=True) if names else {}
    return {name: values[name] for name in names}


def _tensors_of(site: Site) -> dict[str, Any]:
    return {name: _grid_of(getattr(site, name)) for name in ("activation", "weight")}


def _grid_of(qparams: QParams | None) -> dict[str, Any] | None:
    if qparams is None:
        return None
    return {**asdict(replace(qparams, scale=None, zero_point=None)), "dtype": str(qparams.dtype)}


def _site_of(stored: Mapping[str, Any]) -> Site:
    grids: Sequence[Mapping[str, Any] | None] = [stored["activation"], stored["weight"]]
    activation, weight = (
        typed.made(QParams, {**g, "dtype": tensors.dtype_of(g["dtype"])}, _LIMITS) if g else None for g in grids
    )
    return typed.made(Site, {**stored, "activation": activation, "weight": weight})
