"""Quantizers that torchquant did not write: any spec on any op, as a user or a vendor would."""

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
from torchao.quantization.pt2e.observer import (
    HistogramObserver,
    MappingType,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

import torchquant as tq
from torchquant.fx import ops
from torchquant.observers.minmax import PerTokenActivation


def calibrated(model, batches, quantizer, *, dynamic_shapes=None):
    """The model exported, prepared for a Quantizer of any make, and calibrated."""
    exported = tq.export(model.eval(), batches[0], dynamic_shapes=dynamic_shapes)
    prepared = tq.prepare(exported, quantizer)
    tq.calibrate(prepared, batches, progress=False)
    return prepared


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


def groupwise(group_size=32, low=-8, high=7, mapping=MappingType.SYMMETRIC):
    observer = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=mapping,
        target_dtype=torch.int8,
        granularity=PerGroup(group_size),
        quant_min=low,
        quant_max=high,
        eps=1e-6,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    return QuantizationSpec(torch.int8, observer, low, high)


# every kind of spec ---------------------------------------------------------------------------------------------------


class PowerOfTwo(MinMaxObserver):
    """A vendor's observer: its scale is a power of two, and `convert` emits ops of its own."""

    def convert(self, model, node):
        _, exponent = torch.frexp(torch.maximum(-self.min_val, self.max_val))
        scale, aten = 2.0 ** (int(exponent) - 7), torch.ops.aten
        with model.graph.inserting_before(node):
            value = model.graph.call_function(aten.mul.Tensor, (node.args[0], 1 / scale))
            value = model.graph.call_function(aten.round.default, (value,))
            value = model.graph.call_function(aten.clamp.default, (value, -128, 127))
            value = model.graph.call_function(aten.mul.Tensor, (value, scale))
        node.replace_all_uses_with(value)
        model.graph.erase_node(node)


def weight_of_bits(bits, **options):
    return per_channel(low=-(2 ** (bits - 1)) + 1, high=2 ** (bits - 1) - 1, **options)


def int32_bias(activation, weight):
    """In units of activation scale times weight scale, as XNNPACK and Inductor store it."""

    def derive(observers):
        scales = [o.calculate_qparams()[0] for o in observers]
        return scales[0] * scales[1], torch.zeros_like(scales[1], dtype=torch.int64)

    return DerivedQuantizationSpec(
        [activation, weight], derive, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, ch_axis=0
    )


class EveryKind(nn.Module):
    """What `EverySpec` quantizes: each submodule or op has specs of another kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.tensor, self.two, self.three, self.rows = (nn.Linear(16, 16) for _ in range(4))
        self.group, self.five, self.six, self.seven = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.conv(x).relu()
        x = torch.cat([self.up(F.max_pool2d(x, 2)), x], 1).flatten(2).transpose(1, 2)
        x = x + self.two(self.tensor(x).relu()) * self.three(x).sigmoid()
        x = x + self.group(self.rows(x).relu())
        return self.seven(self.six(self.five(x).relu()).relu())


INT16 = {"dtype": torch.int16, "low": -(2**15), "high": 2**15 - 1}
SPECS = {  # submodule -> specs of its input and of its weight
    "conv": (per_tensor(torch.uint8, 0, 255, observer=HistogramObserver), weight_of_bits(8)),
    "up": (per_tensor(torch.uint8, 0, 127), weight_of_bits(4, axis=1)),
    "tensor": (per_tensor(symmetric=True), per_tensor(low=-127, symmetric=True)),
    "two": (per_tensor(torch.uint8, 0, 255), per_channel(low=-2, high=1)),
    "three": (per_tensor(**INT16, symmetric=True), weight_of_bits(3)),
    "rows": (dynamic(), weight_of_bits(8, axis=1)),
    "group": (QuantizationSpec(torch.int8, PerTokenActivation, -128, 127, is_dynamic=True), groupwise(8)),
    "five": (per_tensor(observer=PowerOfTwo), weight_of_bits(5)),
    "six": (per_tensor(**INT16), per_channel(torch.uint8, 0, 63, symmetric=False)),
    "seven": (
        QuantizationSpec(torch.int8, PlaceholderObserver, -127, 127, torch.per_tensor_symmetric, is_dynamic=True),
        weight_of_bits(7),
    ),
}


class EverySpec(Quantizer):
    """Uses every kind of spec in one network.

    Static symmetric and affine, 2 to 8 bits, int16, reduced range, per channel on either axis, per group, dynamic per
    tensor and per token, fixed, shared and derived qparams, and an observer that converts itself.
    """

    def annotate(self, model):
        for node in model.graph.nodes:
            kind, name = ops.kind_of(node), ops.op_name(node)
            if kind is not None and kind.weight is not None:
                self._layer(node, *SPECS[ops.module_path(node)])
            elif name == "sigmoid":
                fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({}, fixed, _annotated=True)
            elif name in ("max_pool2d", "cat"):
                first, *rest = ops.data_inputs(node, ops.kind_of(node))
                shared = SharedQuantizationSpec((first, node))
                inputs = {first: per_tensor(torch.uint8, 0, 255), **dict.fromkeys(rest, shared)}
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, shared, _annotated=True)
        return model

    def _layer(self, node, activation, weight):
        x, w, bias = node.args[:3]
        inputs = {x: activation, w: weight}
        if ops.module_path(node) == "conv":
            inputs[bias] = int32_bias((x, node), (w, node))
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, None, _annotated=True)

    def validate(self, model):
        """Everything is annotated as asked for."""
