"""What watches a tensor: torchao's observers made strict, ranges that minimize an error, scales without zero points."""

from torchquant.observers.minmax import (
    ActivationHistogram,
    ActivationMinMax,
    DynamicActivation,
    GroupWeight,
    PerChannelWeight,
    PerTokenActivation,
)
from torchquant.observers.ranges import (
    ActivationEntropy,
    ActivationMSE,
    ActivationPercentile,
    GroupWeightMSE,
    PerChannelWeightMSE,
    WeightMSE,
)

__all__ = [
    "ActivationEntropy",
    "ActivationHistogram",
    "ActivationMSE",
    "ActivationMinMax",
    "ActivationPercentile",
    "DynamicActivation",
    "GroupWeight",
    "GroupWeightMSE",
    "PerChannelWeight",
    "PerChannelWeightMSE",
    "PerTokenActivation",
    "WeightMSE",
]
