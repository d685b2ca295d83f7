"""Triton kernels for linears with quantized weights on NVIDIA GPUs (sm_80 and later).

Legend: x (M, K) activations, W (N, K) weights, y (M, N). All kernels compute the transposed product, W x^T, so that the
weights are the operand that tensor cores take from registers: codes are unpacked in the layout in which they are
multiplied, and no unpacked weight ever passes through shared memory.

Two forms of each product:

- *skinny*, for few rows of x: one program computes BN outputs over all of K, its S warps (or groups of warps) each a
  slice of K, and adds their sums in the end. No second kernel, no atomics, no workspace: deterministic by construction.
- *tiled*, for many rows: BN x BM tiles, with K split over SPLIT programs where there are few tiles; their float32 sums
  go to a workspace that `add_splits` adds up in a fixed order.

Each has another form:

- *direct*, a skinny product of floats by codes that loads the codes as tensor cores take them, past shared memory:
  the faster where there are few outputs.
- *copied*, a tiled product of codes by codes whose tiles come by Hopper's copy engine: the faster for many rows.
- *pipelined*, a tiled product of floats by codes that unpacks while tensor cores multiply; Hopper only.

No GPU has run *pipelined* yet, nor kernels that begin while the one in front of them ends (Hopper, see `follow`):
`TORCHQUANT_GPU_TRIAL=pipelined,early` lets tuning try the one, and does the other.

M is never specialized on: one compiled kernel serves every M. K is a constant of the kernel.
"""

from torchquant.ops.gpu.convolution_kernels import scaled_convolution
from torchquant.ops.gpu.direct_kernels import weight_only_direct
from torchquant.ops.gpu.kernel_parts import add_splits
from torchquant.ops.gpu.pipelined_kernels import weight_only_pipelined
from torchquant.ops.gpu.quantizing_kernels import quantize_rows, quantize_tensor
from torchquant.ops.gpu.scaled_kernels import scale_products, scaled_copied, scaled_skinny, scaled_tiled
from torchquant.ops.gpu.weight_only_kernels import dequantize_weight, weight_only_skinny, weight_only_tiled

__all__ = [
    "add_splits",
    "dequantize_weight",
    "quantize_rows",
    "quantize_tensor",
    "scale_products",
    "scaled_convolution",
    "scaled_copied",
    "scaled_skinny",
    "scaled_tiled",
    "weight_only_direct",
    "weight_only_pipelined",
    "weight_only_skinny",
    "weight_only_tiled",
]
