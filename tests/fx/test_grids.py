"""Grids: codes and values as convert's ops have them, and a quantized flow equal to the converted graph."""

import warnings

import nets
import pytest
import torch
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, groupwise, per_channel, per_tensor
from torch import nn
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from torchquant.calibration import batches as data
from torchquant.calibration.evaluator import Evaluator
from torchquant.calibration.stream import Stream
from torchquant.fx import passes
from torchquant.fx.blocks import data_order
from torchquant.fx.grids import Grid, grid_of
from torchquant.fx.reading import observers
from torchquant.fx.signature import Signature, placeholders
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

QDQ = torch.ops.quantized_decomposed


def grid(block, scale, zero_point=None, dialect="channel", axis=0, low=-8, high=7):
    scale = torch.as_tensor(scale)
    zero_point = torch.zeros_like(scale) if zero_point is None else torch.as_tensor(zero_point)
    return Grid(torch.int8, low, high, block, scale, zero_point.int(), dialect, axis)


def test_a_tensor_grid_has_the_codes_of_the_quantize_op():
    x, cut = torch.randn(50, 40), grid((50, 40), [0.1], [3], "tensor", None)
    codes = QDQ.quantize_per_tensor(x, float(cut.scale), 3, -8, 7, torch.int8)
    assert torch.equal(cut.encode(x), codes.float())
    assert torch.equal(cut.nearest(x), QDQ.dequantize_per_tensor(codes, float(cut.scale), 3, -8, 7, torch.int8))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_channel_grid_has_the_codes_of_the_quantize_op_on_any_axis(axis):
    x = torch.randn(5, 6, 7)
    block = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
    scale, zero_point = torch.rand(x.shape[axis]) / 4 + 0.01, torch.randint(-4, 4, (x.shape[axis],))
    cut = grid(block, scale, zero_point, axis=axis)
    codes = QDQ.quantize_per_channel(x, scale, zero_point, axis, -8, 7, torch.int8)
    assert torch.equal(cut.encode(x), codes.float())
    assert torch.equal(cut.decode(codes), QDQ.dequantize_per_channel(codes, scale, zero_point, axis, -8, 7, torch.int8))


def test_a_group_grid_has_the_codes_of_the_affine_ops():
    observer = groupwise(8).observer_or_fake_quant_ctr()
    weight = torch.randn(6, 24)
    observer(weight)
    cut = grid_of(observer, weight.shape)
    assert (cut.dialect, cut.block, cut.scale.shape) == ("block", (1, 8), (18,))
    scale, zero_point = observer.calculate_qparams()
    codes = torch.ops.torchao.quantize_affine(weight, (1, 8), scale, zero_point, torch.int8, -8, 7)
    values = torch.ops.torchao.dequantize_affine(codes, (1, 8), scale, zero_point, torch.int8, -8, 7)
    assert torch.equal(cut.encode(weight), codes.float())
    assert torch.equal(cut.decode(codes), values)


def test_each_element_belongs_to_one_cell_in_row_major_order():
    assert grid((1, 4), torch.ones(6), dialect="block").cells(torch.Size([2, 12])).unique().tolist() == list(range(6))
    assert grid((1, 2), torch.ones(4)).cells(torch.Size([2, 4])).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert grid((2, 4), torch.ones(1)).cells(torch.Size([2, 4])).numel() == 1


def test_small_unsigned_codes_are_decoded_without_overflow():
    cut = grid((4, 3), [0.5], [200], "tensor", None, 0, 255)
    codes = torch.zeros(4, 3, dtype=torch.uint8)
    assert torch.equal(cut.decode(codes), torch.full((4, 3), -100.0))


def test_codes_on_the_grid_are_fixed_points():
    cut = grid((1, 4), torch.rand(12) + 0.1, torch.randint(-3, 3, (12,)), dialect="block")
    codes = torch.randint(-8, 8, (4, 12)).float()
    assert torch.equal(cut.encode(cut.decode(codes)), codes)


def test_there_is_no_static_grid_for_dynamic_and_own_ops():
    prepared = calibrated(EveryKind(), [torch.randn(2, 4, 8, 8)], EverySpec())
    without_grid = [type(o).__name__ for _, o in observers(prepared) if grid_of(o, torch.Size([16, 16])) is None]
    assert sorted(without_grid) == ["PerTokenActivation", "PlaceholderObserver", "PlaceholderObserver", "PowerOfTwo"]


# the quantized flow ---------------------------------------------------------------------------------------------------


def flows(prepared, batches):
    """Outputs of the converted graph and of the quantized flow, batch by batch."""
    converted = convert_pt2e(passes.copy_graph(prepared))
    evaluator, output = Evaluator(prepared, "quantized"), next(iter(reversed(prepared.graph.nodes)))
    for batch in batches:
        env = dict(zip(placeholders(prepared), data.given(Signature.of(prepared), batch).leaves, strict=True))
        with torch.no_grad():
            evaluator.run(data_order(prepared), env)
            wanted = data.call(converted, batch)
        yield pytree.tree_leaves(wanted), pytree.tree_leaves(torch.fx.node.map_arg(output.args[0], env.__getitem__))


def assert_equal_flows(prepared, batches):
    signal = noise = 0.0
    for batch, (wanted, actual) in zip(batches, flows(prepared, batches), strict=True):
        exact = [value.detach() for value in pytree.tree_leaves(data.call(prepared, batch))]
        for a, b, c in zip(exact, wanted, actual, strict=True):
            assert (b - c).norm() <= 1e-5 * b.norm()
            assert (a - b).norm() > 1e-3 * a.norm()
            signal += float(a.square().sum(dtype=torch.float64))
            noise += float((a - b).square().sum(dtype=torch.float64))
    stream = Stream(prepared, batches)
    assert list(stream.walk([])) == []
    assert stream.signal == pytest.approx(signal, rel=1e-5)
    assert stream.noise == pytest.approx(noise, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_quantized_flow_equals_the_converted_graph_for_every_kind_of_spec(seed):
    torch.manual_seed(seed)
    batches = [torch.randn(3, 4, 8, 8) for _ in range(3)]
    assert_equal_flows(calibrated(EveryKind(), batches, EverySpec()), batches)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["symmetric", "affine", "axis 1", "tensor"])
def test_the_quantized_flow_equals_the_converted_graph_at_every_width(bits, kind):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = {
        "symmetric": per_channel(low=low + 1, high=high),
        "affine": per_channel(low=low, high=high, symmetric=False),
        "axis 1": per_channel(low=low, high=high, axis=1),
        "tensor": per_tensor(low=low, high=high),
    }[kind]
    batches = [torch.randn(4, 8)]
    quantizer = SpecQuantizer(("linear",), per_tensor(torch.uint8, 0, 255), weight, per_tensor())
    assert_equal_flows(calibrated(nets.mlp(), batches, quantizer), batches)


class Nets(nn.Module):
    """The test networks side by side."""

    def __init__(self, **nets):
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, inputs):
        return {name: net(*inputs[name]) for name, net in self.nets.items()}


def xnnpack_of_executorch():
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


QUANTIZERS = {
    "inductor": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "inductor dynamic": lambda: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_dynamic=True)
    ),
    "executorch": xnnpack_of_executorch,
    "x86": X86Quantizer,
    "x86 dynamic": lambda: X86Quantizer("dynamic_int8"),
    "xnnpack": XnnpackQuantizer,
    "xnnpack static": lambda: XnnpackQuantizer("static_int8"),
}


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_quantized_flow_equals_the_converted_graph_of_any_quantizer(quantizer):
    model = Nets(cnn=nets.cnn(), block=nets.Block(), pixels=nets.Pixels(), mobile=nets.Mobile())
    shapes = {"cnn": (2, 3, 8, 8), "block": (2, 8, 32), "pixels": (2, 4, 8, 8), "mobile": (2, 3, 16, 16)}
    batches = [({name: (torch.randn(shape),) for name, shape in shapes.items()},) for _ in range(2)]
    if quantizer != "executorch":  # it observes the integer positions, and its observer makes floats of them
        model.nets["tokens"] = nets.MaskedTokens()
        for (batch,) in batches:
            batch["tokens"] = nets.token_batch()
    assert_equal_flows(calibrated(model, batches, QUANTIZERS[quantizer]()), batches)


def test_the_quantized_flow_of_a_bf16_model_equals_the_converted_graph():
    model, batches = nets.mlp().bfloat16(), [torch.randn(4, 8).bfloat16()]
    for weight in (per_channel(), per_tensor(low=-127, symmetric=True), groupwise(8)):
        prepared = calibrated(model, batches, SpecQuantizer(("linear",), per_tensor(), weight))
        for (wanted,), (actual,) in flows(prepared, batches):
            assert actual.dtype == wanted.dtype == torch.bfloat16
            assert torch.equal(actual, wanted)
