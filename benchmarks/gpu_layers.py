"""Single products on a GPU: ours against cuBLAS in bfloat16, torchao, and what the chip could do at best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_setup import Call, Row, Setup, Weight, reason, report, spread

from torchquant.ops.gpu import configs, timing, tuning
from torchquant.ops.gpu.products import GRIDS, Product

__all__ = ["FORMATS", "ROWS", "SHAPES", "Ceilings", "ceilings", "layers", "products"]

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
FORMATS = ("w4a16", "w8a16", "int8", "fp8")
SHAPES = {  # (outputs, inputs) of Llama 3; projections that read the same are one product once lowered
    "8B": {
        "q k v": (6144, 4096),
        "o": (4096, 4096),
        "gate up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
    "8B more": {"k": (1024, 4096), "gate": (14336, 4096)},
    "70B": {"q k v": (10240, 8192), "o": (8192, 8192), "gate up": (57344, 8192), "down": (8192, 28672)},
    "70B more": {"k": (1024, 8192), "gate": (28672, 8192), "lm_head": (128256, 8192)},
}
TINY_SHAPES = {"8B": {"o": (48, 256)}, "70B": {"down": (32, 384)}}
BESIDE_TORCHAO = ("o", "gate up", "down")  # of the 8B: each compiles anew
_HEAD_ROWS = 64  # only the last token of a sequence goes through lm_head
_SAMPLES = 7
Peer = Callable[[torch.Tensor], list[Call]]  # from an activation, a call for each copy of the weight


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run.

    Args:
        bytes_per_s: copying, bytes read and written counted.
        ops_per_s: format -> of a large product, a multiply and an add counted as two.
    """

    bytes_per_s: float
    ops_per_s: dict[str, float]

    def us(self, format: str, weight_bytes: int, m: int, n: int, k: int) -> float:
        """The time of a product that reads and writes everything once: the longer of memory and arithmetic."""
        moved = (weight_bytes + 2 * m * (n + k)) / self.bytes_per_s
        return 1e6 * max(moved, 2 * m * n * k / self.ops_per_s[format if format in GRIDS else "bf16"])


def ceilings(setup: Setup) -> tuple[Ceilings, list[Row]]:
    """Measure them."""
    device, size, count = (setup.device, 8192, 1 << 30) if setup.gpu else (setup.device, 64, 1 << 16)
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    codes = [torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2)]
    floats = [v.to(torch.float8_e4m3fn) for v in (a, b)]
    one = torch.ones(1, device=device)
    calls: dict[str, Call] = {
        "copy": lambda: torch.neg(source, out=target),  # faster than a copy that a graph makes
        "bf16": lambda: a @ b.t(),
        "int8": lambda: torch._int_mm(codes[0], codes[1].t()),
        "fp8": lambda: torch._scaled_mm(
            floats[0], floats[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }
    rates: dict[str, float] = {}
    rows = []
    for name, call in calls.items():
        row: Row = {"section": "ceilings", "case": name, "format": "", "m": size, "runtime": "library"}
        try:
            sample = setup.capture([call, call])
            us, iqr = spread([sample() for _ in range(_SAMPLES)])
            rates[name] = 1e6 * (2 * count if name == "copy" else 2 * size**3) / us
            rows.append({**row, "us": us, "iqr_us": iqr, "per_s": rates[name]})
        except (RuntimeError, NotImplementedError) as error:
            rows.append({**row, "missing": reason(error)})
            rates[name] = rates["bf16"] * 2  # by data sheet
        report(rows[-1])
    return Ceilings(rates.pop("copy"), rates), rows


def products(setup: Setup, group: str) -> Iterator[tuple[str, Product]]:
    """Layer by layer, one product for each format."""
    for layer, (n, k) in (SHAPES if setup.gpu else TINY_SHAPES).get(group, {}).items():
        for format in FORMATS:
            yield f"{group.split()[0]} {layer}", Product(format, n, k, 128 if format == "w4a16" else 0)


def rows_of(setup: Setup, layer: str) -> tuple[int, ...]:
    """How many rows of activations a layer is measured with."""
    rows = ROWS if setup.gpu else (1, 5)
    return tuple(m for m in rows if m <= _HEAD_ROWS) if "lm_head" in layer else rows


def layers(setup: Setup, best: Ceilings, groups: Sequence[str]) -> Iterator[Row]:
    """All layers of some groups, as long as there is time; what is skipped is a row too."""
    by_layer: dict[str, list[Product]] = {}
    for group in groups:
        for layer, product in products(setup, group):
            by_layer.setdefault(layer, []).append(product)
    for layer, layer_products in by_layer.items():
        if setup.left_s <= 0:
            row = {"section": "layers", "case": layer, "format": "", "m": 0, "runtime": "", "skipped": "no time left"}
            report(row)
            yield row
            continue
        try:
            yield from _layer(setup, layer, layer_products, best)
        except Exception as error:
            row = {"section": "layers", "case": layer, "format": "", "m": 0, "runtime": "", "missing": reason(error)}
            report(row)
            yield row
        if setup.gpu:
            torch.cuda.empty_cache()


def _layer(setup: Setup, layer: str, layer_products: Sequence[Product], best: Ceilings) -> Iterator[Row]:
    n, k = layer_products[0].n, layer_products[0].k
    print(f"\n{layer}: {n} x {k}; {setup.left_s:.0f} s left", flush=True)
    first = torch.randn(n, k, device=setup.device, dtype=torch.bfloat16)
    floats = [first, *(first.clone() for _ in range(setup.copies(first.nbytes) - 1))]
    weights = {p: tuning.copies_of(p, setup.device, setup.copies(p.weight_bytes)) for p in layer_products}
    bytes_of = {"bf16": first.nbytes, **{p.format: p.weight_bytes for p in layer_products}}
    peers, refused = _peers(setup, layer, n, k)
    rows = [{"m": 0, "format": format, "runtime": "torchao", "missing": why} for format, why in refused.items()]
    for m in (0, *rows_of(setup, layer)):
        if m and setup.left_s <= 0:
            rows = [{"m": m, "format": "", "runtime": "", "skipped": "no time left"}]
        elif m:
            rows = _timed(setup, m, floats, weights, peers)
        for row in rows:
            row = {"section": "layers", "case": layer, "n": n, "k": k, **row}
            if "us" in row:
                row["bound_us"] = best.us(row["format"], bytes_of[row["format"]], m, n, k)
                row["of_bound"] = row["bound_us"] / row["us"]
            report(row)
            yield row


def _timed(
    setup: Setup,
    m: int,
    floats: Sequence[torch.Tensor],
    weights: Mapping[Product, Sequence[Weight]],
    peers: Mapping[str, Peer],
) -> list[Row]:
    """All that multiply m rows by this weight, in turns; what does not run says why."""
    x = torch.randn(m, floats[0].shape[1], device=setup.device, dtype=torch.bfloat16)
    rows: dict[tuple[str, str], Row] = {}
    samplers: dict[tuple[str, str], timing.Sampler] = {}

    def prepare(format: str, runtime: str, make: Callable[[], tuple[Row, Sequence[Call]]]) -> None:
        row = rows[format, runtime] = {"m": m, "format": format, "runtime": runtime}
        try:
            more, calls = make()
            row |= more
            samplers[format, runtime] = setup.capture(calls)
        except Exception as error:
            row["missing"] = reason(error)

    prepare("bf16", "cuBLAS", lambda: ({}, [_linear(x, weight) for weight in floats]))
    for p, own in weights.items():
        prepare(p.format, "torchquant", lambda p=p, own=own: (_tuned(setup, p, m, own), [_ours(p, x, w) for w in own]))
    for format, calls in peers.items():
        prepare(format, "torchao", lambda calls=calls: ({}, calls(x)))
    times = {name: spread(t) for name, t in timing.in_turns(samplers, _SAMPLES).items()}
    for name, (us, iqr) in times.items():
        rows[name] |= {"us": us, "iqr_us": iqr, "ratio": times["bf16", "cuBLAS"][0] / us}
    return list(rows.values())


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _ours(product: Product, x: torch.Tensor, weight: Weight) -> Call:
    return lambda: product.run(x, weight)


def _tuned(setup: Setup, product: Product, m: int, weights: Sequence[Weight]) -> Row:
    """Search for the cut, if asked for; which one is used."""
    if not setup.gpu:
        return {"cut": "reference"}
    if setup.tune and setup.left_s > 0:
        outcome = tuning.search(product, m, weights=weights)
        wrong = [f"{c}: {why}" for c, why in outcome.skipped.items() if "relative error" in why]
        row = {"cut": _cut(outcome.config), "tuned": True, "tried": len(outcome.others) + 1}
        row["others"] = {_cut(c): round(us, 2) for c, us in sorted(outcome.others.items(), key=lambda t: t[1])}
        row["left_out"] = len(outcome.skipped)
        return {**row, "wrong": wrong} if wrong else row
    device = torch.device("cuda", torch.cuda.current_device())
    return {"cut": _cut(configs.choose(product.format, m, product.n, product.k, device)), "tuned": False}


def _cut(config: configs.Config) -> str:
    tile = "x".join(str(v) for v in (config.m, config.n, config.k) if v)
    rest = f" slices {config.slices} warps {config.warps} stages {config.stages}" if tile else ""
    return f"{config.kernel} {tile}{rest}{' quantizes' if config.quantizes else ''}".strip()


# torchao ---------------------------------------------------------------------------------------------------------


def _peers(setup: Setup, layer: str, n: int, k: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """For each format torchao's linear, or why there is none."""
    peers: dict[str, Peer] = {}
    refused: dict[str, str] = {}
    if not layer.startswith("8B") or layer.removeprefix("8B ") not in BESIDE_TORCHAO:
        return peers, refused
    torch._dynamo.reset()
    for format in FORMATS:
        try:
            peers[format] = _torchao(setup, format, n, k)
        except Exception as error:
            refused[format] = reason(error)
    return peers, refused


def _torchao(setup: Setup, format: str, n: int, k: int) -> Peer:
    import torchao.quantization as ao

    choices = {
        "w4a16": lambda: ao.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        ),
        "w8a16": lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "int8": lambda: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False),
    }
    config = choices[format]()
    linear = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device=setup.device, dtype=torch.bfloat16))
    linear.requires_grad_(False)
    ao.quantize_(linear, config)
    first = linear[0].weight
    weights = [
        first,
        *(copy.deepcopy(first) for _ in range(setup.copies(n * k // (2 if format == "w4a16" else 1)) - 1)),
    ]
    run = torch.compile(_product) if setup.gpu else _product

    def calls(x: torch.Tensor) -> list[Call]:
        if len(x) > 1:
            torch._dynamo.maybe_mark_dynamic(x, 0)  # one kernel for all sizes
        with torch.no_grad():
            run(x, weights[0])
        return [_no_grad(run, x, weight) for weight in weights]

    return calls


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _no_grad(run: Callable[..., object], x: torch.Tensor, weight: torch.Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return run(x, weight)

    return call
