"""Quantize a language model of random weights that is larger than the memory a child process may use (Linux).

python benchmarks/larger_than_memory.py [--shape llama7b] [--layers 12] [--limit-mib 1800] [--algorithm nearest]
python benchmarks/larger_than_memory.py --in-memory [--shape small] [--layers 8]     memory of export .. convert instead
python benchmarks/larger_than_memory.py --paper                                      what 70B would take, of the rows

TMPDIR names a folder with room for the model twice, on a disk.
The limit is that of a memory cgroup, so it holds for all that the child uses, cached pages of files included; without
the right to make one it is RLIMIT_DATA, which counts what is private to the process. `peak_anonymous_bytes` is sampled:
what the system could not drop.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import records

KEY = ("shape", "layers", "algorithm", "scheme")
CGROUPS = Path("/sys/fs/cgroup/memory")
SHAPES = {  # hidden, intermediate, heads, heads of keys and values, vocabulary, dtype in the file
    "small": (1024, 2816, 8, 4, 16384, "float32"),
    "square": (2048, 2048, 16, 8, 16384, "float32"),
    "llama7b": (4096, 11008, 32, 32, 32000, "bfloat16"),
    "llama70b": (8192, 28672, 64, 8, 128256, "bfloat16"),
}
TOKENS = (4, 128)  # windows and their length
MEMORY_BYTES = 64 << 20  # of activations
FLOAT = ["op:embedding", "model.lm_head"]  # which folders of packed linears have as floats in any case


def main() -> None:
    """Measure, print and keep a row."""
    options = arguments().parse_args()
    if options.paper:
        print(json.dumps(paper(records.read("larger_than_memory")["rows"]), indent=1))
        return
    if options.child:
        print(json.dumps(in_memory(options) if options.in_memory else child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        source, place = Path(folder) / "source", Path(folder)
        weights, size = write_model(source, options.shape, options.layers)
        row = {"shape": options.shape, "layers": options.layers, "algorithm": options.algorithm}
        row |= {"scheme": options.scheme, "weights": weights, "model_bytes": size}
        if options.in_memory:
            row["algorithm"] = f"convert in memory, {options.algorithm}"
            row |= run_child(options, source, place, None)
            name = "converted_memory"
        else:
            limit = options.limit_mib << 20
            row |= {"limit_bytes": limit, "model_over_limit": size / limit}
            with limited(limit) as (kind, join):
                row |= {"limit_kind": kind, **run_child(options, source, place, join)}
            row["seconds_per_layer"] = row["seconds"] / options.layers
            row["model_over_limit_beyond_imports"] = size / (limit - row["imports_anonymous_bytes"])
            name = "larger_than_memory"
    if options.keep:
        records.write(name, [row], KEY)
    print("  ".join(f"{k}: {v / 1e6:,.0f} MB" if k.endswith("bytes") else f"{k}: {v}" for k, v in row.items()))


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama7b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--limit-mib", type=int, default=1800)
    parser.add_argument("--algorithm", choices=("nearest", "gptq", "gptq_paper"), default="nearest")
    parser.add_argument("--scheme", default="w4_symmetric_g32")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="print the row, and keep none")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    return parser


# the model ------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, shape: str, layers: int) -> tuple[int, int]:
    """A Llama of random weights, a file a layer; returns its weights and bytes."""
    import safetensors.torch
    import torch

    hidden, inner, heads, groups, vocabulary, dtype = SHAPES[shape]
    side = hidden // heads * groups
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (side, hidden)}
    sizes |= {"self_attn.v_proj": (side, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    parts = [{f"model.layers.{i}.{n}.weight": s for n, s in {**sizes, **norms}.items()} for i in range(layers)]
    parts += [{"model.embed_tokens.weight": (vocabulary, hidden)}, {"lm_head.weight": (vocabulary, hidden)}]
    parts += [{"model.norm.weight": (hidden,)}]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    generator, weights = torch.Generator().manual_seed(0), 0
    for i, part in enumerate(parts):
        name = f"model-{i:05d}.safetensors"
        tensors = {
            n: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * s[1] ** -0.5
            for n, s in part.items()
        }
        safetensors.torch.save_file(
            {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, folder / name, {"format": "pt"}
        )
        index |= dict.fromkeys(part, name)
        weights += sum(t.numel() for t in tensors.values())
        forget_pages(folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights, sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def forget_pages(path: Path) -> None:
    """Let the system drop the cached pages of a file, which would else count for nobody in the child's group."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# the limit ------------------------------------------------------------------------------------------------------------


@contextmanager
def limited(limit_bytes: int) -> Iterator[tuple[str, Any]]:
    """What the limit is, and what a child does to put itself under it."""
    group = CGROUPS / f"torchquant-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        return
    try:
        yield "cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def run_child(options: argparse.Namespace, source: Path, folder: Path, join: Any) -> dict[str, Any]:
    """What a child under the limit measured."""
    given = [f"--{n}={getattr(options, n)}" for n in ("shape", "layers", "algorithm", "scheme", "format")]
    flags = ["--in-memory"] if options.in_memory else []
    command = [sys.executable, __file__, *given, *flags, "--child", str(source), str(folder)]
    done = subprocess.run(command, preexec_fn=join, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the child ended with {done.returncode}: out of memory if that is -9")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


# the child ------------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Samples memory that is private to the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.peak = anonymous_bytes()
        self._ended = threading.Event()

    def run(self) -> None:
        """Until `end`."""
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())

    def end(self) -> int:
        """The most that was seen."""
        self._ended.set()
        self.join()
        return self.peak


def anonymous_bytes() -> int:
    """Memory of this process that is no cache of a file."""
    return 1024 * _status("RssAnon")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def algorithms_of(name: str) -> tuple[Any, ...]:
    """What `--algorithm` names."""
    import torchquant as tq

    paper_settings: dict[str, Any] = {"search": False, "sweeps": 0, "refits": 0, "compensate": False, "damp": 0.01}
    return {"nearest": (), "gptq": (tq.GPTQ(),), "gptq_paper": (tq.GPTQ(**paper_settings),)}[name]


def child(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize from disk to disk."""
    import torch

    import torchquant as tq
    import torchquant.language.streaming
    from torchquant.quantizers import X86Quantizer

    algorithms, quantizer = algorithms_of(options.algorithm), X86Quantizer(options.scheme, exclude=FLOAT)
    source, destination = Path(options.child[0]), Path(options.child[1]) / "quantized"
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SHAPES[options.shape][4], TOKENS, generator=generator) if algorithms else None
    watch, start = Watch(), time.perf_counter()
    watch.start()
    saved = tq.quantize_checkpoint(
        source,
        destination,
        quantizer,
        format=options.format,
        algorithms=algorithms,
        tokens=tokens,
        memory_bytes=MEMORY_BYTES,
        progress=False,
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "imports_anonymous_bytes": watch.first,
        "peak_anonymous_bytes": watch.end(),
        "peak_resident_bytes": 1024 * _status("VmHWM"),
        "saved_bytes": saved.size_bytes,
        "activation_budget_bytes": MEMORY_BYTES,
    }


def in_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The ordinary route: how much export, prepare, calibrate and convert add to the float model."""
    import torch

    import torchquant as tq
    from torchquant.files.freed import give_back
    from torchquant.fx.passes import weight_bytes
    from torchquant.fx.states import states_of
    from torchquant.quantizers import X86Quantizer

    checkpoint = tq.load_causal_lm(options.child[0])
    give_back()
    watch, start = Watch(), time.perf_counter()
    watch.start()
    exported = tq.export_causal_lm(checkpoint.model, TOKENS[1])
    places = torch.arange(TOKENS[1])
    batch = (torch.zeros(1, TOKENS[1], dtype=torch.int64), places, places)
    quantized = tq.quantize(
        exported, batch, [batch], quantizer=X86Quantizer(options.scheme), algorithms=(), progress=False
    )
    seconds, peak = time.perf_counter() - start, watch.end()
    model = sum(p.nbytes for p in checkpoint.model.parameters())
    weights = sum(p.numel() for p in checkpoint.model.parameters())
    kept = weight_bytes(quantized) - sum(v.nbytes for v in states_of(quantized).values())
    return {
        "seconds": seconds,
        "float_bytes": model,
        "beyond_model_over_model": (peak - watch.first) / model,
        "bytes_per_weight": kept / weights,
    }


# on paper -------------------------------------------------------------------------------------------------------------


def paper(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What Llama 3 70B would take, scaled from the widest measured row of rounding to nearest.

    Memory: what the imports take, and the rest in proportion to the largest float32 weight. Time: in proportion to the
    weights. GPTQ also holds, for the layer with the most inputs, what `moments_bytes` says.
    """
    nearest = max((r for r in rows if r["algorithm"] == "nearest"), key=lambda r: r["weights"])
    hidden, inner, heads, groups, vocabulary, _ = SHAPES["llama70b"]
    layers = 80
    linears = 2 * hidden * hidden + 2 * hidden * hidden // heads * groups + 3 * hidden * inner
    weights = layers * linears + 2 * vocabulary * hidden
    h, i, _, _, v, _ = SHAPES[nearest["shape"]]
    own = nearest["peak_anonymous_bytes"] - nearest["imports_anonymous_bytes"]
    largest = {"table": 4 * vocabulary * hidden, "linear": 4 * hidden * inner}
    copies = own / (4 * max(v * h, h * i))
    needed = {n: int(nearest["imports_anonymous_bytes"] + copies * b) for n, b in largest.items()}
    tables = 2 * v * h
    packed = (nearest["saved_bytes"] - 4 * tables) / (nearest["weights"] - tables)  # tables are float32 in the result
    return {
        "of": {k: nearest[k] for k in ("shape", "layers", "algorithm", "scheme", "weights", "date")},
        "float32_copies_of_the_largest_weight": round(copies, 2),
        "weights": weights,
        "nearest_bytes_set_by_the_largest": needed,
        "nearest_fits": {f"{gb} GB": max(needed.values()) < gb * 1e9 for gb in (24, 8)},
        "nearest_hours": round(nearest["seconds"] * weights / nearest["weights"] / 3600, 1),  # as loaded as it was
        "result_bytes": int(packed * layers * linears + 4 * 2 * vocabulary * hidden),
        "gptq_moments_bytes": moments_bytes(inner),
        "gptq_moments_fit": {f"{gb} GB": max(moments_bytes(inner).values()) < gb * 1e9 for gb in (24, 8)},
    }


def moments_bytes(inputs: int) -> dict[str, int]:
    """Of a linear: sums in float64 of both sides over two halves of the data, as they are collected."""
    square = inputs * inputs
    return {"collected_float64": 4 * 8 * square, "kept_float32": 4 * 4 * square, "factor_float64": 3 * 8 * square}


if __name__ == "__main__":
    main()
