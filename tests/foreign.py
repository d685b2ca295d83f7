"""Quantizers that torchquant did not write: any spec on any op, as a user or a vendor would."""

import torch
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import (
    MappingType,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchquant.fx import ops


class SpecQuantizer(Quantizer):
    """Annotates each op of the given kinds with one activation, weight and output spec."""

    def __init__(self, kinds, activation=None, weight=None, output=None):
        super().__init__()
        self.kinds, self.activation, self.weight, self.output = kinds, activation, weight, output

    def annotate(self, model):
        for node in model.graph.nodes:
            if ops.kind_of(node) is None or ops.op_name(node) not in self.kinds:
                continue
            kind = ops.kind_of(node)
            inputs = dict.fromkeys(ops.data_inputs(node, kind), self.activation) if self.activation else {}
            if kind.weight is not None and self.weight is not None:
                inputs[node.args[kind.weight]] = self.weight
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, self.output, _annotated=True)
        return model

    def validate(self, model):
        """Everything is annotated as asked for."""


def per_tensor(dtype=torch.int8, low=-128, high=127, *, symmetric=False, observer=MinMaxObserver, **options):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return QuantizationSpec(dtype, observer, low, high, scheme, **options)


def per_channel(dtype=torch.int8, low=-127, high=127, *, symmetric=True, axis=0):
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    return QuantizationSpec(dtype, PerChannelMinMaxObserver, low, high, scheme, ch_axis=axis)


def dynamic():
    return per_tensor(observer=PlaceholderObserver, is_dynamic=True)


def groupwise(group_size=32):
    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.SYMMETRIC,
        target_dtype=torch.int8,
        granularity=PerGroup(group_size),
        quant_min=-8,
        quant_max=7,
        eps=1e-6,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    return QuantizationSpec(torch.int8, observer, -8, 7)
