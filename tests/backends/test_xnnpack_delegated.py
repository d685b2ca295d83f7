"""What a report calls int8 is int8 in the delegate, read from its bytes, and nothing cuts the delegate in pieces."""

import functools

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, per_channel, per_tensor
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.quantizers.xnnpack import XnnpackQuantizer

pytest.importorskip("executorch")
from torchquant.backends import executorch_xnnpack

IMAGE = torch.randn(1, 3, 8, 8)


def conv(inputs=3, outputs=4, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def lowered(model, x=IMAGE, quantizer=None):
    """Program and the annotated sites of its graph, by op."""
    torch.manual_seed(0)
    model = model.eval()
    quantizer = quantizer or XnnpackQuantizer("static_int8")
    quantized = tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False)
    sites = [s.op for s in tq.report(quantized).sites if s.status == "quantized"]
    program = executorch_xnnpack.lower(quantized, x)
    assert tq.compare(model, program, [x]).sqnr_db > 25
    return program, sites


def between(function, outputs=4, **layers):
    """A function between two convolutions."""
    return Call(lambda m, x: m.last(function(m, m.first(x))), first=conv(), last=conv(outputs), **layers)


def parts(m, y):
    a, b = y.relu().chunk(2, 1)
    return torch.cat([a, b, m.inner(b).relu()], 1)


def gated(m, y):
    a, b = y.split([2, 2], 1)
    return F.relu(a * b)


INT8 = {  # every op behind the first convolution is int8: the sites, and no int8 tensor becomes float on the way
    "add, relu6": between(lambda m, y: F.relu6(y + m.other(y)), other=conv(4)),
    "add, clamp": between(lambda m, y: (y + m.other(y)).clamp(-0.5, 0.5), other=conv(4)),
    "sub, relu": between(lambda m, y: F.relu(y - m.other(y)), other=conv(4)),
    "mul, relu": between(lambda m, y: F.relu(y * m.other(y)), other=conv(4)),
    "an operand twice": between(lambda m, y: y + y),
    "cat of a tensor with itself": between(lambda m, y: torch.cat([y, y], 1), 8),
    "cat of six": between(lambda m, y: torch.cat([y, y, y, y, y, y], 1), 24),
    "chunk and cat": between(parts, 6, inner=conv(2, 2)),
    "split and gate": between(gated, 2),
    "select": between(lambda m, y: y[:, :, 1].unsqueeze(2)),
    "unbind": between(lambda m, y: y.unbind(3)[2].unsqueeze(3)),
    "stack": between(lambda m, y: torch.stack([y, m.other(y)], 1).flatten(1, 2), 8, other=conv(4)),
    "squeeze": between(lambda m, y: y.mean((2, 3), keepdim=True).squeeze(-1).unsqueeze(-1)),
    "mean without keepdim": between(lambda m, y: y.mean((2, 3))[:, :, None, None]),
    "average over the whole image": between(lambda m, y: F.avg_pool2d(y, 8)),
    "pixel shuffle": between(lambda m, y: F.pixel_shuffle(y, 2), 1),
    "channel shuffle": between(lambda m, y: torch.channel_shuffle(y, 2)),
    "transpose and reshape": between(lambda m, y: y.transpose(1, 2).reshape(1, 4, 8, 8)),
    "pad": between(lambda m, y: F.pad(y, (0, 1, 0, 1))),
    "crop and pad": between(lambda m, y: F.pad(y, (-1, 1, 1, -2))),
    "pad for two convolutions": Call(
        lambda m, x: (lambda y: m.b(y) + m.c(y))(F.pad(m.a(x), (0, 1, 0, 1))),
        a=conv(),
        b=nn.Conv2d(4, 4, 3, 2),
        c=nn.Conv2d(4, 4, 3, 2),
    ),
    "max-pool with ceil_mode": between(lambda m, y: F.max_pool2d(y, 3, 2, ceil_mode=True)),
    "dropout": between(lambda m, y: F.dropout(y, 0.5, False)),
    "a slice of everything": between(lambda m, y: y[:, 0:4]),
    "clamp behind a convolution": between(lambda m, y: y.clamp(0.0, 0.3)),
    "clamp from below": between(lambda m, y: y.clamp(min=-0.3)),
    "clamp from above": between(lambda m, y: torch.clamp_max(y, 0.3)),
    "clamp in place": between(lambda m, y: y.clamp_(0.0, 0.3)),
}


TWINS = {  # of another one in this table, by the way they take to the delegate
    *("add, clamp", "sub, relu", "cat of a tensor with itself", "chunk and cat", "unbind", "squeeze", "pad"),
    *("average over the whole image", "channel shuffle", "a slice of everything", "clamp behind a convolution"),
    *("clamp from above", "clamp in place"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in TWINS else ()) for n in INT8])
def test_every_op_between_two_int8_convolutions_runs_in_int8_in_one_delegate_call(name):
    program, sites = lowered(INT8[name])
    kernels = dict(program.proof.kernels)
    assert kernels.pop("delegate calls") == 1
    assert sum(kernels.values()) == len(sites)
    assert all(k.startswith("delegated int8") for k in kernels)
    assert not program.proof.left_float
    assert converts(program) == 2


def converts(program):
    """How often the delegates go between float and int8: once at the input and once at the output, if all is int8."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    from torchquant.backends.executorch_xnnpack.delegated import _graph_of

    content, count = program._buffer, 0
    at = content.find(XNNHeader.EXPECTED_MAGIC)
    while at >= 0:
        graph = _graph_of(content[at - 4 :])
        count += sum(node["xnode_union_type"] == "XNNConvert" for node in graph["xnodes"])
        at = content.find(XNNHeader.EXPECTED_MAGIC, at + 4)
    return count


FLOAT = {  # float with the true reason, and right
    "a number": (between(lambda m, y: y + 2.0), "is a number"),
    "a stride over the window": (between(lambda m, y: F.max_pool2d(y, 2, 3)), "stride over its window"),
    "a slice with steps": (between(lambda m, y: y[:, :, ::2]), ""),
    "an expansion": (between(lambda m, y: y[:, :1].expand(1, 4, 8, 8)), ""),
    "a pad of ones": (between(lambda m, y: F.pad(y, (1, 1), value=1.0)), "with zeros"),
    "a pad before a pool": (
        between(lambda m, y: F.max_pool2d(F.pad(y, (0, 1, 0, 1)), 3, 2)),
        "in front of a convolution",
    ),
    "a pad of channels": (between(lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 2)), 6), "sides of an image"),
    "unfold": (between(lambda m, y: F.unfold(y, 1).reshape(1, 4, 8, 8)), ""),
    "softplus": (between(lambda m, y: F.softplus(y)), ""),
    "mish": (between(lambda m, y: F.mish(y)), ""),
    "hard sigmoid": (between(lambda m, y: y * F.hardsigmoid(y.mean((2, 3), keepdim=True))), "in float"),
}


@functools.cache
def lowered_float(name):
    return lowered(FLOAT[name][0])[0]


@pytest.mark.parametrize("name", FLOAT)
def test_what_has_no_int8_kernel_stays_float_with_the_reason_and_the_right_result(name):
    reason, program = FLOAT[name][1], lowered_float(name)
    reasons = " ".join(program.proof.left_float.values())
    assert reason in reasons
    assert "annotated, yet" not in reasons


@pytest.mark.parametrize("name", ["softplus", "mish", "hard sigmoid", "a pad of ones", "a pad before a pool"])
def test_float_functions_do_not_cut_the_delegate(name):
    program = lowered_float(name)
    assert program.proof.kernels["delegate calls"] == 1
    assert not [k for k in program.proof.kernels if k.startswith("portable")]


@pytest.mark.parametrize("factor", [0.1, 8.0])
def test_a_float_and_an_int8_tensor_are_concatenated_whatever_their_ranges(factor):
    def forward(m, x):
        skip = m.down(x).relu()
        up = F.interpolate(m.deep(skip).relu(), scale_factor=2, mode="bilinear", align_corners=False)
        return m.head(torch.cat([up, skip], 1))

    model = Call(forward, down=conv(), deep=nn.Conv2d(4, 4, 3, 2, 1), head=conv(8))
    with torch.no_grad():
        model.deep.weight.mul_(factor)
    program, _ = lowered(model)
    assert program.proof.kernels["delegate calls"] == 1


def test_a_pool_that_the_user_excluded_between_int8_ops_is_computed_in_float():
    model = between(lambda m, y: F.max_pool2d(y, 2))
    program, sites = lowered(model, quantizer=XnnpackQuantizer(exclude=["op:max_pool2d"]))
    assert sites == ["conv2d", "conv2d"]
    assert program.proof.left_float == {"1 max_pool2d": "excluded by the user"}


def test_an_op_that_another_quantizer_annotated_and_xnnpack_computes_in_float_is_named_and_marked():
    quantizer = SpecQuantizer({"conv2d", "sigmoid"}, per_tensor(), per_channel(), per_tensor())
    with pytest.warns(tq.TorchquantWarning, match="sigmoid sigmoid"):
        program, _ = lowered(between(lambda m, y: y.sigmoid()), quantizer=quantizer)
    assert [s.status for s in program.sites if s.op == "sigmoid"] == ["unsupported"]
    assert program.proof.left_float == {"1 sigmoid": "annotated, yet XNNPACK computes it in float"}


TRANSPOSED = {
    "conv_transpose1d": (nn.ConvTranspose1d, (1, 3, 8), "static_int8"),
    "conv_transpose2d": (nn.ConvTranspose2d, (1, 3, 8, 8), "static_int8"),
    "conv_transpose2d, dynamic": (nn.ConvTranspose2d, (1, 3, 8, 8), "dynamic_int8"),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_run_in_int8(name):
    layer, shape, scheme = TRANSPOSED[name]
    model = nn.Sequential(layer(3, 4, 3, 2, output_padding=1), nn.ReLU(), layer(4, 3, 3))
    program, _ = lowered(model, torch.randn(shape), XnnpackQuantizer(scheme))
    assert program.proof.kernels[f"delegated int8 {name.partition(',')[0]}"] == 2
    assert program.proof.comparison.sqnr_db > 60


@pytest.mark.parametrize("norm_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_transformer_encoder_is_one_delegate_call(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    program, sites = lowered(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 8, 32), XnnpackQuantizer()
    )
    assert program.proof.kernels["delegate calls"] == 1
    assert not [k for k in program.proof.kernels if k.startswith("portable")]
    assert sites.count("linear") == 8


def test_the_process_is_left_as_it_was(capfd, recwarn):
    import logging
    import warnings

    quantized = tq.quantize(
        nets.mlp(), torch.randn(4, 8), [torch.randn(4, 8)], quantizer=XnnpackQuantizer(), progress=False
    )
    before = list(warnings.filters), list(logging.getLogger().handlers), torch.random.get_rng_state()
    capfd.readouterr()
    executorch_xnnpack.lower(quantized, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    assert (list(warnings.filters), list(logging.getLogger().handlers)) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert not capfd.readouterr().err
