"""Quantized linears on this GPU: checks, layers, a Llama end to end, where its time goes, and small networks whole.

python benchmarks/gpu.py [--section layers] [--seconds 510] [--layers 32] [--no-tune] [--out FOLDER]

Everything is measured with CUDA graphs over rotating copies of the weights, so that caches do not flatter; ceilings of
bandwidth and arithmetic are measured in the same run. Cuts are searched for first and, with --write-table, become those
that the package brings. `--device cpu --tiny` runs every line with small sizes and writes nothing.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_layers
import gpu_llama
import records
import torch
from gpu_setup import KEY, Row, Setup, reason, report, spread
from networks import load_network

import torchquant as tq
from torchquant.ops.gpu import timing, tuning
from torchquant.ops.gpu.products import Product

SECTIONS = ("checks", "layers", "end to end", "profile", "networks", "more layers")
FIRST_LAYERS, MORE_LAYERS = ("8B",), ("70B", "8B more", "70B more")
NETWORKS = {
    "lite0": ("static_int8", "dynamic_int8", "static_fp8"),
    "minilm": ("dynamic_int8", "dynamic_fp8"),
    "smollm2": ("dynamic_int8", "dynamic_fp8", "w4a16_g64"),
}
_SAMPLES = 7
MEASURED = Path(tuning.__file__).parent / "measured"


def main() -> int:
    """Run the sections; 1 if a check failed."""
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # torchao's linears are one function with many kinds of weights
    setup = Setup(options.device, options.tiny, options.seconds, options.tune, options.layers)
    rows = run(setup, options.section or list(SECTIONS), Results(setup, options.out))
    if setup.gpu and setup.tune:
        print(f"cuts written to {tuning.write_table(MEASURED if options.write_table else options.out / 'measured')}")
    wrong = [r for r in rows if r.get("right") is False]
    skipped = [r for r in rows if "skipped" in r]
    print(f"\n{len(rows)} rows; {len(wrong)} checks failed; {len(skipped)} skipped; {setup.left_s:.0f} s left")
    for row in (*wrong, *skipped):
        report({"section": "", "": "FAILED" if "right" in row else "skipped", **row})
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="repeatable; all if left out")
    parser.add_argument("--seconds", type=float, default=510, help="what does not start in this time is skipped")
    parser.add_argument("--layers", type=int, default=32, help="of the Llama")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="measure the cuts known now")
    parser.add_argument("--write-table", action="store_true", help="the cuts found become the package's")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing written: a trial of this script")
    options = parser.parse_args()
    if options.tiny != (options.device == "cpu"):
        parser.error("--device cpu and --tiny go together: a CPU's times mean nothing here")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try --device cpu --tiny")
    return options


class Results:
    """Rows as they come, on disk after each section."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder, self.rows = setup, folder, list[Row]()
        self.about = {"gpu": torch.cuda.get_device_name(), "triton": _version("triton")} if setup.gpu else {}

    def add(self, rows: Iterator[Row]) -> None:
        """Take the rows of a section and write them, also those of one that ends with an error."""
        section_rows = []
        try:
            section_rows.extend(rows)
        finally:
            self.rows += section_rows
            if self.setup.gpu:
                records.write("gpu", section_rows, KEY, folder=self.folder, about=self.about)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run(setup: Setup, sections: list[str], results: Any) -> list[Row]:
    """The sections in their order; one that fails or comes too late leaves a row that says so."""
    compiling = _precompiling(setup, sections) if setup.gpu else None
    best, rows = gpu_layers.ceilings(setup)
    results.add(iter(rows))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "checks": lambda: gpu_checks.checks(setup),
        "layers": lambda: gpu_layers.layers(setup, best, FIRST_LAYERS),
        "end to end": lambda: gpu_llama.end_to_end(setup),
        "profile": lambda: _profile(setup, results.rows),
        "networks": lambda: _networks(setup),
        "more layers": lambda: gpu_layers.layers(setup, best, MORE_LAYERS),
    }
    sections = [name for name in SECTIONS if name in sections]
    for name in sections:
        print(f"\n{name}; {setup.left_s:.0f} s left", flush=True)
        if setup.left_s <= 0:
            results.add(iter([_note(name, skipped="no time left")]))
            continue
        if name in ("layers", "more layers") and compiling is not None:
            for failure in compiling.wait():
                print(f"  not compiled: {failure}")
            compiling = None
        try:
            results.add(parts[name]())
        except Exception as error:
            results.add(iter([_note(name, missing=reason(error))]))
    if compiling is not None:
        compiling.wait()
    return results.rows


def _note(section: str, **more: Any) -> Row:
    row = {"section": section, "case": "", "format": "", "m": 0, "runtime": "", **more}
    report({**row, "section": "", "": section})
    return row


def _precompiling(setup: Setup, sections: list[str]) -> Any:
    """Processes that compile what is to come, while the first sections run."""
    from torchquant.ops.gpu.precompile import Precompiling

    requests = gpu_checks.requests(setup) if "checks" in sections else []
    groups = [*FIRST_LAYERS * ("layers" in sections), *MORE_LAYERS * ("more layers" in sections)]
    if setup.tune:
        products = (p for group in groups for _, p in gpu_layers.products(setup, group))
        requests += tuning.requests(products, gpu_layers.ROWS)
    print(f"compiling {len(requests)} kernels", flush=True)
    return Precompiling(requests)


def _profile(setup: Setup, rows: list[Row]) -> Iterator[Row]:
    """The kernels of our layers that are furthest from their bounds; steps of the Llama bring their own."""
    mine = [r for r in rows if r["section"] == "layers" and r["runtime"] == "torchquant" and "us" in r]
    for m in sorted({r["m"] for r in mine}):
        worst = min((r for r in mine if r["m"] == m), key=lambda r: r["of_bound"])
        product = Product(worst["format"], worst["n"], worst["k"], 128 if worst["format"] == "w4a16" else 0)
        x, weight = product.x(m, setup.device), product.weight(setup.device)
        product.run(x, weight)
        kernels = gpu_llama.kernels(setup, lambda p=product, x=x, w=weight: p.run(x, w))
        row = {key: worst[key] for key in ("case", "format", "m", "runtime", "us", "bound_us", "of_bound")}
        row = {"section": "profile", **row, "kernels": kernels}
        report({**row, "": "; ".join(f"{k['name']} {k['us']:.0f} us" for k in kernels[:4])})
        yield row


# whole networks --------------------------------------------------------------------------------------------------


def _networks(setup: Setup) -> Iterator[Row]:
    """Lowered against converted, on the device, and against float: closeness, and time where both are compiled."""
    for name, schemes in NETWORKS.items() if setup.gpu else {"tiny": NETWORKS["minilm"]}.items():
        float_sample: timing.Sampler | None = None
        for scheme in schemes:
            row: Row = {"section": "networks", "case": name, "format": scheme, "m": 0, "runtime": "torchquant"}
            if setup.left_s <= 0:
                row["skipped"] = "no time left"
            else:
                try:
                    model, inputs = _network(setup, name)
                    float_sample = float_sample or _sample(setup, model, inputs)
                    row |= {"samples": len(inputs[0]), **_lowered(setup, model, inputs, scheme, float_sample)}
                except SystemExit as missing:  # data or weights are not here
                    row["skipped"] = str(missing)[:200]
                except Exception as error:
                    row["missing"] = reason(error)
            report(row)
            yield row
        torch._dynamo.reset()


def _network(setup: Setup, name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """In bfloat16 on the device, with a batch of data."""
    if name == "tiny":
        layers = [torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128)]
        model, batch = torch.nn.Sequential(*layers), (torch.randn(4, 128),)
    else:
        network = load_network(name)
        model, batch = network.model, network.held_out[0]
    inputs = (t.to(setup.device, torch.bfloat16 if t.is_floating_point() else t.dtype) for t in batch)
    return model.to(setup.device, torch.bfloat16).requires_grad_(False).eval(), tuple(inputs)


def _sample(setup: Setup, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> timing.Sampler:
    """Of the compiled model."""
    run = torch.compile(model, dynamic=False)

    def call() -> object:
        with torch.no_grad():
            return run(*inputs)

    return setup.capture([call])


def _lowered(
    setup: Setup,
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    scheme: str,
    float_sample: timing.Sampler,
) -> Row:
    from torchquant.backends import inductor_cuda

    converted = gpu_llama.quantized(gpu_llama.exported(model, inputs), inputs, scheme)
    lowered = inductor_cuda.transform(converted)
    with torch.no_grad():
        expected, y, exact = converted(*inputs), lowered(*inputs), model(*inputs)
    ops = [n for n in lowered.graph.nodes if n.op == "call_function" and "torchquant" in str(n.target)]
    row = {"products": len(ops), "sqnr_db": tq.sqnr_db(expected.float(), y.float())}
    row["sqnr_to_float_db"] = tq.sqnr_db(exact.float(), y.float())
    times = timing.in_turns({"float": float_sample, "ours": _sample(setup, lowered, inputs)}, _SAMPLES)
    (float_us, _), (us, iqr) = spread(times["float"]), spread(times["ours"])
    return {**row, "us": us, "iqr_us": iqr, "float_us": float_us, "ratio": float_us / us}


if __name__ == "__main__":
    raise SystemExit(main())
