"""Which kernel runs a product, and its launch.

No call waits for the GPU: everything that decides about a launch is known on the host.
"""

from torchquant.ops.gpu.launch_convolution import convolution
from torchquant.ops.gpu.launch_scaled import quantize_rows, scaled
from torchquant.ops.gpu.launch_weight_only import dequantize, weight_only

__all__ = ["convolution", "dequantize", "quantize_rows", "scaled", "weight_only"]
