"""ExecuTorch programs: one delegate call, int8 ops counted, shared qparams, and refusals with the site."""

import nets
import pytest
import torch
import torch.nn.functional as F
from foreign import PlaceholderObserver, SpecQuantizer, dynamic, groupwise, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.quantizers.xnnpack import XnnpackQuantizer

pytest.importorskip("executorch")
from torchquant.backends import executorch_xnnpack


def portable(program):
    return {k: n for k, n in program.proof.kernels.items() if k.startswith("portable")}


COMPUTE = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "linear")


def delegated(program):
    return sum(program.proof.kernels.get(f"delegated int8 {op}", 0) for op in COMPUTE)


@pytest.mark.parametrize(
    ("name", "ops"), [("pte_mobile", 5), ("pte_shared", 4), pytest.param("pte_block", 4, marks=pytest.mark.slow)]
)
def test_a_whole_network_is_one_delegate_call_with_every_op_in_int8(name, ops, request):
    low = request.getfixturevalue(name)
    proof = low.program.proof
    assert proof.kernels["delegate calls"] == 1
    assert not portable(low.program)
    assert delegated(low.program) == proof.annotated == proof.fused == ops
    assert proof.comparison.sqnr_db >= 40


@pytest.mark.parametrize(("name", "least_db"), [("pte_mobile", 15), ("pte_shared", 25), ("pte_block", 25)])
def test_fresh_data_gives_what_the_converted_graph_gives(name, least_db, request):
    low = request.getfixturevalue(name)
    x = torch.randn(low.batch[0].shape)
    assert tq.sqnr_db(low.expected(x), low.program(x)) > 30
    assert tq.sqnr_db(low.exported(x), low.program(x)) > least_db


def test_a_dead_channel_keeps_its_bias(pte_shared):
    left = pte_shared.exported
    x = torch.zeros(1, 3, 8, 8)
    assert tq.sqnr_db(left(x), pte_shared.program(x)) > 20


def test_in_static_int8_all_linears_of_a_transformer_are_int8(pte_static_block):
    assert delegated(pte_static_block.program) == pte_static_block.program.proof.annotated == 4
    assert pte_static_block.program.proof.comparison.sqnr_db >= 40


def test_the_artefact_is_smaller_than_the_float_weights(pte_block):
    floats = 4 * sum(v.numel() for v in pte_block.exported.state_dict().values())
    assert pte_block.program.size_bytes < floats


def test_a_saved_program_loads_again_with_bit_equal_results(pte_mobile, tmp_path):
    path = pte_mobile.program.save(tmp_path / "model.pte")
    assert path.stat().st_size == pte_mobile.program.size_bytes
    again = executorch_xnnpack.load(path)
    x = pte_mobile.batch[0]
    assert torch.equal(again(x), pte_mobile.program(x))
    assert [i.shape for i in again.inputs] == [(1, 3, 16, 16)]
    for bad in (torch.randn(2, 3, 16, 16), x.double()):
        with pytest.raises(tq.InputError):
            again(bad)


def test_a_loaded_program_can_be_shown_in_a_report(pte_mobile, tmp_path):
    again = executorch_xnnpack.load(pte_mobile.program.save(tmp_path / "model.pte"))
    assert "executorch_xnnpack" in str(tq.report(pte_mobile.quantized, again))


def test_truncated_foreign_and_missing_files_are_refused(pte_mobile, tmp_path):
    path = pte_mobile.program.save(tmp_path / "model.pte")
    content = path.read_bytes()
    for i, part in enumerate(
        (b"", content[:3], content[:20], content[: len(content) // 2], content[:-9], b"text" * 50)
    ):
        (tmp_path / f"{i}.pte").write_bytes(part)
        with pytest.raises(tq.ArtifactError, match="truncated"):
            executorch_xnnpack.load(tmp_path / f"{i}.pte")
    with pytest.raises(tq.ArtifactError, match="is not a file"):
        executorch_xnnpack.load(tmp_path / "none.pte")


def test_a_program_is_not_saved_where_there_is_no_folder(pte_mobile, tmp_path):
    with pytest.raises(tq.ArtifactError, match="cannot write"):
        pte_mobile.program.save(tmp_path / "none" / "model.pte")
    assert not list(tmp_path.iterdir())


def test_results_are_not_overwritten_by_the_next_call(pte_difference):
    a, b = pte_difference.batch
    first = pte_difference.program(a, b)
    copied = first.clone()
    pte_difference.program(3 * a, 3 * b)
    assert torch.equal(first, copied)


def test_inputs_may_be_strided_and_require_grad(pte_difference):
    a, b = pte_difference.batch
    expected = pte_difference.program(a, b)
    assert torch.equal(pte_difference.program(a.t().contiguous().t(), b.repeat(1, 2)[:, :4]), expected)
    assert torch.equal(pte_difference.program(a.clone().requires_grad_(), b), expected)


def test_keyword_arguments_may_come_in_any_order(pte_difference):
    a, b = pte_difference.batch
    expected = pte_difference.program(a, b)
    assert torch.equal(pte_difference.program(a=a, b=b), expected)
    assert torch.equal(pte_difference.program(b=b, a=a), expected)


def foreign(model, x, kinds, *specs):
    return tq.quantize(model, x, [x], quantizer=SpecQuantizer(kinds, *specs), algorithms=(), progress=False)


S8 = per_tensor()
CONV = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
REFUSED = {
    "affine weights": ("linear", (S8, per_channel(symmetric=False), S8), "zero points"),
    "bytes, dynamic": (
        "linear",
        (per_tensor(torch.uint8, 0, 255, observer=PlaceholderObserver, is_dynamic=True), per_channel()),
        "dynamic ops take int8",
    ),
    "affine weights, dynamic": ("linear", (dynamic(), per_channel(symmetric=False)), "zero points"),
    "affine weights of a conv": ("conv2d", (S8, per_channel(symmetric=False), S8), "zero points"),
    "uint8 activations": ("linear", (per_tensor(torch.uint8, 0, 255), per_channel(), None), "uint8"),
    "uint8 weights": ("linear", (S8, per_channel(torch.uint8, 0, 255, symmetric=False), S8), "uint8"),
    "int16 activations": ("linear", (per_tensor(torch.int16, -32768, 32767), per_channel(), None), "int16"),
    "reduced range": ("linear", (per_tensor(low=0, high=127), per_channel(), S8), r"0\.\.127"),
    "4-bit range": ("conv2d", (per_tensor(low=-8, high=7), per_channel(), S8), r"-8\.\.7"),
    "4-bit conv": ("conv2d", (S8, per_channel(low=-8, high=7), S8), r"-8\.\.7"),
    "weight only": ("linear", (None, per_channel()), "weight-only"),
    "per-tensor weights, dynamic": ("linear", (dynamic(), per_tensor(symmetric=True)), "per-channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_delegate_would_drop_or_change_is_refused_with_site_and_remedy(name):
    op, specs, words = REFUSED[name]
    x = torch.randn(1, 3, 8, 8) if op == "conv2d" else torch.randn(4, 8) + 3
    quantized = foreign(CONV if op == "conv2d" else nets.mlp(), x, {op}, *specs)
    with pytest.raises(tq.LoweringError, match=rf"{op} {op}\w* \(\d\).*{words}.*allow_float=\['node:{op}"):
        executorch_xnnpack.lower(quantized, x)


def test_scales_in_another_default_dtype_are_refused():
    x = torch.randn(4, 8)
    exported = torch.export.export(nets.mlp().eval(), (x,)).module()
    torch.set_default_dtype(torch.float64)
    try:  # torchao's own calls, which ours keep from other dtypes
        prepared = prepare_pt2e(exported, SpecQuantizer({"linear"}, dynamic(), per_channel()))
        prepared(x)
        quantized = convert_pt2e(prepared)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(tq.LoweringError, match=r"linear linear \(0\).*scales are torch.float64 .*default dtype"):
        executorch_xnnpack.lower(quantized, x)


def test_a_graph_that_draws_random_numbers_is_refused_by_its_op():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train(), torch.randn(4, 8)
    prepared = prepare_pt2e(
        torch.export.export(model, (x,)).module(), SpecQuantizer({"linear"}, dynamic(), per_channel())
    )
    tq.calibrate(prepared, [x], progress=False)
    with pytest.raises(tq.LoweringError, match=r"dropout draws random numbers.*evaluation"):
        executorch_xnnpack.lower(tq.convert(prepared), x)


def test_static_ops_without_an_int8_output_are_refused_with_what_they_lack():
    x = torch.randn(4, 8)
    with pytest.raises(tq.LoweringError, match=r"linear linear_1 \(2\).*given an int8 output"):
        executorch_xnnpack.lower(foreign(nets.mlp(), x, {"linear"}, S8, per_channel()), x)


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
def test_groupwise_weights_alone_are_refused_as_weight_only():
    x = torch.randn(4, 64)
    quantized = foreign(nn.Sequential(nn.Linear(64, 32)), x, {"linear"}, None, groupwise())
    with pytest.raises(tq.LoweringError, match="weight-only"):
        executorch_xnnpack.lower(quantized, x)


def test_an_output_of_reduced_range_is_refused():
    x = torch.randn(4, 8)
    quantized = foreign(nets.mlp(), x, {"linear"}, S8, per_channel(), per_tensor(low=-64, high=63))
    with pytest.raises(tq.LoweringError, match=r"-64\.\.63"):
        executorch_xnnpack.lower(quantized, x)


@pytest.mark.parametrize(
    "op",
    [
        "cat",
        "max_pool2d",
    ],
)
def test_independent_qparams_around_what_shares_them_are_refused(op):
    function = {
        "cat": lambda m, x: torch.cat([m.a(x), 9 * m.a(x)], 1),
        "max_pool2d": lambda m, x: F.max_pool2d(m.a(x), 2),
    }[op]
    image = torch.randn(1, 3, 8, 8)
    quantized = foreign(Call(function, a=nn.Conv2d(3, 4, 1)), image, {"conv2d", op}, S8, per_channel(), S8)
    with pytest.raises(tq.LoweringError, match=rf"{op} {op}.*SharedQuantizationSpec"):
        executorch_xnnpack.lower(quantized, image)


def test_attention_written_by_hand_lowers_in_static_int8():
    batch = nets.token_batch()
    quantized = tq.quantize(
        nets.MaskedTokens(), batch, [batch], quantizer=XnnpackQuantizer("static_int8"), algorithms=(), progress=False
    )
    program = executorch_xnnpack.lower(quantized, batch)
    assert program.proof.annotated == program.proof.fused == 4


def test_executorchs_own_quantizer_lowers_through_the_same_backend():
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as theirs

    image = torch.randn(1, 3, 8, 8)
    quantizer = theirs.XNNPACKQuantizer().set_global(theirs.get_symmetric_quantization_config(is_per_channel=True))
    quantized = tq.quantize(nets.cnn(), image, [image], quantizer=quantizer, algorithms=(), progress=False)
    program = executorch_xnnpack.lower(quantized, image)
    assert program.proof.annotated == program.proof.fused == 2


def test_our_quantizer_works_in_an_executorch_recipe():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.export import ExportRecipe, LoweringRecipe, QuantizationRecipe, export

    image, model = torch.randn(1, 3, 8, 8), nets.cnn()
    recipe = ExportRecipe(
        quantization_recipe=QuantizationRecipe(quantizers=[XnnpackQuantizer()]),
        lowering_recipe=LoweringRecipe(partitioners=[XnnpackPartitioner()]),
    )
    session = export(model, [(image,)], recipe)
    (output,) = session.run_method("forward", (image,))
    prepared = prepare_pt2e(tq.export(model, image), XnnpackQuantizer())
    tq.calibrate(prepared, [image], progress=False)
    assert tq.sqnr_db(convert_pt2e(prepared)(image), output) > 40
    assert 20 < tq.sqnr_db(model(image), output) < 70


def test_the_observer_of_activations_can_be_chosen():
    x = torch.randn(4, 8)
    prepared = tq.prepare(tq.export(nets.mlp(), x), XnnpackQuantizer("static_int8", observer=MinMaxObserver))
    kinds = {type(m) for m in prepared.children()}
    assert MinMaxObserver in kinds


class TiedTwice(nn.Module):
    """An embedding tied to the head, a linear called twice, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.inner(self.inner(self.embed(ids)))
        return {"logits": self.head(x), "hidden": x}


def test_a_linear_called_twice_has_the_right_bias_both_times_and_outputs_keep_their_names():
    torch.manual_seed(0)
    model, ids = TiedTwice().eval(), torch.randint(0, 20, (2, 5))
    quantized = tq.quantize(model, ids, [ids], quantizer=XnnpackQuantizer("static_int8"), algorithms=(), progress=False)
    program = executorch_xnnpack.lower(quantized, ids)
    actual, expected = program(ids), quantized(ids)
    assert program.proof.fused == 3
    assert list(actual) == ["logits", "hidden"]
    assert tq.sqnr_db(expected["logits"], actual["logits"]) > 40
