"""What every backend returns: a callable artefact with its proof."""

from __future__ import annotations

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchquant import archive
from torchquant.batches import InputSpec
from torchquant.types import QParams, Site
from torchquant.verify import Comparison

__all__ = ["Metadata", "Program", "Proof", "read_metadata", "write_metadata"]


@dataclass(frozen=True)
class Proof:
    """What lowering found when it ran the artefact.

    Args:
        kernels: name of a matrix kernel or delegate -> how many the artefact has.
        annotated: compute ops that the converted graph quantizes; `fused`: those the artefact runs so.
        comparison: the artefact's output against the converted graph's.
        left_float: for each group of ops that run in float (`3 softmax`), why.
    """

    kernels: Mapping[str, int]
    annotated: int
    fused: int
    comparison: Comparison
    left_float: Mapping[str, str]


@dataclass(frozen=True)
class Metadata:
    """What a program knows about itself: its inputs, the sites of its graph, its proof.

    `overwrites_inputs`: the artefact writes into the tensors it is given, so a call must hand it copies.
    `structure`: the pytree of (args, kwargs) that it was exported with, serialized.
    """

    inputs: tuple[InputSpec, ...]
    sites: tuple[Site, ...]
    proof: Proof
    overwrites_inputs: bool = False
    structure: str = ""


class Program(ABC):
    """A lowered model: call it like the model, save it, ask what it holds."""

    target: str
    inputs: tuple[InputSpec, ...]
    sites: tuple[Site, ...]
    proof: Proof | None

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the artefact; raises InputError on inputs it was not built for."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artefact whole; raises ArtifactError if the folder cannot be written."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Size of the artefact as saved."""


def write_metadata(package: Path, target: str, about: Metadata) -> None:
    """Add what a program knows about itself to its archive."""
    sites = [{**asdict(replace(s, activation=None, weight=None)), **_tensors_of(s)} for s in about.sites]
    payload = {
        "inputs": [asdict(i) for i in about.inputs],
        "sites": sites,
        "proof": asdict(about.proof),
        "overwrites_inputs": about.overwrites_inputs,
        "structure": about.structure,
    }
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as out:
        root = out.namelist()[0].partition("/")[0]
        out.writestr(f"{root}/extra/{archive.NAME}", archive.text_of(target, payload))


def read_metadata(package: Path, target: str) -> Metadata:
    """What `write_metadata` stored; raises ArtifactError if `package` is no archive of `target`."""
    found = archive.read(package, target)
    proof = {**found["proof"], "comparison": Comparison(**found["proof"]["comparison"])}
    inputs = tuple(InputSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in found["inputs"])
    sites = tuple(_site_of(s) for s in found["sites"])
    return Metadata(inputs, sites, Proof(**proof), found["overwrites_inputs"], found["structure"])


def _tensors_of(site: Site) -> dict[str, Any]:
    return {name: _grid_of(getattr(site, name)) for name in ("activation", "weight")}


def _grid_of(qparams: QParams | None) -> dict[str, Any] | None:
    if qparams is None:
        return None
    return {**asdict(replace(qparams, scale=None, zero_point=None)), "dtype": str(qparams.dtype)}


def _site_of(stored: Mapping[str, Any]) -> Site:
    grids: Sequence[Mapping[str, Any] | None] = [stored["activation"], stored["weight"]]
    activation, weight = (
        QParams(**{**g, "dtype": getattr(torch, str(g["dtype"]).removeprefix("torch."))}) if g else None for g in grids
    )
    return Site(**{**stored, "activation": activation, "weight": weight})
