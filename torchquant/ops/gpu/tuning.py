"""Search for the fastest kernel and cut of products on this GPU, to be remembered by `configs`.

`tune(model)` searches for all products of a lowered graph. Nothing here runs unless it is asked for.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from torchquant.files.whole import write_whole
from torchquant.fx import ops
from torchquant.ops.gpu import configs, timing
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.products import GRIDS, Product, relative_error

__all__ = ["Outcome", "copies_of", "products_of", "requests", "search", "tune", "write_table"]

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
MAX_ERROR = 1e-2
_CHECKED_ROWS = 128
_FIRST_ROUNDS, _FINALISTS, _LAST_ROUNDS = 3, 3, 9


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Args:
        config, us: the fastest, and its time in microseconds.
        others: candidates that ran and were right, with their times.
        skipped: candidates that did not, with the reason.
    """

    config: Config
    us: float
    others: dict[Config, float]
    skipped: dict[Config, str]


def search(
    product: Product,
    m: int,
    *,
    device: str | torch.device = "cuda",
    gpu: str | None = None,
    capture: timing.Capture = timing.captured,
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Outcome:
    """Time all candidates for x (m, k), remember the fastest of those that compute the right thing.

    The three that are fastest in the first round meet again, in turns.

    Args:
        gpu: under which name it is remembered; that of the device if None.
        weights: copies to multiply with; random ones, as many as `timing.copies` says, if None.

    Raises:
        RuntimeError: no candidate ran and was right.
    """
    x = product.x(m, device)
    if weights is None:
        weights = copies_of(product, device)
    rows = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS), device=device).long()
    expected = product.reference(x[rows], weights[0], torch.float32)
    samplers, skipped = {}, {}
    for config in sensible(product, m, _multiprocessors(device)):
        try:
            _poison(x, product)
            error = relative_error(product.run(x, weights[0], config)[rows], expected)
            if error > MAX_ERROR:
                skipped[config] = f"its relative error is {error:.1e}"
            else:
                samplers[config] = capture([_call(product, x, weight, config) for weight in weights])
        except Exception as error:  # too large for this GPU, or a size that cuBLAS does not take
            skipped[config] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not samplers:
        raise RuntimeError(f"no kernel for {product} with {m} rows ran: {skipped}")
    best, times = _fastest(samplers)
    samplers.clear()
    if x.is_cuda:
        torch.cuda.empty_cache()  # the memory of the CUDA graphs
    configs.remember(
        gpu or configs.slug(torch.cuda.get_device_name(device)), product.format, m, product.n, product.k, best
    )
    return Outcome(best, times.pop(best), times, skipped)


def _fastest(samplers: Mapping[Config, timing.Sampler]) -> tuple[Config, dict[Config, float]]:
    """The fastest, and the median times in microseconds of all; the best of the first round are measured again."""
    times = {c: statistics.median(t) for c, t in timing.in_turns(samplers, _FIRST_ROUNDS).items()}
    finalists = sorted(times, key=times.__getitem__)[:_FINALISTS]
    last = timing.in_turns({c: samplers[c] for c in finalists}, _LAST_ROUNDS)
    times |= {c: statistics.median(t) for c, t in last.items()}
    return min(finalists, key=times.__getitem__), times


def sensible(product: Product, m: int, multiprocessors: int) -> list[Config]:
    """The candidates without those that split K although there are tiles enough for the whole GPU."""

    def needless(c: Config) -> bool:
        if c.kernel not in ("tiled", "pipelined", "copied") or c.slices == 1:
            return False
        return -(-product.n // c.n) * -(-m // c.m) * c.slices // 2 >= 2 * multiprocessors

    return [c for c in configs.candidates(product.format, m) if not needless(c)]


def _multiprocessors(device: str | torch.device) -> int:
    properties = torch.cuda.get_device_properties(device) if torch.device(device).type == "cuda" else None
    return properties.multi_processor_count if properties else 1 << 30


def copies_of(
    product: Product, device: str | torch.device, count: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A random weight `count` times, each in memory of its own; if None as often as no cache holds them all."""
    codes, factors = product.weight(device)
    if count is None:
        count = timing.copies(product.weight_bytes, torch.cuda.get_device_properties(device).L2_cache_size)
    return [(codes, factors), *((codes.clone(), factors.clone()) for _ in range(count - 1))]


def _call(product: Product, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], config: Config) -> Any:
    return lambda: product.run(x, weight, config)


def _poison(x: torch.Tensor, product: Product) -> None:
    """Leave NaN where the allocator will most likely put the output, to find outputs that are never written."""
    x.new_full((x.shape[0], product.n), torch.nan)


def requests(products: Iterable[Product], rows: Sequence[int] = ROWS) -> list[tuple[Product, int, Config]]:
    """Everything that searching will compile, for `precompile.Precompiling`; what compiles to the same once.

    A kernel depends on k, but not on m, and on n only by whether 16 divides it.
    """
    distinct: dict[tuple[Product, Config], tuple[Product, int, Config]] = {}
    for product in products:
        for m in rows:
            for config in sensible(product, m, _multiprocessors("cuda" if torch.cuda.is_available() else "cpu")):
                distinct.setdefault((replace(product, n=product.n % 16), config), (product, m, config))
    return list(distinct.values())


def tune(model: Any, rows: Sequence[int] = ROWS) -> dict[tuple[Product, int], Outcome]:
    """Search for all products of a lowered graph on this GPU.

    They use the answers from now on; CUDA graphs that were captured before do not.

    Args:
        model: a program of `inductor_cuda`, or the graph that `inductor_cuda.transform` returns.
        rows: how many rows of activations there may be (tokens, pixels); sizes between two powers of two share a cut.

    Raises:
        RuntimeError: there is no GPU, or the graph has no product of ours.
    """
    from torchquant.ops.gpu.precompile import Precompiling  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on the GPU it tunes for, and there is none here")
    products = products_of(model if isinstance(model, GraphModule) else model.graph)
    if not products:
        raise RuntimeError("the graph holds no product with quantized weights: lower it first")
    Precompiling(requests(products, rows)).wait()
    return {(product, m): search(product, m) for product in products for m in rows}


def products_of(graph: GraphModule) -> list[Product]:
    """The products of a lowered graph that kernels compute, equal ones once."""
    products: dict[Product, None] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.torchquant.weight_only_linear.default:
            product = _weight_only(graph, ops.arguments(node))
        elif node.target is torch.ops.torchquant.scaled_linear.default:
            product = _scaled(graph, ops.arguments(node))
        else:
            continue
        if (
            product.format in GRIDS or product.dtype != torch.float32
        ):  # PyTorch computes weight-only products in float32
            products[product] = None
    return list(products)


def _weight_only(graph: GraphModule, arguments: dict[str, Any]) -> Product:
    packed, params = (ops.constant_value(graph, arguments[name]) for name in ("packed", "params"))
    group_size = arguments["group_size"]
    k = params.shape[0] * group_size
    return Product(
        f"w{arguments['bits']}a16",
        packed.shape[-2],
        k,
        group_size if group_size < k else 0,
        arguments["asymmetric"],
        params.dtype,
    )


def _scaled(graph: GraphModule, arguments: dict[str, Any]) -> Product:
    weight = ops.constant_value(graph, arguments["weight"])
    format = next(name for name, (dtype, _) in GRIDS.items() if dtype == weight.dtype)
    n, k = weight.shape
    return Product(format, n, k, dtype=arguments["out_dtype"])


def write_table(folder: str | Path, gpu: str | None = None) -> Path:
    """Write what is known about this GPU, packaged and remembered, as `folder/GPU.json`.

    In `torchquant/ops/gpu/measured` of a checkout this becomes the table that the package brings.
    """
    gpu = gpu or configs.slug(torch.cuda.get_device_name())
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(configs.table(gpu), indent=1, sort_keys=True) + "\n"
    return write_whole(Path(folder) / f"{gpu}.json", lambda part: part.write_text(text))
