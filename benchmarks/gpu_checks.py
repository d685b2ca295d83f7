"""Every operator on the device against float64, over odd sizes and inputs that ask for trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_setup import Row, Setup, Weight, reason, report

from torchquant.ops.gpu import configs, convolutions, linears
from torchquant.ops.gpu.operands import ConvolutionParams, Epilogue, Scales
from torchquant.ops.gpu.products import EPS, GRIDS, Product

__all__ = ["MAX_ERROR", "checks", "requests"]

MAX_ERROR = 1e-2
SIZES = ((1, 256, 512), (5, 104, 384), (16, 64, 4096), (33, 48, 1152), (130, 272, 256), (300, 136, 768))  # m, n, k
ODD = ((2, 37, 200), (70, 51, 136))  # no multiple of anything; for formats without groups
TINY_SIZES = ((1, 48, 256), (5, 40, 384))
VARIANTS = {
    "w4a16": lambda n, k: Product("w4a16", n, k, 128),
    "w4a16 asymmetric, groups of 32": lambda n, k: Product("w4a16", n, k, 32, asymmetric=True),
    "w4a16 float16": lambda n, k: Product("w4a16", n, k, 128, dtype=torch.float16),
    "w8a16": lambda n, k: Product("w8a16", n, k),
    "w8a16 asymmetric, groups of 64": lambda n, k: Product("w8a16", n, k, 64, asymmetric=True),
    "int8": lambda n, k: Product("int8", n, k),
    "fp8": lambda n, k: Product("fp8", n, k),
}


def _outliers(x: torch.Tensor) -> torch.Tensor:
    x[:, ::61] *= 100
    return x


def _zero_rows(x: torch.Tensor) -> torch.Tensor:
    x[::2] = 0
    return x


def _denormals(x: torch.Tensor) -> torch.Tensor:
    x[:, ::2] *= 2.0**-133 if x.dtype == torch.bfloat16 else 2.0**-22
    return x


INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "outlier channels": _outliers,
    "zero rows": _zero_rows,
    "denormals": _denormals,
    "large": lambda x: x * (1e4 if x.dtype == torch.bfloat16 else 100),
}


def _grouped(product: Product, weight: Weight) -> Weight:
    """Every third scale (of a group or an output) zero, every fifth a hundred times as large."""
    factors = weight[1].clone()
    scales = factors[..., 0] if product.format not in GRIDS else factors
    flat = torch.arange(scales.numel(), device=scales.device).view(scales.shape)
    scales[flat % 3 == 0] = 0
    scales[flat % 5 == 1] *= 100
    return weight[0], factors


def worst_row(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row of y; infinite where y holds anything that is no number."""
    error = (y.to(expected.dtype) - expected).norm(dim=-1)
    size = expected.norm(dim=-1)
    ratio = torch.where(size > 0, error / size.clamp(min=1e-300), torch.where(error > 0, torch.inf, 0.0))
    worst = float(ratio.amax())
    return worst if worst < float("inf") else float("inf")


def requests(setup: Setup) -> list[tuple[Product, int, configs.Config]]:
    """The kernels that checks will need most, to be compiled ahead."""
    device = torch.device("cuda", torch.cuda.current_device())
    products = [(make(n, k), m) for name, make in VARIANTS.items() for m, n, k in _sizes(setup, name)]
    chosen = [(p, m, configs.choose(p.format, m, p.n, p.k, device)) for p, m in products]
    return [(p, m, c) for p, m, c in chosen if c.kernel in ("skinny", "tiled")]


def _sizes(setup: Setup, name: str) -> tuple[tuple[int, int, int], ...]:
    if not setup.gpu:
        return TINY_SIZES
    return SIZES + (ODD if name in ("w8a16", "int8", "fp8") else ())


def checks(setup: Setup) -> Iterator[Row]:
    """A row for each format and kind of input, with the worst over all sizes; failures are rows, not exceptions."""
    for name, make in VARIANTS.items():
        for kind in (*INPUTS, "zero and large scales", "epilogue"):
            yield _row(name, kind, [partial(_product, setup, make, kind, *s) for s in _sizes(setup, name)])
    for name, one in _MORE.items():
        yield _row(name, "normal", [partial(one, setup, *s) for s in _sizes(setup, "int8")])


def _row(name: str, kind: str, tries: list[Callable[[], float]]) -> Row:
    row: Row = {"section": "checks", "case": kind, "format": name, "m": 0, "runtime": "torchquant"}
    errors, failures = [], []
    for attempt in tries:
        try:
            errors.append(attempt())
        except Exception as error:
            failures.append(reason(error))
    right = not failures and max(errors) < MAX_ERROR
    row |= {"sizes": len(tries), "worst_error": max(errors, default=float("inf")), "right": right}
    if failures:
        row["failed"] = f"{len(failures)} of {len(tries)}; {failures[0]}"
    report(row)
    return row


def _product(setup: Setup, make: Callable[[int, int], Product], kind: str, m: int, n: int, k: int) -> float:
    product = make(n, k)
    weight, x = product.weight(setup.device), product.x(m, setup.device)
    if kind == "epilogue":
        bias, residual = (torch.randn(*s, device=setup.device).to(product.dtype) for s in ((n,), (m, n)))
        y = product.run(x, weight, bias=bias, residual=residual, activation="silu")
        return worst_row(y, torch.nn.functional.silu(product.reference(x, weight) + bias + residual))
    if kind in INPUTS:
        x = INPUTS[kind](x)
    else:
        weight = _grouped(product, weight)
    return worst_row(product.run(x, weight), product.reference(x, weight))


# what products do not cover ----------------------------------------------------------------------------------------


def _static_int8(setup: Setup, m: int, n: int, k: int) -> float:
    """Activations with one scale and zero point; floats in, and codes in."""
    product = Product("int8", n, k)
    (codes, scale), x = product.weight(setup.device), product.x(m, setup.device)
    x_scale = torch.full((1,), 0.03, device=setup.device)
    zero = torch.full((1,), -11, dtype=torch.int32, device=setup.device)
    total = codes.sum(1, dtype=torch.int32)
    rest = (x_scale, zero, total, None, None, -128.0, 127.0, EPS, "none", torch.bfloat16)
    quantized = ((x.float() * (1.0 / x_scale)).round() + zero).clamp(-128, 127)
    expected = (quantized - zero).double() @ codes.double().t() * x_scale.double() * scale.double()
    from_codes = linears.scaled_linear(quantized.to(torch.int8), codes, scale, *rest)
    return max(worst_row(y, expected) for y in (linears.scaled_linear(x, codes, scale, *rest), from_codes))


def _static_fp8(setup: Setup, m: int, n: int, k: int) -> float:
    """One scale for the activations, one for the weight."""
    product = Product("fp8", n, k)
    (codes, _), x = product.weight(setup.device), product.x(m, setup.device)
    x_scale, scale = torch.full((1,), 0.01, device=setup.device), torch.full((1,), 1e-3, device=setup.device)
    rest = (x_scale, None, None, None, None, -448.0, 448.0, EPS, "none", torch.bfloat16)
    quantized = (x.float() * (1.0 / x_scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = quantized.double() @ codes.double().t() * x_scale.double() * scale.double()
    return worst_row(linears.scaled_linear(x, codes, scale, *rest), expected)


def _quantized_rows(format: str) -> Callable[[Setup, int, int, int], float]:
    dtype, most = GRIDS[format]

    def error(setup: Setup, m: int, n: int, k: int) -> float:
        x = _zero_rows(_outliers(torch.randn(m + 1, k, device=setup.device, dtype=torch.bfloat16)))
        codes, scale = linears.quantize_rows(x, dtype, -most, most, EPS)
        expected, expected_scale = linears.quantize_rows_reference(x, dtype, -most, most, EPS)
        return max(worst_row(codes.double(), expected.double()), worst_row(scale.double(), expected_scale.double()))

    return error


def _convolution(format: str) -> Callable[[Setup, int, int, int], float]:
    """A window of 3 x 3 over small images, uneven strides, zeros around them; with a zero point for integers."""
    dtype, most = GRIDS[format]

    def error(setup: Setup, m: int, n: int, k: int) -> float:
        shapes = (2, 7 + m % 9, 10, k % 96 + 8), (n, 3, 3, k % 96 + 8)
        integer = dtype == torch.int8
        x, weight = (torch.randn(s, device=setup.device).mul_(most / 4).clamp(-most, most).to(dtype) for s in shapes)
        factors = torch.rand(n, device=setup.device) * 1e-2, torch.full((1,), 0.02, device=setup.device)
        zero = torch.full((1,), 9, dtype=torch.int32, device=setup.device) if integer else None
        sums = weight.sum(3, dtype=torch.int32).flatten(1) if integer else None
        bias, windows = torch.randn(n, device=setup.device), ((2, 1), (1, 1), (1, 1))
        expected = convolutions.scaled_conv2d_reference(
            x, weight, Scales(*factors, zero, sums), Epilogue(bias), ConvolutionParams(*windows), torch.float64
        )
        addends = (zero, sums, bias, None)
        y = convolutions.scaled_conv2d(x, weight, *factors, *addends, *windows, "none", torch.bfloat16)
        return worst_row(y, expected)

    return error


_MORE = {
    "int8, convolution with zero point": _convolution("int8"),
    "fp8, convolution": _convolution("fp8"),
    "int8, static with zero point": _static_int8,
    "fp8, static by tensor": _static_fp8,
    "quantize_rows int8": _quantized_rows("int8"),
    "quantize_rows fp8": _quantized_rows("fp8"),
}
