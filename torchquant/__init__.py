"""Quantization inside the PT2E export graph: any torchao Quantizer, any target, with proof."""

from torchquant.algorithms.adaquant import AdaQuant
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.batch_norm import BatchNormReestimation
from torchquant.algorithms.bias_correction import BiasCorrection
from torchquant.algorithms.brecq import BRECQ
from torchquant.algorithms.equalization import CrossLayerEqualization
from torchquant.algorithms.qdrop import QDrop
from torchquant.algorithms.range_search import RangeSearch
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.algorithms.smooth_quant import SmoothQuant
from torchquant.batches import Steps
from torchquant.calibrate import calibrate
from torchquant.errors import (
    ArtifactError,
    CalibrationError,
    ExportError,
    InputError,
    LoweringError,
    MissingDependencyError,
    PatternError,
    SchemeError,
    TorchquantError,
    TorchquantWarning,
)
from torchquant.flow import convert, export, optimize, prepare, quantize
from torchquant.program import Program
from torchquant.report import Report, report
from torchquant.serialize import load, save
from torchquant.solving import Optimization
from torchquant.verify import Comparison, compare, sqnr_db

__all__ = [
    "BRECQ",
    "AdaQuant",
    "AdaRound",
    "ArtifactError",
    "BatchNormReestimation",
    "BiasCorrection",
    "CalibrationError",
    "Comparison",
    "CrossLayerEqualization",
    "ExportError",
    "InputError",
    "LoweringError",
    "MissingDependencyError",
    "Optimization",
    "PatternError",
    "Program",
    "QDrop",
    "RangeSearch",
    "Report",
    "SchemeError",
    "SeqMSE",
    "SmoothQuant",
    "Steps",
    "TorchquantError",
    "TorchquantWarning",
    "calibrate",
    "compare",
    "convert",
    "export",
    "load",
    "optimize",
    "prepare",
    "quantize",
    "report",
    "save",
    "sqnr_db",
]
