"""Quantization-aware training in the graph, for any Quantizer: the user keeps the training loop. See docs/qat.md."""

from torchquant.training.bits import narrow
from torchquant.training.converting import convert, evaluate, finish
from torchquant.training.distillation import Distillation
from torchquant.training.dorefa import DoReFa
from torchquant.training.ewgs import EWGS
from torchquant.training.learning import Method, learn_steps, parameters
from torchquant.training.lsq import LSQ
from torchquant.training.lsq_plus import LSQPlus
from torchquant.training.oscillation import Freezing, dampening
from torchquant.training.pact import PACT
from torchquant.training.preparing import notes, prepare
from torchquant.training.scheduling import Schedule, schedule

__all__ = [
    "EWGS",
    "LSQ",
    "PACT",
    "Distillation",
    "DoReFa",
    "Freezing",
    "LSQPlus",
    "Method",
    "Schedule",
    "convert",
    "dampening",
    "evaluate",
    "finish",
    "learn_steps",
    "narrow",
    "notes",
    "parameters",
    "prepare",
    "schedule",
]
