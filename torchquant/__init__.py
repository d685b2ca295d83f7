"""Quantization inside the PT2E graph: any torchao Quantizer, any target, with proof.

What a name needs is imported when it is first used, so that running a saved program needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchquant import qat as qat
    from torchquant.algorithms.adaquant import AdaQuant
    from torchquant.algorithms.adaround import AdaRound
    from torchquant.algorithms.auto_round import AutoRound
    from torchquant.algorithms.awq import AWQ
    from torchquant.algorithms.batch_norm import BatchNormReestimation
    from torchquant.algorithms.bias_correction import BiasCorrection
    from torchquant.algorithms.brecq import BRECQ
    from torchquant.algorithms.equalization import CrossLayerEqualization
    from torchquant.algorithms.gptq import GPTQ
    from torchquant.algorithms.hqq import HQQ
    from torchquant.algorithms.llm_int8 import LLMInt8
    from torchquant.algorithms.qdrop import QDrop
    from torchquant.algorithms.range_search import RangeSearch
    from torchquant.algorithms.rotate import Rotate
    from torchquant.algorithms.seq_mse import SeqMSE
    from torchquant.algorithms.smooth_quant import SmoothQuant
    from torchquant.analysis.findings import Finding, SiteAnalysis
    from torchquant.analysis.tensors import TensorAnalysis
    from torchquant.analysis.walk import Analysis, analyze
    from torchquant.artifacts.program import Program
    from torchquant.artifacts.serialize import load, save
    from torchquant.calibration.batches import Steps
    from torchquant.calibration.calibrate import calibrate
    from torchquant.errors import (
        ArtifactError,
        CalibrationError,
        ExportError,
        InputError,
        LoweringError,
        MissingDependencyError,
        ParallelError,
        PatternError,
        PrepareError,
        SchemeError,
        TorchquantError,
        TorchquantWarning,
        TrainingError,
    )
    from torchquant.flow import convert, export, optimize, prepare, quantize
    from torchquant.fx.storing import pack_weights, unpack_weights
    from torchquant.language.checkpoints import Checkpoint, load_causal_lm
    from torchquant.language.decoder import Decoder, generate
    from torchquant.language.evaluation import Evaluation, evaluate
    from torchquant.language.export import export_causal_lm
    from torchquant.language.harness import harness_model
    from torchquant.language.saving import SavedCheckpoint, save_causal_lm
    from torchquant.language.streaming import quantize_checkpoint
    from torchquant.measure.profile import Profile, profile
    from torchquant.measure.verify import Comparison, compare, sqnr_db
    from torchquant.precision.control import Controlled, quantize_within
    from torchquant.precision.plan import Plan
    from torchquant.precision.search import Search, search
    from torchquant.reporting.terminal import Report, report
    from torchquant.solving.results import Optimization

_HOMES = {
    "algorithms.adaquant": ("AdaQuant",),
    "algorithms.adaround": ("AdaRound",),
    "algorithms.auto_round": ("AutoRound",),
    "algorithms.awq": ("AWQ",),
    "algorithms.batch_norm": ("BatchNormReestimation",),
    "algorithms.bias_correction": ("BiasCorrection",),
    "algorithms.brecq": ("BRECQ",),
    "algorithms.equalization": ("CrossLayerEqualization",),
    "algorithms.gptq": ("GPTQ",),
    "algorithms.hqq": ("HQQ",),
    "algorithms.llm_int8": ("LLMInt8",),
    "algorithms.qdrop": ("QDrop",),
    "algorithms.range_search": ("RangeSearch",),
    "algorithms.rotate": ("Rotate",),
    "algorithms.seq_mse": ("SeqMSE",),
    "algorithms.smooth_quant": ("SmoothQuant",),
    "analysis.findings": ("Finding", "SiteAnalysis"),
    "analysis.tensors": ("TensorAnalysis",),
    "analysis.walk": ("Analysis", "analyze"),
    "calibration.batches": ("Steps",),
    "calibration.calibrate": ("calibrate",),
    "errors": (
        "ArtifactError",
        "CalibrationError",
        "ExportError",
        "InputError",
        "LoweringError",
        "MissingDependencyError",
        "ParallelError",
        "PatternError",
        "PrepareError",
        "SchemeError",
        "TorchquantError",
        "TorchquantWarning",
        "TrainingError",
    ),
    "flow": (
        "convert",
        "export",
        "optimize",
        "prepare",
        "quantize",
    ),
    "fx.storing": ("pack_weights", "unpack_weights"),
    "language.checkpoints": ("Checkpoint", "load_causal_lm"),
    "language.decoder": ("Decoder", "generate"),
    "language.evaluation": ("Evaluation", "evaluate"),
    "language.export": ("export_causal_lm",),
    "language.harness": ("harness_model",),
    "language.saving": ("SavedCheckpoint", "save_causal_lm"),
    "language.streaming": ("quantize_checkpoint",),
    "artifacts.program": ("Program",),
    "precision.control": ("Controlled", "quantize_within"),
    "precision.plan": ("Plan",),
    "precision.search": ("Search", "search"),
    "reporting.terminal": (
        "Report",
        "report",
    ),
    "artifacts.serialize": (
        "load",
        "save",
    ),
    "solving.results": ("Optimization",),
    "measure.profile": ("Profile", "profile"),
    "measure.verify": (
        "Comparison",
        "compare",
        "sqnr_db",
    ),
}
_PAGES = ("qat",)  # modules that are a page of their own
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AWQ",
    "BRECQ",
    "GPTQ",
    "HQQ",
    "AdaQuant",
    "AdaRound",
    "Analysis",
    "ArtifactError",
    "AutoRound",
    "BatchNormReestimation",
    "BiasCorrection",
    "CalibrationError",
    "Checkpoint",
    "Comparison",
    "Controlled",
    "CrossLayerEqualization",
    "Decoder",
    "Evaluation",
    "ExportError",
    "Finding",
    "InputError",
    "LLMInt8",
    "LoweringError",
    "MissingDependencyError",
    "Optimization",
    "ParallelError",
    "PatternError",
    "Plan",
    "PrepareError",
    "Profile",
    "Program",
    "QDrop",
    "RangeSearch",
    "Report",
    "Rotate",
    "SavedCheckpoint",
    "SchemeError",
    "Search",
    "SeqMSE",
    "SiteAnalysis",
    "SmoothQuant",
    "Steps",
    "TensorAnalysis",
    "TorchquantError",
    "TorchquantWarning",
    "TrainingError",
    "analyze",
    "calibrate",
    "compare",
    "convert",
    "evaluate",
    "export",
    "export_causal_lm",
    "generate",
    "harness_model",
    "load",
    "load_causal_lm",
    "optimize",
    "pack_weights",
    "prepare",
    "profile",
    "qat",
    "quantize",
    "quantize_checkpoint",
    "quantize_within",
    "report",
    "save",
    "save_causal_lm",
    "search",
    "sqnr_db",
    "unpack_weights",
]


def __getattr__(name: str) -> Any:
    if name in _PAGES:
        return import_module(f"torchquant.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'torchquant' has no attribute {name!r}")
    value = getattr(import_module(f"torchquant.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
