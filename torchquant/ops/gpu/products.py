"""Products of every format with random weights: what tuning searches cuts for, and benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchquant.ops.gpu import linears, packing
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.operands import Epilogue, Grid, PackedWeight, Scales

__all__ = ["EPS", "GRIDS", "Product", "relative_error"]

EPS = 2.0**-100
GRIDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # codes and the largest of them


@dataclass(frozen=True)
class Product:
    """y (M, n) = x (M, k) W^T in one of the formats of `configs`.

    Args:
        format: `w4a16`, `w8a16`, `int8` or `fp8`; the last two with dynamic scales of x by row, and of W by output.
        group_size: neighbours on k that share a scale; 0: all of them. Weight only.
        asymmetric: zero points other than 0. Weight only.
        dtype: of x and y.
    """

    format: str
    n: int
    k: int
    group_size: int = 0
    asymmetric: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.format == "w4a16" else 8

    @property
    def groups(self) -> int:
        """Scales for an output."""
        return self.k // self.group_size if self.group_size else 1

    @property
    def weight_bytes(self) -> int:
        """Of codes, scales and zero points as they are packed."""
        scale = 2 * self.dtype.itemsize if self.format not in GRIDS else 4
        return self.n * self.k * self.bits // 8 + self.n * self.groups * scale

    def weight(self, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Random codes and scales as the operators take them, made on the device in no time."""
        if self.format in GRIDS:
            dtype, most = GRIDS[self.format]
            if dtype == torch.int8:
                codes = torch.randint(-127, 128, (self.n, self.k), dtype=dtype, device=device)
            else:
                values = torch.randn(self.n, self.k, dtype=torch.bfloat16, device=device).mul_(most / 4)
                codes = values.clamp_(-most, most).to(dtype)  # beyond the largest is NaN
            return codes, torch.rand(self.n, device=device) * 0.02 / most + 1e-6
        blocks = -(-self.k // packing.BLOCK)
        shape = (blocks, self.n, packing.CHUNK) if self.bits == 4 else (blocks, 2, self.n, packing.CHUNK)
        packed = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device)
        most = 2.0 ** (self.bits - 1)
        scale = (torch.rand(self.n, self.groups, device=device) * 0.1 / most + 1e-4).to(self.dtype)
        zero = torch.randint(-4, 5, scale.shape, device=device) if self.asymmetric else None
        return packed, packing.pack_params(scale, zero)

    def x(self, m: int, device: str | torch.device) -> torch.Tensor:
        """Random activations."""
        return torch.randn(m, self.k, device=device).to(self.dtype)

    def run(
        self,
        x: torch.Tensor,
        weight: tuple[torch.Tensor, torch.Tensor],
        config: Config | None = None,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
    ) -> torch.Tensor:
        """By the operator, or with a config by the kernel it names."""
        epilogue = Epilogue(bias, residual, activation)
        if self.format in GRIDS:
            return self._scaled(x, weight, epilogue, config)
        packed = PackedWeight(*weight, self.bits, self.group_size or self.k, self.asymmetric)
        if config is not None:
            return linears.triton_launcher().weight_only(x, packed, epilogue, config)
        form = (packed.bits, packed.group_size, packed.asymmetric)
        return linears.weight_only_linear(x, *weight, bias, residual, *form, activation)

    def _scaled(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], epilogue: Epilogue, config: Config | None
    ) -> torch.Tensor:
        codes, weight_scale = weight
        most = GRIDS[self.format][1]
        if config is not None:
            grid = Grid(-most, most, EPS)
            return linears.triton_launcher().scaled(x, codes, Scales(weight_scale), grid, epilogue, self.dtype, config)
        addends, grid_values = (None, None, None, epilogue.bias, epilogue.residual), (-most, most, EPS)
        return linears.scaled_linear(x, codes, weight_scale, *addends, *grid_values, epilogue.activation, self.dtype)

    def reference(
        self, x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """The product in `dtype`, by plain PyTorch."""
        codes, factors = weight
        if self.format in GRIDS:
            grid, most = GRIDS[self.format]
            quantized, scale = linears.quantize_rows_reference(x, grid, -most, most, EPS)
            return quantized.to(dtype) @ codes.to(dtype).t() * scale.to(dtype) * factors.to(dtype)
        scale, zero_point = (v.to(dtype).unsqueeze(-1) for v in packing.unpack_params(factors))
        values = packing.unpack_weight(codes, self.bits, self.k).to(dtype).reshape(self.n, self.groups, -1)
        return x.to(dtype) @ values.sub_(zero_point).mul_(scale).reshape(self.n, self.k).t()


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """|y - expected| / |expected|; infinite where y holds anything that is no number."""
    error = (y.to(expected.dtype) - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")
