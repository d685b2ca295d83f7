"""Products to check kernels by: on the GPU where there is one, through Triton's interpreter anywhere.

Run as a script, with TRITON_INTERPRET=1 in the environment, it checks all and prints {case: relative error} as JSON:
the interpreter is chosen when a kernel is defined, so it needs a process of its own.
"""

import json
import os
import sys
from dataclasses import dataclass, replace

import torch

from torchquant.ops.gpu import configs, convolutions, linears, packing
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.operands import ConvolutionParams, Epilogue, Grid, PackedWeight, Scales

EPS = 2.0**-126
SKINNY, TILED = "skinny", "tiled"


@dataclass(frozen=True)
class WeightOnly:
    """A product with a weight of `bits`, in groups of `group` or per channel (0)."""

    m: int
    n: int
    k: int
    bits: int
    group: int
    asymmetric: bool
    config: Config | None
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    data: str = "normal"

    def arguments(self, device="cpu", dtype=torch.float16):
        torch.manual_seed(self.m + self.n + self.k)
        group = self.group or self.k
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1)
        codes = torch.randint(low, high, (self.n, self.k), dtype=torch.int8, device=device)
        scale = (torch.rand(self.n, -(-self.k // group), device=device) * 0.02 + 0.01).to(dtype)
        zero = torch.randint(low, high, scale.shape, device=device).to(dtype) if self.asymmetric else None
        x = activations(self.m, self.k, self.data, device).to(dtype)
        if self.data == "zeros":
            scale[:, 0] = 0
            codes[:: max(1, self.n // 4)] = 0
        bias = torch.randn(self.n, device=device, dtype=dtype) if self.bias else None
        residual = torch.randn(self.m, self.n, device=device, dtype=dtype) if self.residual else None
        packed, params = packing.pack_weight(codes, self.bits), packing.pack_params(scale, zero)
        return x, packed, params, bias, residual, self.bits, group

    def error(self, device="cpu", dtype=torch.float16):
        from torchquant.ops.gpu import launch

        x, weight, epilogue = self.operands(device, dtype)
        y = launch.weight_only(x, weight, epilogue, self.config)
        return relative_error(y, linears.weight_only_reference(x.double(), weight, epilogue, torch.float64))

    def operands(self, device="cpu", dtype=torch.float16):
        """As launches take them."""
        x, packed, params, bias, residual, bits, group = self.arguments(device, dtype)
        return x, PackedWeight(packed, params, bits, group, self.asymmetric), Epilogue(bias, residual, self.activation)


@dataclass(frozen=True)
class Scaled:
    """A product of codes; `mode`: rows or tensor (floats quantized inside), affine (tensor, with zero point), codes."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    mode: str
    config: Config | None
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    data: str = "normal"
    even: bool = True  # the grid has as many codes below zero as above

    def arguments(self, device="cpu", dtype=torch.float16):
        torch.manual_seed(self.m + self.n + self.k)
        integer = self.dtype == torch.int8
        low, high = (-127.0 if self.even else -128.0, 127.0) if integer else (-448.0, 448.0)
        weight = (
            torch.randint(-127, 128, (self.n, self.k), device=device)
            if integer
            else torch.randn(self.n, self.k, device=device)
        )
        weight = weight.to(self.dtype)
        by_output = torch.rand(self.n, device=device) * 0.01
        x = activations(self.m, self.k, self.data, device)
        if not integer and device == "cpu":
            # Triton's interpreter rounds a float8 down where rounding up would carry into the exponent: only values
            # that lie on the grid, with the largest one at its end
            x = x.clamp(-448, 448).to(self.dtype).float()
            x[:, 0] = 448 if self.data == "outliers" else 7
        x = x.to(dtype)
        scale = zero = sums = None
        if self.mode == "codes":
            x, scale = linears.quantize_rows_reference(x, self.dtype, low, high, EPS)
            scale = scale.reshape(-1)
        elif self.mode != "rows":
            scale = x.float().abs().max().reshape(1) / 300 if integer else x.float().abs().max().reshape(1) / 448
        if self.mode == "affine" or (self.mode == "codes" and integer):
            rows = self.m if self.mode == "codes" else 1
            zero = torch.randint(-9, 9, (rows,), dtype=torch.int32, device=device)
            sums = weight.sum(1, dtype=torch.int32)
        bias = torch.randn(self.n, device=device) if self.bias else None
        residual = torch.randn(self.m, self.n, device=device).to(dtype) if self.residual else None
        return x, weight, by_output, scale, zero, sums, bias, residual, low, high, EPS, self.activation

    def error(self, device="cpu", dtype=torch.float16):
        from torchquant.ops.gpu import launch

        operands = self.operands(device, dtype)
        y = launch.scaled(*operands, dtype, self.config)
        return relative_error(y, linears.scaled_reference(*operands, torch.float64))

    def operands(self, device="cpu", dtype=torch.float16):
        """As launches take them."""
        x, weight, *factors, bias, residual, low, high, eps, activation = self.arguments(device, dtype)
        return x, weight, Scales(*factors), Grid(low, high, eps), Epilogue(bias, residual, activation)


@dataclass(frozen=True)
class Convolution:
    """A convolution of codes by codes, with a zero point for integers."""

    shape: tuple[int, int, int, int]  # of x: batch, height, width, channels
    n: int
    kernel: tuple[int, int]
    dtype: torch.dtype
    config: Config | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"
    residual: bool = False

    def arguments(self, device="cpu"):
        torch.manual_seed(sum(self.shape))
        integer = self.dtype == torch.int8
        shapes = self.shape, (self.n, *self.kernel, self.shape[3])
        if integer:
            x, weight = (torch.randint(-127, 128, s, dtype=torch.int8, device=device) for s in shapes)
        else:
            x, weight = (torch.randn(s, device=device).to(self.dtype) for s in shapes)
        factors = torch.rand(self.n, device=device) * 0.01, torch.tensor([0.02], device=device)
        zero = torch.tensor([-11], dtype=torch.int32, device=device) if integer else None
        sums = weight.sum(3, dtype=torch.int32).flatten(1) if integer else None
        bias = torch.randn(self.n, device=device)
        return [x, weight, *factors, zero, sums, bias], (self.stride, self.padding, self.dilation, self.activation)

    def error(self, device="cpu", dtype=torch.float16):
        from torchquant.ops.gpu import launch

        (x, weight, *factors, bias), (*windows, activation) = self.arguments(device)
        scales, params = Scales(*factors), ConvolutionParams(*windows)
        exact = convolutions.scaled_conv2d_reference(x, weight, scales, Epilogue(bias), params, torch.float64)
        residual = torch.randn(exact.shape, device=device).to(dtype) if self.residual else None
        epilogue = Epilogue(bias, residual, activation)
        exact = convolutions.scaled_conv2d_reference(x, weight, scales, epilogue, params, torch.float64)
        out = torch.empty(exact.shape, dtype=dtype, device=device)
        return relative_error(launch.convolution(x, weight, scales, epilogue, params, out, self.config), exact)


def activations(m, k, data, device):
    """Random rows; `outliers`: a channel a hundred times as large; `tiny`: denormals; `zeros`: some rows are zero."""
    x = torch.randn(m, k, device=device)
    if data == "outliers":
        x[:, k // 3] *= 100
    elif data == "tiny":
        x *= 3e-7
    elif data == "zeros":
        x[::2] = 0
    return x


def relative_error(actual, exact):
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


def cases():
    """One list for both: small shapes, none a multiple of a tile, each feature at least once a kernel."""
    chosen = []
    for config in (
        Config(SKINNY, 8, 16, slices=4),
        Config(TILED, 16, 16, slices=2),
        Config(TILED, 16, 32),
        Config("dequantize"),
    ):
        chosen += [
            WeightOnly(3, 40, 256, 4, 128, False, config, "relu", bias=True, residual=True),
            WeightOnly(5, 24, 192, 4, 32, True, config, "gelu", bias=True),
            WeightOnly(9, 20, 320, 4, 160, False, config, "gelu_tanh"),
            WeightOnly(2, 20, 130, 4, 0, True, config, "silu", data="outliers"),
            WeightOnly(4, 32, 384, 4, 64, False, config, data="zeros"),
            WeightOnly(1, 16, 160, 8, 32, True, config, residual=True),
            WeightOnly(9, 20, 200, 8, 0, False, config, "relu6", bias=True),
        ]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for config in (
            Config(SKINNY, 8, 16, 64, slices=4, quantizes=True),
            Config(SKINNY, 8, 16, 64, slices=2),
            Config(TILED, 16, 32, 64),
        ):
            chosen += [
                Scaled(9, 24, 200, dtype, "codes", config, "gelu_tanh", bias=True),
                Scaled(3, 40, 300, dtype, "rows", config, "relu6", bias=True, residual=True),
                Scaled(3, 40, 256, dtype, "tensor", config, "silu"),
                Scaled(4, 20, 256, dtype, "rows", config, data="zeros"),
                Scaled(4, 20, 256, dtype, "rows", config, data="outliers"),
            ]
            if dtype == torch.int8:
                chosen += [
                    Scaled(5, 40, 130, dtype, "affine", config, "relu", bias=True),
                    Scaled(5, 20, 130, dtype, "rows", config, even=False),
                ]
        split = Config(TILED, 16, 32, 64, slices=2)
        chosen += [
            Scaled(9, 24, 200, dtype, "codes", split, "gelu_tanh", bias=True, residual=True),
            Scaled(3, 40, 256, dtype, "rows", replace(split, slices=4), "silu"),
        ]
        library = Config("library")
        chosen += [
            Scaled(20, 48, 64, dtype, "rows", library, "silu", bias=True, residual=True),
            Scaled(20, 48, 64, dtype, "codes", library, bias=True),
            Scaled(20, 48, 64, dtype, "tensor", library, "relu"),
        ]
        tile = Config("copied", 64, 64, 128)
        chosen += [
            Scaled(70, 72, 208, dtype, "codes", tile, "gelu_tanh", bias=True),
            Scaled(70, 72, 720, dtype, "codes", replace(tile, slices=4), "gelu_tanh", bias=True, residual=True),
            Scaled(300, 136, 512, dtype, "rows", tile, "relu6", bias=True, residual=True),
            Scaled(64, 64, 256, dtype, "tensor", tile, "silu"),
        ]
        tile = Config(TILED, 16, 32, 32)
        chosen += [
            Convolution((2, 7, 9, 5), 24, (3, 3), dtype, tile, (2, 1), (1, 1), activation="relu", residual=True),
            Convolution((1, 9, 8, 32), 40, (3, 2), dtype, tile, (1, 1), (2, 0), (2, 1), "silu"),
            Convolution((3, 4, 5, 16), 8, (1, 1), dtype, tile, (2, 2)),
        ]
    return chosen


def compiled_cases():
    """Kernels that Triton's interpreter does not know: those in Gluon."""
    chosen = []
    for slices, ahead in ((4, 1), (4, 2), (2, 1)):
        config = Config("direct", 8, 32, slices=slices, warps=slices, stages=ahead)
        chosen += [
            WeightOnly(3, 40, 256, 4, 128, False, config, "relu", bias=True, residual=True),
            WeightOnly(1, 33, 1024, 4, 128, False, config),
            WeightOnly(5, 24, 192, 4, 32, True, config, "gelu", bias=True),
            WeightOnly(9, 20, 320, 4, 160, False, config, "gelu_tanh"),
            WeightOnly(2, 20, 130, 4, 0, True, config, "silu", data="outliers"),
            WeightOnly(4, 32, 384, 4, 64, False, config, data="zeros"),
            WeightOnly(1, 16, 160, 8, 32, True, config, residual=True),
            WeightOnly(9, 20, 200, 8, 0, False, config, "relu6", bias=True),
            WeightOnly(16, 64, 896, 4, 128, True, replace(config, m=16)),
        ]
    every = [Config("pipelined", m, n, warps=warps, stages=stages) for m, n, warps, stages in configs._PIPELINED]
    for config in every:
        chosen.append(WeightOnly(300, 1000, 1024, 4, 128, False, config, "relu", bias=True, residual=True))
        chosen.append(WeightOnly(130, 264, 200, 8, 0, True, replace(config, slices=2), bias=True))
    for config in (every[0], every[4]):
        split = replace(config, slices=2)
        chosen += [
            WeightOnly(3, 40, 256, 4, 128, False, config, "relu", bias=True, residual=True),
            WeightOnly(70, 264, 640, 4, 128, True, split, "silu", bias=True, residual=True),
            WeightOnly(70, 100, 320, 4, 32, True, config, "gelu"),
            WeightOnly(65, 136, 320, 4, 160, False, split, "gelu_tanh"),
            WeightOnly(40, 20, 136, 4, 0, True, config, "silu", data="outliers"),
            WeightOnly(5, 24, 130, 4, 0, False, config),  # rows that the copy engine does not take
            WeightOnly(130, 320, 384, 4, 64, False, config, data="zeros"),
            WeightOnly(70, 136, 160, 8, 32, True, split, residual=True),
            WeightOnly(130, 264, 200, 8, 0, False, config, "relu6"),
            WeightOnly(200, 2000, 1024, 8, 128, False, replace(config, slices=4)),
        ]
    # more tiles than there are multiprocessors, so that programs have several
    chosen += [WeightOnly(300, 40000, 384, 4, 128, False, config) for config in (every[0], every[4])]
    return chosen


def rows_agree():
    """Whether codes and scales of rows are the reference's, in one pass and in several."""
    from torchquant.ops.gpu import launch, launch_scaled

    torch.manual_seed(0)
    x = torch.randn(6, 1000)
    x[1] = 0
    x[2] *= 1e-30
    x[3, 0] = 1e4
    x[4, 700], x[5, 999] = torch.nan, -torch.inf
    wrong = {}
    for widest in (512, 8192):
        launch_scaled._WIDEST_ROW = widest
        for low in (-127.0, -128.0):
            codes, scale = launch.quantize_rows(x, torch.int8, Grid(low, 127.0, EPS))
            expected, by_row = linears.quantize_rows_reference(x, torch.int8, low, 127.0, EPS)
            wrong[f"rows of {widest}, from {low:.0f}"] = float(
                (codes != expected).sum() + (~torch.isclose(scale, by_row[:, 0], 0, 0, equal_nan=True)).sum()
            )
    return wrong


def wild_cases():
    """Each activation behind each kernel, and each way to quantize; NaN and infinity go into x and the residual."""
    chosen = []
    for activation in linears.ACTIVATIONS:
        for config in (Config(SKINNY, 8, 16, slices=4), Config(TILED, 16, 16, slices=2), Config(TILED, 16, 32)):
            chosen.append(WeightOnly(5, 40, 256, 4, 128, True, config, activation, bias=True, residual=True))
        for config in (Config(SKINNY, 8, 16, 64, slices=4, quantizes=True), Config(TILED, 16, 32, 64)):
            chosen.append(Scaled(5, 40, 300, torch.int8, "rows", config, activation, bias=True, residual=True))
            chosen.append(Scaled(5, 40, 300, torch.int8, "affine", config, activation, residual=True))
    for config in (Config(SKINNY, 8, 16, 64, slices=4, quantizes=True), Config(TILED, 16, 32, 64), Config("library")):
        chosen += [
            Scaled(20, 40, 296, torch.int8, "rows", config, even=False),
            Scaled(20, 40, 296, torch.int8, "tensor", config),
            Scaled(20, 40, 296, torch.float8_e4m3fn, "rows", config),
        ]
    return chosen


def _set_wild(tensor, case):
    """NaN, infinity and its negative in one row each.

    But not what the interpreter or torch on a CPU has wrong: a float8 of NaN, the GELU of infinity.
    """
    integer = isinstance(case, WeightOnly) or case.dtype == torch.int8
    values = (torch.nan, torch.inf, -torch.inf) if integer and case.activation != "gelu" else (torch.nan,)
    for i, value in enumerate(values):
        tensor[1 + i, (7 * i + tensor.shape[1] // 2) % tensor.shape[1]] = value


def wild_agree():
    """{case: how many results are NaN, infinite or finite where the reference's are not, or far from it}."""
    from torchquant.ops.gpu import launch

    wrong = {}
    for case in wild_cases():
        for place in ("x", "residual"):
            operands = case.operands()
            x, residual = operands[0], operands[-1].residual
            if place == "residual" and residual is None:
                continue
            _set_wild(x if place == "x" else residual, case)
            if isinstance(case, WeightOnly):
                y = launch.weight_only(*operands, case.config)
                expected = linears.weight_only_reference(*operands, torch.float16)
            else:
                y = launch.scaled(*operands, torch.float16, case.config)
                expected = linears.scaled_reference(*operands, torch.float16)
            same = torch.isclose(y.float(), expected.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
            wrong[f"wild {place} {case}"] = float((~same).sum())
    return wrong


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    json.dump({str(c): c.error() for c in cases()} | rows_agree() | wild_agree(), sys.stdout)
