"""What the kernels compile to for an H100 or H200, without one: registers, memory, instructions a weight.

python benchmarks/gpu_code.py
"""

from __future__ import annotations

import argparse
from typing import Any

import records
import torch

from torchquant.ops.gpu import configs, machine_code
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.packing import BLOCK
from torchquant.ops.gpu.products import Product

CAPABILITY, MULTIPROCESSORS, SHARED_BYTES = 90, 132, 232448
N, K = 28672, 4096  # gate and up of Llama-3-8B, which we make one product
FORMATS = {"w4a16": 128, "w8a16": 0, "int8": 0, "fp8": 0}


def main() -> None:
    """Compile what the rules choose for each format and number of rows."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for format, group_size in FORMATS.items():
        product = Product(format, N, K, group_size)
        for m in (1, 16, 64, 256, 1024):
            config = configs.by_rule(format, m, N, MULTIPROCESSORS, SHARED_BYTES)
            if config.kernel not in ("library", "dequantize"):
                rows.append(_row(product, m, config))
                print(rows[-1], flush=True)
    records.write("gpu_code", rows, ("format", "rows"))


def _row(product: Product, m: int, config: Config) -> dict[str, Any]:
    """The kernel that multiplies; those before and after it are left out."""
    x, weight = product.x(m, "meta"), product.weight("meta")
    kernels = machine_code.compiled(CAPABILITY, lambda: product.run(x, weight, config))
    code = next(c for c in kernels if c.name.endswith(config.kernel))
    columns = config.k or BLOCK
    weights = config.n * columns * (config.slices if config.kernel == "skinny" else 1) / (32 * config.warps)
    loop = code.loop()
    return {
        "format": product.format,
        "rows": m,
        "kernel": code.name,
        "tile": f"{config.m} x {config.n} x {columns}, {config.slices} slices, {config.stages} stages",
        "warps": config.warps,
        "registers": code.registers,
        "spilled_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "loop_instructions": len(loop),
        "instructions_a_weight": len(loop) / weights,
        "tensor_core": next((i.split()[0] for i in loop if "MMA" in i.split()[0]), ""),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
