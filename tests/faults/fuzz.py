"""Damaged and forged files of every kind, read in a process of their own, and what came of it.

    python fuzz.py FOLDER SEED KIND:FIRST:END ...

reads the mutations FIRST to END of the file of each kind in FOLDER, and prints a line before and after each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crafted
import numpy as np
import torch

import torchquant as tq
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.backends import executorch_xnnpack, inductor_cuda, inductor_x86
from torchquant.cli import sources
from torchquant.errors import TorchquantError, TorchquantWarning
from torchquant.files import tensors
from torchquant.ops.gpu import configs
from torchquant.ops.x86 import tuning
from torchquant.quantizers import CudaQuantizer
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

__all__ = ["KINDS", "OUTCOMES", "Result", "make", "run"]

OUTCOMES = ("refused", "same", "forged", "changed", "raw", "crash", "hang", "ran")
SECONDS = 60  # for one file
_SHARE = 1000  # files that one process reads
_Work = tuple[str, int, int]
_X = torch.linspace(-2, 2, 4 * 16).reshape(4, 16)


class Net(torch.nn.Module):
    """Two linears, and a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.register_buffer("seen", torch.zeros(4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.copy_(self.seen + x)
        return self.last(self.first(x + self.seen).relu())


# the kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        name: of the file.
        write: makes it, and what it needs, at a path.
        read: what the reader makes of it, in a form that `==` compares; raises what the reader raises.
        load: the same without running what was read, for files that are forged.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    load: Callable[[Path], Any] | None = None

    @property
    def is_archive(self) -> bool:
        return self.name.endswith((".pt2", ".npz"))


def _quantized(quantizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return tq.quantize(Net(), (_X,), [(_X,)], quantizer=quantizer, algorithms=(), progress=False, **options)


def _made_up(shape: Sequence[int]) -> torch.Tensor:
    return torch.linspace(-2, 2, math.prod(shape)).reshape(tuple(shape))


def _values(*values: Any) -> tuple[Any, ...]:
    return tuple(tensors.bytes_of(v) if isinstance(v, torch.Tensor) else str(v) for v in values)


def _graph(path: Path) -> Any:
    graph = tq.load(path)
    return _values(graph(_X), graph(_X), [(s.node, s.op, s.status, s.reason) for s in tq.report(graph).sites])


def _exported(path: Path) -> Any:
    graph = sources.load_model(str(path))
    return _values(graph(_X), graph(_X))


def _program(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        program = load(path)
        inputs = [_made_up([4 if s is None else s for s in spec.shape]) for spec in program.inputs]
        return _values(program(*inputs), program(*inputs), program.proof, program.sites)

    return read


def _cuda(path: Path) -> Any:
    program = inductor_cuda.load(path, "cpu")
    return _values(*program.graph(_X, *program.state.values()), program.proof, program.sites)


def _save_exported(path: Path) -> None:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Net().eval(), (_X,)), path)


def _arrays(path: Path) -> Any:
    return _values(*(v for batch in sources.load_batches(str(path)) for pair in sorted(batch.items()) for v in pair))


def _safetensors(path: Path) -> Any:
    read = tensors.read(path, path.read_bytes(), sealed=True)
    return _values(*(v for pair in sorted(read.items()) for v in pair))


_MEASURED = {str(i): i % 4 and i % 4 + 1 for i in range(12)}


def _panels(path: Path) -> bool:
    """Whether all that is taken from a table can be used."""
    tuning._file = lambda: path
    return all(panel in (0, 2, 3, 4) for panel in tuning._read().values())


def _cuts(path: Path) -> bool:
    measured = configs._measured(path)
    rows = [(f, int(m), configs.Config(**c)) for f, s in measured.items() for t in s.values() for m, c in t.items()]
    return all(config in configs.candidates(format, m) for format, m, config in rows)


def _write_cuts(path: Path) -> None:
    every = [(f, m, c) for f in configs.FORMATS for m in (1, 16, 256) for c in configs.candidates(f, m)[:2]]
    table: dict[str, Any] = {}
    for i, (format, m, config) in enumerate(every):
        table.setdefault(format, {}).setdefault(f"{64 * (i + 1)}x512", {})[str(m)] = vars(config)
    path.write_text(json.dumps(table))


class _Kept:
    """A run with checkpoints, of which one file is exchanged."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        self.exported = tq.export(self.model, (_X,))

    def run(self, folder: Path) -> Any:
        prepared = tq.prepare(self.exported, X86Quantizer())
        tq.calibrate(prepared, [(_X,)], progress=False)
        tq.optimize(prepared, [(_X,)], [SeqMSE(4)], checkpoint=folder, progress=False)
        return _values(tq.convert(prepared)(_X))

    def write(self, path: Path) -> None:
        folder = path.with_suffix("")
        self.run(folder)
        (folder / "00-00001.pt").rename(path)

    def read(self, path: Path) -> Any:
        folder = path.with_suffix("")
        (folder / "00-00001.pt").write_bytes(path.read_bytes())
        return self.run(folder)


_kept: list[_Kept] = []


def _run_kept() -> _Kept:
    if not _kept:
        _kept.append(_Kept())
    return _kept[0]


def _forged(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path) and None


KINDS = {
    "graph": Kind("graph.pt2", lambda p: tq.save(_quantized(X86Quantizer()), p, (_X,)), _graph, _forged(tq.load)),
    "exported": Kind("exported.pt2", _save_exported, _exported, _forged(lambda p: sources.load_model(str(p)))),
    "x86": Kind(
        "x86.pt2",
        lambda p: inductor_x86.lower(_quantized(X86Quantizer()), (_X,)).save(p),
        _program(inductor_x86.load),
        _forged(inductor_x86.load),
    ),
    "cuda": Kind(
        "cuda.pt2",
        lambda p: inductor_cuda.lower(_quantized(CudaQuantizer("w8a16")), (_X,), device="cpu").save(p),
        _cuda,
        _forged(lambda p: inductor_cuda.load(p, "cpu")),
    ),
    "pte": Kind(
        "xnnpack.pte",
        lambda p: executorch_xnnpack.lower(_quantized(XnnpackQuantizer()), (_X,)).save(p),
        _program(executorch_xnnpack.load),
    ),
    "safetensors": Kind(
        "states.safetensors",
        lambda p: p.write_bytes(tensors.stored({"a": _X, "b": torch.arange(40), "c": torch.ones(3).bfloat16()})),
        _safetensors,
    ),
    "checkpoint": Kind("kept.pt", lambda p: _run_kept().write(p), lambda p: _run_kept().read(p)),
    "panels": Kind("panels.json", lambda p: p.write_text(json.dumps(_MEASURED)), _panels),
    "cuts": Kind("cuts.json", _write_cuts, _cuts),
    "npz": Kind(
        "data.npz", lambda p: np.savez(p, x=np.arange(640.0).reshape(4, 160), y=np.ones((4, 2), "i4")), _arrays
    ),
}


def make(folder: Path, kind: str) -> Path:
    """The intact file of a kind, written unless it is there."""
    path = folder / KINDS[kind].name
    if not path.exists():
        KINDS[kind].write(path)
    return path


# mutations ------------------------------------------------------------------------------------------------------------


def _flip(content: bytearray, random: random.Random) -> None:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def _scatter(content: bytearray, random: random.Random) -> None:
    for _ in range(random.randint(2, 16)):
        content[random.randrange(len(content))] = random.randrange(256)


def _cut(content: bytearray, random: random.Random) -> None:
    del content[random.randrange(len(content)) :]


def _drop(content: bytearray, random: random.Random) -> None:
    start = random.randrange(len(content))
    del content[start : start + random.randint(1, 64)]


def _clear(content: bytearray, random: random.Random) -> None:
    start = random.randrange(len(content))
    end = min(len(content), start + random.randint(1, 512))
    content[start:end] = bytes(end - start)


def _repeat(content: bytearray, random: random.Random) -> None:
    start = random.randrange(len(content))
    content[start:start] = content[start : start + random.randint(1, 64)]


def _append(content: bytearray, random: random.Random) -> None:
    content += random.randbytes(random.randint(1, 64))


_BYTES = (_flip, _flip, _flip, _scatter, _cut, _drop, _clear, _repeat, _append)
_ODD: tuple[Any, ...] = (None, -1, 0, 2**63, 1e308, "", "x" * 300, [], {}, True, "../../etc/passwd", [[]], "__import__")


def _odd(value: Any, random: random.Random) -> Any:
    """JSON with one value somewhere exchanged or left out."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.9:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if random.random() < 0.1:
            del copy[key]
        else:
            copy[key] = _odd(value[key], random)
        return copy
    return random.choice(_ODD)


def _inside(source: Path, target: Path, random: random.Random, marker: Path) -> None:
    """An archive with one member damaged, exchanged for a pickle that runs something, or left out, and sealed again."""
    with zipfile.ZipFile(source) as opened:
        root = opened.namelist()[0].partition("/")[0] + "/" if source.suffix == ".pt2" else ""
    members = crafted.members(source) if root else {n: zipfile.ZipFile(source).read(n) for n in opened.namelist()}
    sealed = crafted.about(source)
    names = [n for n in members if not n.endswith(".so")]  # code is what its writer makes it
    name = random.choice(names)
    way = random.random()
    if sealed is not None and way < 0.3:
        sealed = {**_odd({k: v for k, v in sealed.items() if k not in crafted.SEAL}, random)} or {}
        sealed["kind"] = crafted.about(source)["kind"]
    elif name.endswith(".json") and way < 0.8:
        members[name] = json.dumps(_odd(json.loads(members[name]), random)).encode()
    elif way < 0.85:
        del members[name]
    elif way < 0.93:
        members[name] = crafted.pickled(f"touch {marker}")
    else:
        content = bytearray(members[name] or b"\0")
        random.choice(_BYTES)(content, random)
        members[name] = bytes(content)
    crafted.write(target, members, sealed, root)


def _mutate(kind: Kind, source: Path, target: Path, random: random.Random, marker: Path) -> bool:
    """Write a mutation; whether it is forged: whatever holds digests or checksums was made to fit."""
    if kind.is_archive and random.random() < 0.3:
        try:
            _inside(source, target, random, marker)
            return True
        except (KeyError, TypeError, ValueError):  # nothing left to seal
            pass
    content = bytearray(source.read_bytes())
    random.choice(_BYTES)(content, random)
    target.write_bytes(content)
    return False


# the process that reads -----------------------------------------------------------------------------------------------


def _outcome(kind: Kind, path: Path, forged: bool, expected: Any) -> tuple[str, str]:
    try:
        read = kind.load if forged and kind.load else kind.read
        value = read(path)
    except (TorchquantError, TorchquantWarning) as error:
        return "refused", type(error).__name__
    except Exception as error:
        return "raw", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if forged:
        return "forged", ""
    return ("same" if value == expected else "changed"), ""


def _serve(folder: Path, seed: int, name: str, first: int, end: int) -> None:
    kind, source = KINDS[name], make(folder, name)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        path, marker = Path(scratch) / kind.name, Path(scratch) / "ran"
        if source.with_suffix("").is_dir():
            shutil.copytree(source.with_suffix(""), path.with_suffix(""))
        path.write_bytes(source.read_bytes())
        expected = kind.read(path)
        for number in range(first, end):
            print("reading", name, number, flush=True)
            forged = _mutate(kind, source, path, random.Random(f"{seed} {name} {number}"), marker)
            outcome, detail = _outcome(kind, path, forged, expected)
            if marker.exists():
                outcome, detail = "ran", "the payload ran"
                marker.unlink()
            print("outcome", name, number, outcome, detail.encode("ascii", "replace").decode(), flush=True)
        os.chdir(folder)


# the process that counts ----------------------------------------------------------------------------------------------


@dataclass
class Result:
    """How often what happened, and the first files of each bad outcome by number."""

    counts: Counter[str] = field(default_factory=Counter)
    details: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def note(self, number: int, outcome: str, detail: str) -> None:
        self.counts[outcome] += 1
        if outcome in OUTCOMES[3:]:
            self.details.setdefault(outcome, []).append((number, detail))


def run(folder: Path, kinds: Sequence[str], count: int, seed: int = 0) -> dict[str, Result]:
    """Read `count` mutations of each kind; a process that dies or hangs is followed by another."""
    results = {kind: Result() for kind in kinds}
    for kind in kinds:
        make(folder, kind)
    left = [(kind, first, min(count, first + _SHARE)) for kind in kinds for first in range(0, count, _SHARE)]
    while left:
        share = left[: len(kinds)] if count <= _SHARE else left[:1]
        left = [*_unread(folder, share, seed, results), *left[len(share) :]]
    return results


def _unread(folder: Path, share: list[_Work], seed: int, results: dict[str, Result]) -> list[_Work]:
    """Read some in one process; returns what is left of them after one at which it died."""
    command = [sys.executable, "-W", "ignore", __file__, str(folder), str(seed)]
    command += [":".join(map(str, work)) for work in share]
    log, reading, done = folder / "errors.log", None, Counter[str]()
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        for line in _lines(child):
            word, kind, number, *rest = [*line.split(" ", 4), "", ""][:5]
            if word == "reading":
                reading = (kind, int(number))
            elif word == "outcome":
                results[kind].note(int(number), rest[0].strip(), rest[1].strip())
                reading = None
                done[kind] += 1
    if reading is not None:
        kind, number = reading
        results[kind].note(number, "hang" if child.returncode == -signal.SIGKILL else "crash", f"{child.returncode}")
        done[kind] += 1
    elif child.returncode:
        raise RuntimeError(f"{share}: {log.read_text(errors='replace')[-2000:]}")
    return [(kind, first + done[kind], end) for kind, first, end in share if first + done[kind] < end]


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    """What it prints; it is killed if it prints nothing for too long."""
    assert child.stdout is not None
    timer = threading.Timer(SECONDS, child.kill)
    timer.start()
    for line in child.stdout:
        timer.cancel()
        timer = threading.Timer(SECONDS, child.kill)
        timer.start()
        yield line.rstrip("\n")
    timer.cancel()


def _main(folder: str, seed: str, *work: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in work:
        kind, first, end = part.split(":")
        _serve(Path(folder), int(seed), kind, int(first), int(end))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        _main(*sys.argv[1:])
