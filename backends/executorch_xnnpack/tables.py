"""Lookups in tables of 8 or 4 bits, by ExecuTorch's portable kernels: the table stays codes in the program."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from torchquant.backends.executorch_xnnpack.capabilities import FOUR_BITS
from torchquant.fx import ops
from torchquant.fx.reading import GraphReading
from torchquant.fx.rewrites.builder import Builder
from torchquant.types import Site

__all__ = ["TABLE_KERNELS", "looked_up", "lookup", "table_problem"]

TABLE_KERNELS = ("embedding_byte", "embedding_4bit")


def lookup(b: Builder, node: Node) -> Node | None:
    """A lookup in a dequantized table as one in its codes; None where the table is float."""
    table, indices = ops.argument(node, 0), ops.argument(node, 1)
    return None if table is None or indices is None else looked_up(b, table, indices)


def looked_up(b: Builder, table: Node, indices: Node) -> Node | None:
    """The rows of a dequantized table, read from its codes; None where the table is float."""
    quantized = GraphReading(b.model).tensor(table)
    if quantized is None or quantized.codes is None or not ops.is_constant(quantized.codes):
        return None
    codes, qparams = ops.constant_value(b.model, quantized.codes), quantized.qparams
    if qparams.scale is None:
        return None
    limits, name = (int(qparams.quant_min), int(qparams.quant_max)), quantized.codes.name
    scale = b.constant(_by_row(qparams.scale, len(codes)), f"{name}_scale")
    zero_point = None
    if qparams.zero_point is not None and bool(qparams.zero_point.any()):
        zero_point = b.constant(_by_row(qparams.zero_point, len(codes)), f"{name}_zero_point")
    kernel: Any = torch.ops.quantized_decomposed.embedding_byte.default
    if limits == FOUR_BITS:
        kernel, codes = torch.ops.quantized_decomposed.embedding_4bit.default, packed(codes)
    return b.call(kernel, b.constant(codes.contiguous(), f"{name}_table"), scale, zero_point, *limits, indices)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes -8..7 (rows, columns) as the kernel reads them: two a byte (rows, columns / 2), the first one above."""
    shifted = (codes.to(torch.int16) + 8).to(torch.uint8)
    return shifted[:, ::2] << 4 | shifted[:, 1::2]


def _by_row(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales or zero points, float32, (rows,) or (rows, groups)."""
    values = values.float()
    return values.reshape(1).repeat(rows) if values.numel() == 1 else values.reshape(rows, -1).squeeze(1).contiguous()


def table_problem(site: Site, columns: int) -> str:
    """Why ExecuTorch has no kernel for the table of a lookup; empty if it has one."""
    table = site.weight
    if table is None:
        return ""
    limits = (table.quant_min, table.quant_max)
    is_wide = int(limits[1] - limits[0]).bit_length() > 4
    if table.dtype != torch.int8 or not (limits == FOUR_BITS or is_wide):
        return f"its table is {table.describe()}, and ExecuTorch's kernels take int8 codes, of 4 bits -8..7; {_TAKE}"
    if limits == FOUR_BITS and columns % 2:
        return f"its table has rows of {columns}, and ExecuTorch packs 4-bit codes in pairs; give it 8 bits"
    if table.axis not in (None, 0):
        return f"its table has scales along axis {table.axis}, and ExecuTorch's kernels take scales of rows; {_TAKE}"
    return ""


_TAKE = "take w8, w4_g32 or w4_symmetric_g32"
