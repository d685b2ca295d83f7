"""torchao Quantizers, one thin file a target over one table-driven engine."""

from torchquant.quantizers.cuda import CudaQuantizer
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.quantizers.mixed import MixedPrecisionQuantizer
from torchquant.quantizers.onnx import OnnxQuantizer, OpenvinoQuantizer
from torchquant.quantizers.ternary import TernaryQuantizer
from torchquant.quantizers.weight_only import WeightOnlyQuantizer
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

__all__ = [
    "CapabilityQuantizer",
    "CudaQuantizer",
    "MixedPrecisionQuantizer",
    "OnnxQuantizer",
    "OpenvinoQuantizer",
    "TernaryQuantizer",
    "WeightOnlyQuantizer",
    "X86Quantizer",
    "XnnpackQuantizer",
]
