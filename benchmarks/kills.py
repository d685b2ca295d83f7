"""Processes killed in the middle of what they do, started again, and what came of it.

python benchmarks/kills.py [--kind brecq] [--kills 14] [--seed 0]

A process is killed (SIGKILL) at a random moment of an algorithm with checkpoints, of saving, of lowering with a cache
of its own, of building the kernels, or of `torchquant quantize`; then the same work is done again, to its end. Counted
are `differences` of its result from that of a run that nobody killed, bit for bit; `layers_lost`, at most: solved in
the first run and solved again in the second one (the one it was killed in counts); `half_files` at the place of a whole
one; and `leftovers`: folders of work in progress and files in the folder of temporary files after the second run.
`--kind compilers`: ten processes at once that find an empty cache, and how often the kernels were built. Compilers
do not optimize here, which only takes time. A row for each kind goes into `results/kills.json`.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import torch
from torch import nn

import torchquant as tq
from torchquant.algorithms.layers.layerwise import Layerwise
from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.cli import main as cli
from torchquant.files.owned import SUFFIX
from torchquant.files.whole import write_whole
from torchquant.ops.x86 import native
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer

KEY = ("kind", "seed")
Result = dict[str, torch.Tensor]
FORK = multiprocessing.get_context("fork")  # the children share what was imported, and kernels run on one thread
RESULT, LAYERS, OUT, CACHE, TEMPORARY = "result.pt", "layers.txt", "out", "cache", "tmp"
PROCESSES = 10
COMPILER = """#!/bin/sh
# Notes what it compiles. With QUICK it does not optimize: then a build takes seconds.
echo "$@" >> "$COMPILED"
if [ -n "$QUICK" ]; then exec g++ "$@" -O0; fi
exec g++ "$@"
"""


class Net(nn.Module):
    """Blocks of convolutions with outlying channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU())
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
        with torch.no_grad():
            self.norm.weight[5] *= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.first(x)).mean((2, 3))
        return x + self.down(self.up(self.norm(x)).relu())


def model() -> nn.Module:
    """The network, the same in every process."""
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def batches() -> list[tuple[torch.Tensor, ...]]:
    """Calibration data."""
    return [(torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i)),) for i in range(4)]


# what is killed -------------------------------------------------------------------------------------------------------


def optimized(algorithms: Callable[[], list[Any]]) -> Callable[[Path], Result]:
    """Algorithms with checkpoints, and values that go to disk."""

    def work(folder: Path) -> Result:
        prepared = tq.prepare(tq.export(model(), batches()[0]), X86Quantizer())
        tq.calibrate(prepared, batches(), progress=False)
        with layers_noted(folder / LAYERS):
            tq.optimize(
                prepared, batches(), algorithms(), checkpoint=folder / OUT, memory_bytes=200_000, progress=False
            )
        converted = tq.convert(prepared)
        return {**converted.state_dict(), "output": converted(*batches()[0])}

    return work


@contextmanager
def layers_noted(path: Path) -> Iterator[None]:
    """Write down each layer before it is solved."""
    solve = Layerwise.solve

    def noted(self: Layerwise, task: Any, clock: Any) -> Any:
        with path.open("a") as file:
            file.write(task.span.sites[0].name + "\n")
        return solve(self, task, clock)

    Layerwise.solve = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Layerwise.solve = solve  # type: ignore[method-assign]


@functools.cache
def converted(target: str) -> Any:
    """A converted graph for a target."""
    quantizer = {"x86": X86Quantizer, "xnnpack": XnnpackQuantizer}[target]()
    return tq.quantize(model(), batches()[0], batches(), quantizer=quantizer, progress=False)


def lowered(folder: Path) -> Result:
    """A program, from an empty folder of Inductor's and a cache that holds the kernels alone."""
    program = inductor_x86.lower(converted("x86"), batches()[0], progress=False)
    return {"output": inductor_x86.load(program.save(folder / OUT / "model.pt2"))(*batches()[0])}


def commanded(folder: Path) -> Result:
    """Two programs that the command wrote."""
    sys.argv = ["torchquant", "quantize", "kills:model", "--calibration", "kills:batches", "--out", str(folder / OUT)]
    sys.argv += ["--backend", inductor_x86.TARGET, "--backend", executorch_xnnpack.TARGET, "--algorithm", "adaround"]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"the command ended with {end.code}") from end
    return outputs(folder)


@functools.cache
def programs() -> tuple[Any, Any]:
    """What is saved over and over."""
    x86 = inductor_x86.lower(converted("x86"), batches()[0], progress=False)
    return x86, executorch_xnnpack.lower(converted("xnnpack"), batches()[0], progress=False)


def saved(folder: Path) -> Result:
    """A graph and two programs, each many times to the same place."""
    x86, xnnpack = programs()
    for _ in range(3):
        tq.save(converted("x86"), folder / OUT / "graph.pt2", batches()[0])
        x86.save(folder / OUT / f"{inductor_x86.TARGET}.pt2")
        xnnpack.save(folder / OUT / f"{executorch_xnnpack.TARGET}.pte")
    return outputs(folder)


def outputs(folder: Path) -> Result:
    """What the files in a folder compute, as far as they are there.

    Raises:
        ArtifactError: one is not whole.
    """
    load = {"graph.pt2": tq.load, f"{inductor_x86.TARGET}.pt2": inductor_x86.load}
    load[f"{executorch_xnnpack.TARGET}.pte"] = executorch_xnnpack.load
    load["model.pt2"] = inductor_x86.load
    return {name: load[name](path)(*batches()[0]) for name in load if (path := folder / OUT / name).exists()}


def built(folder: Path) -> Result:
    """The kernels, built in an empty cache (without optimization)."""
    content = native.library_file().read_bytes()
    return {"library": torch.frombuffer(bytearray(content), dtype=torch.uint8)}


@dataclass(frozen=True)
class Kind:
    """Work that is killed.

    Args:
        work: does it in a folder, and returns what it made.
        kills: how many moments.
        prepare: called once before, in the process that starts the others.
        has_kernels: whether the cache holds them at the start.
    """

    work: Callable[[Path], Result]
    kills: int
    prepare: Callable[[], object] = batches
    has_kernels: bool = True


KINDS = {
    "adaround": Kind(optimized(lambda: [tq.AdaRound(300)]), 14),
    "brecq": Kind(optimized(lambda: [tq.BRECQ(10, rounds=2)]), 14),
    "smooth-quant": Kind(optimized(lambda: [tq.SmoothQuant(), tq.AdaRound(300)]), 8),
    "lower": Kind(lowered, 6, lambda: converted("x86")),
    "command": Kind(commanded, 5),
    "build": Kind(built, 4, has_kernels=False),
    "save": Kind(saved, 6, programs),  # last: it loads the kernels into this process
}


# killing --------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What came of the kills of one kind."""

    kills: int = 0
    differences: int = 0
    layers_lost: int = 0
    half_files: int = 0
    leftovers: int = 0
    details: list[str] = field(default_factory=list)


def killed(kind: Kind, count: int, root: Path, seed: int) -> Counts:
    """Kill a kind of work at random moments."""
    draw, counts = random.Random(seed), Counts()
    kind.prepare()
    expected, seconds = undisturbed(kind, root / "undisturbed")
    while counts.kills < count:
        folder = root / str(counts.kills)
        shutil.rmtree(folder, ignore_errors=True)
        first = started(kind, folder)
        first.join(draw.uniform(0, seconds))
        first.kill()
        first.join()
        if first.exitcode == 0:  # it was faster than the one that nobody killed
            continue
        counts.kills += 1
        before = noted(folder)
        counts.half_files += not_whole(folder)
        second = started(kind, folder)
        second.join()
        again = noted(folder)[len(before) :]
        counts.layers_lost = max(counts.layers_lost, len(set(before) & set(again)))
        counts.differences += not same(folder, expected)
        left = leftovers(folder)
        counts.leftovers += len(left)
        counts.details += left
        shutil.rmtree(folder)
    return counts


def undisturbed(kind: Kind, folder: Path) -> tuple[Result, float]:
    """The result of a run that nobody kills, and its time."""
    start = time.perf_counter()
    process = started(kind, folder)
    process.join()
    if process.exitcode:
        log = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"the run that nobody killed ended with {process.exitcode}: {log}")
    return torch.load(folder / RESULT, weights_only=True), time.perf_counter() - start


def started(kind: Kind, folder: Path) -> Any:
    """A process at work in a folder, which has folders of its own for everything."""
    for name in (OUT, CACHE, TEMPORARY):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if kind.has_kernels:
        library = native.library_file()
        for path in (library, library.with_suffix(".sha256")):
            shutil.copy(path, folder / CACHE)
    process = FORK.Process(target=_work, args=(kind, folder))
    process.start()
    return process


def _work(kind: Kind, folder: Path) -> None:
    temporary = str(folder / TEMPORARY)
    tempfile.tempdir = temporary
    own = {"TMPDIR": temporary, "TORCHQUANT_CACHE": str(folder / CACHE), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.update(own, TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"))
    if not kind.has_kernels:
        os.environ.update(compiler(folder), QUICK="1")
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    result = {name: value.clone() for name, value in kind.work(folder).items()}
    write_whole(folder / RESULT, lambda part: torch.save(result, part))


def compiler(folder: Path) -> dict[str, str]:
    """Environment of a process whose compiler writes down what it is called with."""
    path = folder / "compiler.sh"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return {"CXX": str(path), "COMPILED": str(folder / "compiled.txt")}


def noted(folder: Path) -> list[str]:
    """The layers that were begun, in their order."""
    path = folder / LAYERS
    return path.read_text().split() if path.exists() else []


def same(folder: Path, expected: Result) -> bool:
    """Whether the second run ended, with the result of the one that nobody killed."""
    if not (folder / RESULT).exists():
        print(f"{folder}: {(folder / 'log.txt').read_text()[-2000:]}", flush=True)
        return False
    resumed = torch.load(folder / RESULT, weights_only=True)
    return resumed.keys() == expected.keys() and all(torch.equal(resumed[n], expected[n]) for n in expected)


def not_whole(folder: Path) -> int:
    """Files where a killed process would have put whole ones, that cannot be read.

    Checkpoints are read by the second run, which ends at a damaged one.
    """
    process = FORK.Process(target=outputs, args=(folder,))
    process.start()
    process.join()
    return int(process.exitcode != 0)


def leftovers(folder: Path) -> list[str]:
    """Folders of work in progress, and whatever is in the folder of temporary files."""
    marked = [path for path in folder.rglob(f"*{SUFFIX}") if path.is_dir()]
    return [str(p.relative_to(folder)) for p in {*marked, *(folder / TEMPORARY).iterdir()}]


# ten at once ----------------------------------------------------------------------------------------------------------


def compiled_by_many(folder: Path) -> dict[str, int]:
    """Ten processes load the kernels at once from an empty cache: how often they were compiled and linked."""
    environment = {**os.environ, **compiler(folder), "TORCHQUANT_CACHE": str(folder / "empty"), "QUICK": "1"}
    command = [sys.executable, "-W", "ignore", "-c", "from torchquant.ops.x86 import native; native.load()"]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(PROCESSES)]
    failed = sum(process.wait() != 0 for process in running)
    calls = (folder / "compiled.txt").read_text().splitlines()
    return {
        "processes": PROCESSES,
        "failed": failed,
        "builds": sum(" -shared " in f" {call} " for call in calls),
        "compiled": sum(" -c " in f" {call} " for call in calls),
        "leftovers": len(list((folder / "empty").glob(f"*{SUFFIX}"))),
    }


def main() -> None:
    """Kill, print and keep a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS, "compilers", "all"], default="all")
    parser.add_argument("--kills", type=int, help="of each kind; those of the committed rows if left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in [*KINDS, "compilers"] if options.kind == "all" else [options.kind]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"kind": name, "seed": options.seed}
            if name == "compilers":
                row |= compiled_by_many(Path(folder))
            else:
                counts = killed(KINDS[name], options.kills or KINDS[name].kills, Path(folder), options.seed)
                row |= {n: v for n, v in vars(counts).items() if n != "details"}
                print("\n".join(counts.details))
        records.write("kills", [row | {"seconds": round(time.perf_counter() - start)}], KEY)
        print("  ".join(f"{k}: {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
