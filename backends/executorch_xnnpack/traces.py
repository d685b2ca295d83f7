"""The time of each op of a `.pte`, as ExecuTorch's own event tracer sees it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from torchquant.backends.executorch_xnnpack.quiet import undisturbed, without_cpu_lines
from torchquant.files.owned import OwnFolder
from torchquant.measure.traced import Part, Traced

__all__ = ["parts_of", "traced_program"]

_ROUNDS, _WARMUP = 20, 3
_EXECUTE, _DELEGATE = "Method::execute", "DELEGATE_CALL"
_WHOLE = (_DELEGATE, _EXECUTE, "OPERATOR_CALL")  # what holds other events, which come before it
_BESIDE = "delegate, beside its ops"


def traced_program(buffer: bytes, tensors: Sequence[torch.Tensor]) -> Traced:
    """The ops of a call, those inside of the delegate too; none, with the reason, where the runtime has no tracer."""
    try:
        with undisturbed():
            runtime: Any = import_module("executorch.extension.pybindings.portable_lib")
            inspector: Any = import_module("executorch.devtools").Inspector
    except ImportError as error:
        return Traced((), 0.0, f"ExecuTorch's devtools are not installed: {error}")
    inputs = [t.detach().contiguous() for t in tensors]
    with OwnFolder("torchquant-etdump-") as folder, without_cpu_lines(), undisturbed():
        module = runtime._load_for_executorch_from_buffer(buffer, enable_etdump=True)
        if not module.has_etdump():
            return Traced((), 0.0, "this ExecuTorch was built without its event tracer: the whole alone is timed")
        for _ in range(_WARMUP + _ROUNDS):
            module.forward(inputs)
        file = folder / "trace.etdp"
        module.write_etdump_result_to_file(str(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what was not asked for
            blocks = inspector(etdump_path=str(file)).event_blocks
    events = [event for block in blocks if block.name == "Execute" for event in block.events]
    times = {id(event): list(event.perf_data.raw) for event in events if event.perf_data is not None}
    whole = next((times[id(event)] for event in events if event.name == _EXECUTE), [])
    if len(whole) <= _WARMUP:
        return Traced((), 0.0, "ExecuTorch's event tracer saw no call")
    fastest = min(range(_WARMUP, len(whole)), key=whole.__getitem__)
    rows = [
        (event.name, times[id(event)][fastest], bool(event.is_delegated_op))
        for event in events
        if len(times.get(id(event), ())) == len(whole)
    ]
    return Traced(tuple(parts_of(rows)), whole[fastest], "; by ExecuTorch's event tracer")


def parts_of(rows: Iterable[tuple[str, float, bool]]) -> Iterator[Part]:
    """The parts of one call: ops, and of each call of the delegate what it takes beside its ops.

    XNNPACK counts its ops in whole microseconds and drops the rest of each; ExecuTorch times the call that holds them.

    Args:
        rows: name, milliseconds and whether it is an op in the delegate, of each event, what holds others behind them.
    """
    inside = 0.0
    for name, ms, is_delegated in rows:
        if name == _DELEGATE:
            yield Part(_BESIDE, (), max(0.0, ms - inside))
            inside = 0.0
        elif name not in _WHOLE:
            inside += ms if is_delegated else 0.0
            yield Part(name, (), ms)
