"""What the operators of a call take, by ONNX Runtime's own profiler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchquant.backends.onnx_qdq.kernels import site_name
from torchquant.backends.onnx_qdq.sessions import Session
from torchquant.files.owned import OwnFolder
from torchquant.measure.traced import Part, Traced

__all__ = ["traced_model"]

_ROUNDS, _WARMUP = 20, 3
_KERNEL, _RUN = "_kernel_time", "model_run"


def traced_model(model: bytes | Path, tensors: Sequence[torch.Tensor], sites: Sequence[str]) -> Traced:
    """The operators of the fastest of some calls, with the sites whose names they bear."""
    with OwnFolder("torchquant-onnx-") as folder:
        session = Session(model, profile=folder / "trace")
        for _ in range(_WARMUP + _ROUNDS):
            session(*tensors)
        events = json.loads(session.profile().read_text(encoding="utf-8"))
    calls = [(event, _within(event, events)) for event in events if event.get("name") == _RUN][_WARMUP:]
    if not calls:
        return Traced((), 0.0, "ONNX Runtime's profiler saw no call")
    whole, kernels = min(calls, key=lambda call: call[0]["dur"])
    parts = tuple(_part(event, set(sites)) for event in sorted(kernels, key=lambda event: event["ts"]))
    return Traced(parts, whole["dur"] / 1e3, "; by ONNX Runtime's profiler")


def _within(call: dict[str, Any], events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    end = call["ts"] + call["dur"]
    return [e for e in events if e.get("name", "").endswith(_KERNEL) and call["ts"] <= e["ts"] < end]


def _part(event: dict[str, Any], sites: set[str]) -> Part:
    site = site_name(event["name"].removesuffix(_KERNEL))
    return Part(event["args"]["op_name"], (site,) if site in sites else (), event["dur"] / 1e3)
