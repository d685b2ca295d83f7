"""The C++ kernels of `ops/x86`: built once, by the compiler that Inductor uses, and loaded as a torch library.

The ops of a build are in a namespace that carries the digest of its sources. So builds of other sources, which came
with programs, are loaded beside our own, and each program calls the one that it was lowered for.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._ops import _OpNamespace
from torch.fx import GraphModule

from torchquant.errors import LoweringError
from torchquant.files.whole import write_whole
from torchquant.ops.builds import built, cache_folder, compiler, is_whole, own_folder, run_compiler

__all__ = [
    "PREFIX",
    "calls_ours",
    "instruction_sets",
    "is_at_hand",
    "library_file",
    "load",
    "load_packaged",
    "ops",
    "poisoned",
    "profiled",
    "supported",
    "use",
]

PREFIX = "torchquant-x86-"

_SOURCES = Path(__file__).parent
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_SETS = {
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": ("-DTQ_PORTABLE",),
}
_KERNELS = ("kernels", "row_kernels")  # compiled for each set
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-ivopts")
_COMPILER_BYTES = 10**9  # what one takes of memory
_TORCH = Path(torch.__file__).parent
# the oldest torch whose stable interface the library uses
_STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def supported() -> bool:
    """Whether this CPU is one that the kernels are written for."""
    return platform.machine() in ("x86_64", "AMD64")


def build_name() -> str:
    """The file name of a build of the present sources."""
    sources = sorted(f for f in _SOURCES.iterdir() if f.suffix in (".h", ".cpp"))
    content = b"".join(f.name.encode() + f.read_bytes() for f in sources) + repr((_SETS, _FLAGS, _STABLE)).encode()
    return f"{PREFIX}{hashlib.sha256(content).hexdigest()[:16]}.so"


def _namespace(name: str) -> str:
    """Where torch finds the ops of a build."""
    return Path(name).stem.replace("-", "_")


def ops() -> _OpNamespace:
    """The ops of the present sources, once `load` has been called: `ops().x86_region` and the others."""
    namespace: _OpNamespace = getattr(torch.ops, _namespace(build_name()))
    return namespace


def calls_ours(graph: GraphModule) -> bool:
    """Whether a graph calls one of `ops()`."""
    return any(getattr(node.target, "namespace", "") == _namespace(build_name()) for node in graph.graph.nodes)


def library_file() -> Path:
    """The shared library, built now if no build of these sources is in the cache.

    It holds every instruction set and chooses among them when it is loaded, so it may be copied to another
    x86 machine.

    Raises:
        LoweringError: the CPU is no x86, or there is no working C++ compiler; with the compiler's own words.
    """
    if not supported():
        raise LoweringError(f"torchquant's x86 kernels do not run on {platform.machine()}")
    return _built(cache_folder())


def _built(folder: Path) -> Path:
    return built(folder / build_name(), lambda place: _build(place))


def _build(folder: Path) -> Path:
    command = compiler()
    commands = [
        [
            command,
            *_FLAGS,
            *flags,
            f"-DTQ_ISA={name}",
            "-w",
            "-c",
            str(_SOURCES / f"{source}.cpp"),
            "-o",
            f"{folder / name}.{source}.o",
        ]
        for name, flags in _SETS.items()
        for source in _KERNELS
    ]
    include = [f"-I{_TORCH / 'include'}"]
    runtime = [
        command,
        *_FLAGS,
        _STABLE,
        f"-DTQ_NAMESPACE={_namespace(build_name())}",
        *include,
        "-c",
        str(_SOURCES / "runtime.cpp"),
        "-o",
        f"{folder / 'runtime'}.o",
    ]
    with ThreadPoolExecutor(_compilers_at_once()) as pool:
        list(pool.map(run_compiler, [*commands, runtime]))
    objects = [*(f"{folder / name}.{source}.o" for name in _SETS for source in _KERNELS), f"{folder / 'runtime'}.o"]
    library = folder / "kernels.so"
    run_compiler(
        [
            command,
            "-shared",
            "-s",
            *objects,
            "-o",
            str(library),
            f"-L{_TORCH / 'lib'}",
            "-ltorch_cpu",
            "-ltorch",
            "-lc10",
        ]
    )
    return library


def _compilers_at_once() -> int:
    """As many as there are cores, and as memory takes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        free = _COMPILER_BYTES * 64
    return max(
        1,
        min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            free // _COMPILER_BYTES,
        ),
    )


_loaded: dict[str, ctypes.CDLL] = {}  # by the name of the build


def load() -> ctypes.CDLL:
    """Build if needed and load: what is in `ops()` exists from now on.

    Raises:
        LoweringError: as `library_file`, or the library cannot be loaded.
    """
    name = build_name()
    if name not in _loaded:
        library = library_file()
        try:
            _load_file(name, library)
        except LoweringError:  # a folder from which nothing may be run
            if library.parent == own_folder():
                raise
            _load_file(name, _built(own_folder()))
    return _loaded[name]


def is_at_hand(name: str) -> bool:
    """Whether this process has a build, or the cache does, from which it is then loaded."""
    if name not in _loaded and name == build_name() and is_whole(cache_folder() / name):
        load()
    return name in _loaded


def load_packaged(name: str, content: bytes) -> None:
    """Load the library that came with a program, unless this process has that build, or the cache.

    What came with a program is never put into the cache, from which later programs take their library.

    Raises:
        LoweringError: it cannot be loaded here, or its ops are not those of its name.
    """
    if is_at_hand(name):
        return
    if _namespace(name).encode() not in content:  # loading ops that exist already would end the process
        raise LoweringError(f"{name} holds no kernels of that name: lower the model again")
    path = own_folder() / f"packaged-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        write_whole(path, lambda part: part.write_bytes(content))
    _load_file(name, path)


def _load_file(name: str, path: Path) -> None:
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LoweringError(f"torchquant's kernels cannot be loaded: {error}") from error
    library.torchquant_x86_sets.restype = ctypes.c_char_p
    library.torchquant_x86_profiled.restype = ctypes.c_int64
    library.torchquant_x86_profiled.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    _loaded[name] = library
    if name == build_name():  # what others' programs call was compiled already
        for op, fake in _FAKES.items():
            torch.library.register_fake(f"{_namespace(name)}::{op}", fake)


def _shapes(plan: torch.Tensor, inputs: list[torch.Tensor], shapes: list[int]) -> list[torch.Tensor]:
    """Outputs of a region: `shapes` holds for each output its rank and sizes; -1 - i stands for size i of input 0."""
    outputs, at = [], 0
    while at < len(shapes):
        sizes = shapes[at + 1 : at + 1 + shapes[at]]
        outputs.append(inputs[0].new_empty([inputs[0].shape[-1 - s] if s < 0 else s for s in sizes]))
        at += 1 + shapes[at]
    return outputs


def _attended(query: torch.Tensor, *_: object) -> torch.Tensor:
    """`(b, rows, heads, width)` from a query `(b, heads, rows, width)`."""
    b, heads, rows, width = query.shape
    return query.new_empty([b, rows, heads, width])


def _multiplied(packed: torch.Tensor, x: torch.Tensor, outputs: int, *_: object) -> torch.Tensor:
    """`(..., outputs)` from rows `(..., inputs)`."""
    return x.new_empty([*x.shape[:-1], outputs])


def _looked_up(packed: torch.Tensor, indices: torch.Tensor, width: int) -> torch.Tensor:
    """`(..., width)` from indices `(...)`."""
    return packed.new_empty([*indices.shape, width], dtype=torch.float32)


def _looked_up_floats(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`(..., width)` from indices `(...)`."""
    return table.new_empty([*indices.shape, table.shape[1]])


def _recurred(
    packed: torch.Tensor, given: torch.Tensor, state: torch.Tensor, cell: torch.Tensor | None, *_: object
) -> list[torch.Tensor]:
    """All states, in the order of the gates `(time, samples, gates * states)`, and of an LSTM the last cell."""
    states = given.new_empty([*given.shape[:2], state.shape[1]])
    return [states] if cell is None else [states, torch.empty_like(cell)]


_FAKES: dict[str, Callable[..., object]] = {
    "x86_region": _shapes,
    "x86_attention": _attended,
    "x86_linear": _multiplied,
    "x86_recurrent": _recurred,
    "x86_lookup": _looked_up,
    "x86_float_lookup": _looked_up_floats,
}


def instruction_sets() -> list[str]:
    """Those that this CPU runs, best first: of `avx512_vnni avx512 avx_vnni avx2 portable`."""
    return str(load().torchquant_x86_sets().decode()).split()


@contextmanager
def use(instruction_set: str) -> Iterator[None]:
    """Run regions with one of `instruction_sets()` inside the block, in all threads.

    Raises:
        LoweringError: this CPU does not run it.
    """
    if not load().torchquant_x86_use(instruction_set.encode()):
        raise LoweringError(f"this CPU does not run {instruction_set}; it runs {instruction_sets()}")
    try:
        yield
    finally:
        load().torchquant_x86_use(b"")


@contextmanager
def poisoned() -> Iterator[None]:
    """Make workspaces and outputs of the kernels NaN before each use inside the block, in all threads.

    What a kernel fails to write cannot then be what an earlier call wrote. `TORCHQUANT_POISON` in the environment of a
    process does so from its start.
    """
    before = load().torchquant_x86_poison(1)
    try:
        yield
    finally:
        load().torchquant_x86_poison(before)


def profiled(run: Callable[[], object], plans: Sequence[torch.Tensor], ops: Sequence[int]) -> list[list[float]]:
    """Microseconds that each of the `ops[i]` ops of `plans[i]` took while `run` ran, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    load().torchquant_x86_profile(1)
    try:
        run()
        profiled = load().torchquant_x86_profiled
        return [[profiled(p.data_ptr(), i) / 1e3 for i in range(n)] for p, n in zip(plans, ops, strict=True)]
    finally:
        load().torchquant_x86_profile(0)
        torch.set_num_threads(threads)
