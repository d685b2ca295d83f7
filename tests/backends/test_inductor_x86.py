"""x86 programs: int8 kernels counted, any batch size, no state changed, inputs kept, and refusals."""

import math
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import nets
import pytest
import torch
import torch._dynamo
from foreign import SpecQuantizer, groupwise, per_channel, per_tensor
from nets import Call, callers_agree
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.backends.inductor_x86 import lowering, op_times, program
from torchquant.formats.integer import UINT7
from torchquant.fx import ops
from torchquant.fx.work import work
from torchquant.ops.x86 import exactness, native, support
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.types import Scheme

U8 = per_tensor(torch.uint8, 0, 255)


def kernels(program, word):
    return sum(n for name, n in program.proof.kernels.items() if word in name)


def test_every_annotated_op_has_an_int8_kernel(x86_pixels):
    program = x86_pixels.program
    assert kernels(program, "torchquant_conv2d") == 2
    assert kernels(program, "torchquant_linear") == 3
    assert sum(program.proof.kernels.values()) == 5
    assert program.proof.annotated == program.proof.fused == 5
    assert program.proof.comparison.sqnr_db > 60


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_program_equals_the_converted_graph_at_every_batch_size(x86_pixels, batch):
    x = torch.randn(batch, 4, 8, 8)
    assert tq.sqnr_db(x86_pixels.expected(x), x86_pixels.program(x)) > 40


def test_the_program_is_close_to_the_float_model(x86_pixels):
    x = x86_pixels.batch[0]
    assert 25 < tq.sqnr_db(x86_pixels.exported(x), x86_pixels.program(x)) < 60


def test_channels_last_and_strided_inputs_give_the_same_result(x86_pixels):
    x = torch.randn(3, 4, 8, 8)
    expected = x86_pixels.program(x)
    for same in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., :8]):
        assert torch.equal(same, x)
        assert torch.equal(x86_pixels.program(same), expected)


def test_the_callers_grad_mode_is_neither_needed_nor_changed(x86_pixels):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.enable_grad():
        output = x86_pixels.program(x)
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        same = x86_pixels.program(x)
    assert not output.requires_grad
    assert torch.equal(output, same)


METADATA = "aot_inductor.metadata"


def test_lowering_changes_no_setting_of_inductor_and_no_grad_mode(x86_pixels):
    before, after = x86_pixels.settings_before, x86_pixels.settings_after
    assert len(before) > 100
    assert {k: v for k, v in before.items() if k != METADATA} == {k: v for k, v in after.items() if k != METADATA}
    assert not torch._inductor.config.freezing


def test_lowering_leaves_no_metadata_in_inductors_settings(x86_pixels):
    assert x86_pixels.settings_before[METADATA] == x86_pixels.settings_after[METADATA]


@pytest.mark.parametrize(
    "bad", [torch.randn(2, 4, 8, 9), torch.randn(2, 4, 8, 8).double(), torch.randn(4, 8, 8), [1.0], None]
)
def test_an_input_that_does_not_fit_is_refused(x86_pixels, bad):
    with pytest.raises(tq.InputError):
        x86_pixels.program(bad)


def test_another_batch_size_is_refused_by_a_static_program(x86_residual):
    x, y = x86_residual.batch
    for wrong in ((x[:1], y[:1]), (x.repeat(2, 1), y), (x,), (x, y, y)):
        with pytest.raises(tq.InputError, match=r"expected shape|the model takes 2|has no 'y'|go with|goes with"):
            x86_residual.program(*wrong)


def test_a_call_leaves_the_callers_tensors_as_they_were(x86_residual):
    x, y = (t.clone() for t in x86_residual.batch)
    expected = x86_residual.expected(x, y)
    for _ in range(2):
        actual = x86_residual.program(x, y)
        assert all(tq.sqnr_db(a, b) > 60 for a, b in zip(expected, actual, strict=True))
    assert torch.equal(x, x86_residual.batch[0])
    assert torch.equal(y, x86_residual.batch[1])


def test_arguments_may_be_given_by_name_in_any_order(x86_residual):
    x, y = x86_residual.batch
    expected = x86_residual.program(x, y)
    actual = x86_residual.program(y=y, x=x)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_results_are_not_overwritten_by_the_next_call(x86_residual):
    x, y = x86_residual.batch
    first = x86_residual.program(x, y)
    copies = [t.clone() for t in first]
    x86_residual.program(3 * x, 3 * y)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_four_threads_get_bit_equal_results(x86_pixels):
    inputs = [torch.randn(2, 4, 8, 8) for _ in range(4)]
    assert callers_agree(x86_pixels.program, inputs, rounds=25)


@pytest.mark.parametrize("name", ["x86_pixels", "x86_residual"])
def test_a_saved_program_loads_with_its_proof_and_bit_equal_results(name, request, tmp_path):
    low = request.getfixturevalue(name)
    path = low.program.save(tmp_path / "model.pt2")
    assert path.stat().st_size == low.program.size_bytes
    again = inductor_x86.load(path)
    inputs = [t.clone() for t in low.batch]
    outputs = (again(*inputs), low.program(*low.batch))
    assert all(torch.equal(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, outputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, low.batch, strict=True))
    assert again.proof == low.program.proof
    assert again.inputs == low.program.inputs
    assert [(s.node, s.status, s.reason) for s in again.sites] == [
        (s.node, s.status, s.reason) for s in low.program.sites
    ]


def test_a_truncated_foreign_or_other_archive_is_no_program(x86_pixels, tmp_path):
    path = x86_pixels.program.save(tmp_path / "model.pt2")
    content = path.read_bytes()
    for i, part in enumerate((b"", content[: len(content) // 2], content[:-20], b"text")):
        (tmp_path / f"{i}.pt2").write_bytes(part)
        with pytest.raises(tq.ArtifactError, match="truncated"):
            inductor_x86.load(tmp_path / f"{i}.pt2")
    graph = tq.save(x86_pixels.quantized, tmp_path / "graph.pt2")
    with pytest.raises(tq.ArtifactError, match="converted graph"):
        inductor_x86.load(graph)
    with pytest.raises(tq.ArtifactError, match="inductor_x86"):
        tq.load(path)


def test_a_program_is_not_saved_where_there_is_no_folder(x86_pixels, tmp_path):
    with pytest.raises(tq.ArtifactError, match="cannot write"):
        x86_pixels.program.save(tmp_path / "none" / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_the_report_shows_kernels_proof_and_what_stays_float(x86_block):
    text = str(tq.report(x86_block.quantized, x86_block.program))
    assert "annotated compute ops run quantized: 4/4" in text
    assert "torchquant_linear" in text
    assert "1 attention: attention runs in a float kernel" in text


def test_dynamic_int8_runs_all_linears_of_a_transformer(x86_block):
    assert kernels(x86_block.program, "torchquant_linear") == 4
    assert x86_block.program.proof.comparison.sqnr_db > 40
    x = x86_block.batch[0]
    assert tq.sqnr_db(x86_block.exported(x), x86_block.program(x)) > 25


def test_conv1d_of_any_kernel_is_an_integer_kernel_and_refused_without_ours():
    model = Call(
        lambda m, x: m.head(m.point(m.long(x)).relu().transpose(1, 2)),
        long=nn.Conv1d(8, 8, 3, padding=1),
        point=nn.Conv1d(8, 8, 1),
        head=nn.Linear(8, 5),
    )
    x = torch.randn(2, 8, 16)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, x)
    assert (kernels(program, "torchquant_conv1d"), kernels(program, "torchquant_linear")) == (2, 1)
    assert tq.sqnr_db(quantized(x), program(x)) > 60
    with pytest.raises(tq.LoweringError, match=r"conv1d conv1d \(long\).*own kernels alone.*allow_float"):
        inductor_x86.lower(quantized, x, own_kernels=False)


def test_a_transposed_convolution_is_an_integer_kernel_of_any_batch():
    model = Call(
        lambda m, x: m.head(torch.cat([m.up(m.down(x)), x], 1)),
        down=nn.Conv2d(4, 8, 2, stride=2),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        head=nn.Conv2d(10, 3, 3, padding=1),
    )
    x, sizes = torch.randn(2, 4, 8, 6), {0: torch.export.Dim("batch", max=64)}
    quantized = tq.quantize(
        model.eval(),
        (x,),
        [(x,)],
        quantizer=X86Quantizer(),
        algorithms=(),
        dynamic_shapes={"args": (sizes,)},
        progress=False,
    )
    program = inductor_x86.lower(quantized, (x,))
    assert (kernels(program, "torchquant_conv2d"), kernels(program, "torchquant_conv_transpose2d")) == (2, 1)
    assert set(op_times.product_ms(quantized, (x,))) == {"conv2d", "conv_transpose2d", "conv2d_1"}
    [transposed] = [w for w in work(quantized) if w.node == "conv_transpose2d"]
    assert (transposed.precision, transposed.macs) == ("int8", 2 * 8 * 4 * 3 * 6 * 4)
    for batch in (1, 2, 5):
        y = torch.randn(batch, 4, 8, 6)
        assert tq.sqnr_db(quantized(y), program(y)) > 45  # codes flip behind the upsampling
        assert tq.sqnr_db(model(y), program(y)) > 25


@pytest.mark.slow
def test_inductors_int8_conv1d_may_have_any_activation_behind_it():
    def forward(m, x):
        swish, hard = m.first(x), m.second(x)
        return m.last(nn.functional.silu(swish) + nn.functional.hardswish(hard) + swish * hard.sigmoid())

    model = Call(forward, first=nn.Conv1d(8, 8, 1), second=nn.Conv1d(8, 8, 1), last=nn.Conv1d(8, 4, 1))
    x = torch.randn(2, 8, 16)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, x, own_kernels=False)
    assert kernels(program, "qconv") == 3
    assert tq.sqnr_db(quantized(x), program(x)) > 40


def foreign(model, x, kinds, *specs):
    return tq.quantize(model, x, [x], quantizer=SpecQuantizer(kinds, *specs), algorithms=(), progress=False)


TRANSPOSED = Call(lambda m, x: m.inner(x).mean((2, 3)), inner=nn.ConvTranspose2d(3, 4, 2, stride=2))
FEW_BITS = {  # that Inductor would fold back to float or get wrong, and our kernels multiply
    "affine weights": (U8, per_channel(torch.uint8, 0, 255, symmetric=False)),
    "affine int8 weights": (U8, per_channel(symmetric=False)),
    "weight only": (None, per_channel()),
    "16-bit activations": (per_tensor(torch.int16, -32768, 32767), per_channel()),
    "groups": (None, groupwise(8)),
    "groups, 8-bit activations": (U8, groupwise(8)),
}
REFUSED = {
    "transposed, scales of inputs": (TRANSPOSED, {"conv_transpose2d"}, (U8, per_channel()), "on another axis"),
    "transposed, weight only": (TRANSPOSED, {"conv_transpose2d"}, (None, per_channel(axis=1)), "only its weight"),
    "scales on another axis": (nets.mlp(), {"linear"}, (U8, per_channel(axis=1)), "along axis 1"),
    "convolution, weight only": (nn.Conv2d(3, 4, 3), {"conv2d"}, (None, per_channel()), "only its weight is quantized"),
}


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    "name",
    [n if n in ("weight only", "16-bit activations") else pytest.param(n, marks=pytest.mark.slow) for n in FEW_BITS],
)
def test_what_inductor_would_fold_or_get_wrong_is_ours_or_refused(name):
    x = torch.randn(4, 8)
    quantized = foreign(nets.mlp(), x, {"linear"}, *FEW_BITS[name])
    with pytest.raises(tq.LoweringError, match=r"linear \(.*own kernels alone.*allow_float=\['node:"):
        inductor_x86.lower(quantized, x, own_kernels=False)
    program = inductor_x86.lower(quantized, x)
    assert program.proof.fused == program.proof.annotated > 0
    assert tq.sqnr_db(quantized(x), program(x)) > 60


@pytest.mark.parametrize("name", REFUSED)
def test_what_inductor_would_run_wrongly_or_in_float_is_refused_with_site_and_remedy(name):
    model, kinds, specs, words = REFUSED[name]
    x = torch.randn(4, 8) if kinds == {"linear"} else torch.randn(1, 3, 8, 8)
    quantized = foreign(model, x, kinds, *specs)
    with pytest.raises(tq.LoweringError, match=rf"(linear|conv2d|conv_transpose2d) .*{words}.*allow_float=\['node:"):
        inductor_x86.lower(quantized, x)


def test_what_the_user_allows_runs_in_float_with_the_right_result():
    x = torch.randn(4, 8)
    quantized = foreign(nets.mlp(), x, {"linear"}, None, per_channel())
    with pytest.raises(tq.PatternError, match="matches nothing"):
        inductor_x86.lower(quantized, x, allow_float=["op:conv3d"])
    with pytest.raises(tq.LoweringError, match="linear_1"):
        inductor_x86.lower(quantized, x, allow_float=["node:linear"], own_kernels=False)
    program = inductor_x86.lower(quantized, x, allow_float=["op:linear"])
    assert (program.proof.annotated, program.proof.fused) == (0, 0)
    assert program.proof.left_float["2 linear"] == "allowed by the user"
    assert tq.sqnr_db(quantized(x), program(x)) > 60


@pytest.mark.parametrize("integer", [pytest.param(v, marks=pytest.mark.slow) for v in (1.0, 3.0)] + [1.02])
def test_the_faster_of_int8_and_float_is_returned(integer, monkeypatch):
    """Float must be clearly faster: the times of the race are given, all else is real."""
    monkeypatch.setattr(lowering, "race", lambda packages, batch: [integer, 1.0])
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval(), torch.randn(4, 16)
    exported = tq.export(model, (x,))
    converted = tq.quantize(exported, (x,), [(x,)], quantizer=X86Quantizer(), algorithms=(), progress=False)
    if integer < 2:
        program = inductor_x86.lower(converted, (x,), compare_float=True)
        assert (program.proof.annotated, program.proof.fused) == (2, 2)
        assert torch.allclose(program(x), converted(x), atol=1e-4)
        return
    with pytest.warns(UserWarning, match="float32 takes 1 ms on this machine, int8 3 ms"):
        program = inductor_x86.lower(converted, (x,), compare_float=True)
    assert (program.proof.annotated, program.proof.fused) == (2, 0)
    assert "int8 3 ms" in program.proof.left_float["2 annotated ops"]
    assert not any("torchquant" in kernel for kernel in program.proof.kernels)
    assert tq.sqnr_db(model(x), program(x)) > tq.sqnr_db(model(x), converted(x)) + 1  # activations are not rounded


def test_the_race_between_packages_is_timed(x86_residual):
    before = [t.clone() for t in x86_residual.batch]
    assert all(0 < ms < 1000 for ms in lowering.race([x86_residual.program._package] * 2, x86_residual.batch))
    assert all(torch.equal(a, b) for a, b in zip(x86_residual.batch, before, strict=True))


@pytest.mark.slow
def test_a_transposed_convolution_may_be_allowed_too():
    image = torch.randn(2, 3, 6, 6)
    quantized = foreign(TRANSPOSED, image, {"conv_transpose2d"}, U8, per_channel(axis=1))
    program = inductor_x86.lower(quantized, image, allow_float=["op:conv_transpose2d"])
    assert tq.sqnr_db(quantized(image), program(image)) > 40  # its activation is not rounded any more


def test_example_inputs_that_do_not_fit_are_refused_before_compiling(x86_residual):
    with pytest.raises(tq.InputError, match="example_inputs"):
        inductor_x86.lower(x86_residual.quantized, torch.randn(2, 16))


def test_numbers_written_into_parts_of_tensors_with_dynamic_sizes():
    """Inductor takes an expanded constant for a number, and wants a tensor there."""

    def function(m, x):
        y = m.first(x)
        y[:, :4] = 0
        y[:, 5] = 2.5
        y[0, 1] = 3.5
        return m.second(y)

    torch.manual_seed(0)
    model, x = Call(function, first=nn.Linear(8, 8), second=nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    quantized = tq.quantize(
        model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False, dynamic_shapes=(shapes,)
    )
    program = inductor_x86.lower(quantized, x)
    more = torch.randn(7, 8)
    assert tq.sqnr_db(quantized(more), program(more)) > 40


@pytest.mark.slow
def test_an_example_at_the_upper_bound_of_a_dynamic_batch_leaves_it_dynamic():
    x = torch.randn(8, 3, 6, 6)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    quantized = tq.quantize(
        model, x, [x], quantizer=X86Quantizer(), dynamic_shapes=shapes, algorithms=(), progress=False
    )
    program = inductor_x86.lower(quantized, x)
    assert tq.sqnr_db(quantized(x[:3]), program(x[:3])) > 60


def test_torch_compile_reaches_the_same_lowering():
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    quantized = tq.quantize(nets.mlp(), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    compiled = torch.compile(quantized, backend="torchquant")
    before = torch._inductor.config.freezing
    with torch.enable_grad():
        assert tq.sqnr_db(quantized(x), compiled(x)) > 60
    assert torch._inductor.config.freezing == before
    torch._dynamo.reset()
    wrong = torch.compile(quantized, backend="torchquant", options={"speed": math.inf})
    with pytest.raises(Exception, match=r"no options \['speed'\]"):
        wrong(x)


@pytest.mark.parametrize("ours", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_product_that_inductor_loses_between_regions_is_still_an_integer_kernel(ours, monkeypatch):
    """As it did grouped convolutions before our kernels had them: that one is Inductor's, the others stay ours."""
    if not ours:
        can = support.convolution
        monkeypatch.setitem(
            support._RUN,
            "conv2d",
            lambda places, node: can(places, node) and ops.arguments(node).get("groups", 1) == 1,
        )
    model = Call(
        lambda m, x: (lambda y: m.last(torch.cat([y, m.grouped(y)], 1)))(m.first(x)),
        first=nn.Conv2d(3, 12, 3),
        grouped=nn.Conv2d(12, 12, 3, padding=1, groups=3),
        last=nn.Conv2d(24, 4, 1),
    )
    x = torch.randn(2, 3, 9, 11)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    if not ours and torch.uint8 not in exactness.exact_dtypes():
        with pytest.raises(tq.LoweringError, match=r"no VNNI.*conv2d_1 \(grouped\)"):
            inductor_x86.lower(quantized, x)
        return
    program = inductor_x86.lower(quantized, x)
    assert program.proof.annotated == program.proof.fused == 3
    assert program.proof.kernels.get("torchquant_conv2d", 0) == (3 if ours else 2)
    assert kernels(program, "qconv") == (0 if ours else 1)
    assert tq.sqnr_db(quantized(x), program(x)) > 60


# what is not finite ---------------------------------------------------------------------------------------------------


def strewn(x):
    """Copies with NaN, infinity and its negative, each at two places."""
    for value in (math.nan, math.inf, -math.inf):
        wild = x.clone()
        wild.view(-1)[[x.numel() // 3, -1]] = value
        yield wild


@pytest.mark.parametrize("name", ["x86_pixels", "x86_residual", "x86_block"])
def test_what_is_not_finite_comes_out_as_from_the_graph(name, request):
    low = request.getfixturevalue(name)
    for place, tensor in enumerate(low.batch):
        for wild in strewn(tensor):
            batch = [wild if i == place else t for i, t in enumerate(low.batch)]
            outputs = (low.expected(*batch), low.program(*batch))
            for expected, actual in zip(*map(torch.utils._pytree.tree_leaves, outputs), strict=True):
                assert torch.equal(expected.isnan(), actual.isnan())
                infinite = expected.isinf() | actual.isinf()
                assert torch.equal(expected[infinite], actual[infinite])
                finite = expected.isfinite()
                assert not finite.any() or tq.sqnr_db(expected[finite], actual[finite]) > 30


# CPUs without VNNI: oneDNN's int8 products saturate -------------------------------------------------------------------


class SevenBits(X86Quantizer):
    """As X86Quantizer, with activation codes from 0 to 127."""

    schemes = {  # noqa: RUF012
        name: Scheme(name, replace(scheme.activation, format=UINT7), scheme.weight)
        for name, scheme in inductor_x86.SCHEMES.items()
        if name.endswith("_int8")
    }


def half_quantized(quantizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.randn(2, 3, 5, 5)
    return tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False), x


def test_products_that_would_saturate_are_refused_with_layers_and_remedies(monkeypatch):
    monkeypatch.setattr(exactness, "exact_dtypes", frozenset)
    quantized, x = half_quantized(X86Quantizer())
    with pytest.raises(tq.LoweringError) as error:
        inductor_x86.lower(quantized, x, own_kernels=False)
    for words in ("no VNNI", "conv2d conv2d (0); conv2d conv2d_1 (2); linear linear (4)", "own_kernels=True", "UINT7"):
        assert words in str(error.value)
    assert "report this" not in str(error.value)


def test_products_of_seven_bits_go_to_onednn_on_any_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(exactness, "exact_dtypes", frozenset)
    quantized, x = half_quantized(SevenBits())
    program = inductor_x86.lower(quantized, x, own_kernels=False)
    assert kernels(program, "qconv") + kernels(program, "qlinear") == 3
    assert tq.sqnr_db(quantized(x), program(x)) > 60
    assert torch.equal(inductor_x86.load(program.save(tmp_path / "model.pt2"))(x), program(x))


@pytest.mark.skipif(torch.uint8 not in exactness.exact_dtypes(), reason="products of 8 bits need VNNI")
@pytest.mark.slow
def test_a_program_with_onednns_products_is_not_loaded_where_they_saturate(monkeypatch, tmp_path):
    quantized, x = half_quantized(X86Quantizer())
    path = inductor_x86.lower(quantized, x, own_kernels=False).save(tmp_path / "model.pt2")
    monkeypatch.setattr(exactness, "exact_dtypes", frozenset)
    with pytest.raises(tq.ArtifactError, match=r"VNNI.*conv2d_1 \(2\).*Lower the model on this CPU"):
        inductor_x86.load(path)


WITHOUT_VNNI = """
import torch, torchquant as tq
from tests.backends.test_inductor_x86 import SevenBits, X86Quantizer, half_quantized, exactness, inductor_x86
from torchquant.ops.x86 import native
assert torch.uint8 not in exactness.exact_dtypes()
quantized, x = half_quantized(X86Quantizer())
with native.use("avx2" if "avx2" in native.instruction_sets() else "portable"):
    print(tq.sqnr_db(quantized(x), inductor_x86.lower(quantized, x)(x)))
try:
    inductor_x86.lower(quantized, x, own_kernels=False)
except tq.LoweringError as error:
    print("VNNI" in str(error))
quantized, x = half_quantized(SevenBits())
print(tq.sqnr_db(quantized(x), inductor_x86.lower(quantized, x, own_kernels=False)(x)))
"""


def test_a_cpu_without_vnni_gets_right_results_or_a_reason():
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_VNNI]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, refused, seven_bits = done.stdout.split()[-3:]
    assert float(ours) > 60
    assert refused == "True"
    assert float(seven_bits) > 60


def test_what_runs_inside_our_kernels_is_not_said_to_be_left_to_inductor():
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(1152, 8))
    model, x = nn.Sequential(*layers, nn.Softmax(-1)).eval(), torch.randn(2, 3, 16, 16)
    quantized = tq.quantize(model, x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    left = inductor_x86.lower(quantized, x, tune=False).proof.left_float
    assert {op: "inside" in why for op, why in left.items()} == {
        "1 relu": True,
        "1 hardswish": True,
        "1 softmax": False,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_annotated_op_of_another_dtype_is_refused_before_anything_is_compiled(dtype):
    model, x = nn.Linear(4, 2).to(dtype), torch.randn(2, 4).to(dtype)
    quantizer = SpecQuantizer(("linear",), per_tensor(torch.uint8, 0, 255), per_channel())
    quantized = tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False)
    with pytest.raises(tq.LoweringError, match=rf"linear.*computes in {str(dtype)[6:]}.*export a float32 model"):
        inductor_x86.lower(quantized, x)


def test_the_kernels_of_a_package_are_a_third_of_their_size_and_come_out_whole_or_are_refused(x86_pixels, tmp_path):
    path, library = x86_pixels.program.save(tmp_path / "model.pt2"), native.library_file()
    with zipfile.ZipFile(path) as package:
        [name] = [n for n in package.namelist() if n.endswith(f"{library.name}.xz")]
        assert package.getinfo(name).compress_size < library.stat().st_size / 3
        assert program._library(path, package, name) == library.read_bytes()
        content = package.read(name)
    for damaged in (content[:100] + bytes(50) + content[150:], content[:-20], b"no archive"):
        with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as other:
            other.writestr(name, damaged)
            with pytest.raises(tq.ArtifactError, match="its kernels are damaged"):
                program._library(path, other, name)
