"""Quantization inside the PT2E export graph: any torchao Quantizer, any target, with proof."""

from torchquant.algorithms.bias_correction import BiasCorrection
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
from torchquant.verify import Comparison, compare, sqnr_db

__all__ = [
    "ArtifactError",
    "BiasCorrection",
    "CalibrationError",
    "Comparison",
    "ExportError",
    "InputError",
    "LoweringError",
    "MissingDependencyError",
    "PatternError",
    "Program",
    "Report",
    "SchemeError",
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
