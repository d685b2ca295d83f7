"""Calls of XNNPACK programs: numbers, None, names, nesting, sizes that vary, state; and all of it from a `.pte`."""

import pytest
import torch
import torch.nn.functional as F
from nets import Call
from torch import nn

import torchquant as tq
from torchquant.lowering import depth
from torchquant.quantizers.xnnpack import XnnpackQuantizer

pytest.importorskip("executorch")
from executorch.backends.xnnpack.quantizer import xnnpack_quantizer

from torchquant.backends import executorch_xnnpack
from torchquant.backends.executorch_xnnpack import lowering
from torchquant.backends.executorch_xnnpack.kernels import way_out
from torchquant.backends.executorch_xnnpack.limits import refuse_overflow
from torchquant.backends.executorch_xnnpack.program import executorch_modules
from torchquant.fx import ops


def lowered(model, batch, example=None, dynamic_shapes=None, scheme="static_int8"):
    torch.manual_seed(0)
    quantized = tq.quantize(
        model.eval(),
        batch,
        [batch],
        quantizer=XnnpackQuantizer(scheme),
        algorithms=(),
        dynamic_shapes=dynamic_shapes,
        progress=False,
    )
    return executorch_xnnpack.lower(quantized, batch if example is None else example)


@pytest.fixture
def forms(tmp_path):
    """A program as it was lowered, and saved and loaded again."""
    return lambda program: (program, executorch_xnnpack.load(program.save(tmp_path / "model.pte")))


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, scale: float = 1.0, flag: bool = False, mask=None):
        x = self.up(x).relu() * scale
        return self.down(x + 1 if flag else x)


@pytest.mark.parametrize("rest", [(0.5,), (1.0, True), (1.0, False, None)], ids=str)
def test_numbers_bools_and_none_among_the_arguments_are_constants_that_a_call_must_repeat(rest, forms):
    batch = (torch.randn(4, 8), *rest)
    model = Options()
    for program in forms(lowered(model, batch)):
        assert tq.sqnr_db(model(*batch).detach(), program(*batch)) > 25
        with pytest.raises(tq.InputError, match="constant"):
            program(batch[0], 3.0, *rest[1:])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, inputs, pair):
        a, b = self.left(inputs["a"]), self.right(inputs["b"])
        return {"sum": a + b, "rest": (pair[0], a.relu(), 3)}


def test_dicts_in_any_order_nested_inputs_and_outputs_of_any_tree_work(forms):
    model, (a, b) = Nested(), torch.randn(2, 4, 8)
    pair = (torch.randn(2), torch.randn(3))
    for program in forms(lowered(model, ({"a": a, "b": b}, pair))):
        actual, expected = program({"b": b, "a": a}, pair), model({"a": a, "b": b}, pair)
        assert list(actual) == ["sum", "rest"]
        assert tq.sqnr_db(expected["sum"].detach(), actual["sum"]) > 25
        assert torch.equal(actual["rest"][0], pair[0])
        assert actual["rest"][2] == 3
        assert torch.equal(program(pair=pair, inputs={"a": a, "b": b})["sum"], actual["sum"])


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def images(n):
    return (torch.randn(n, 3, 8, 8),)


def test_a_batch_that_varies_stays_so_when_lowered_with_one_sample(forms):
    model = net()
    varying = lowered(model, images(4), images(1), ({0: torch.export.Dim("batch", max=8)},))
    assert varying.proof.kernels["delegate calls"] == 1
    for program in forms(varying):
        assert [i.shape for i in program.inputs] == [(None, 3, 8, 8)]
        for n in (1, 3, 8):
            assert program(*images(n)).shape == (n, 3)
        with pytest.raises(tq.InputError, match=r"9.*<= 8"):
            program(*images(9))


def test_a_convolution_behind_portable_ops_holds_for_every_size_that_was_asked_for():
    """Where torch chooses between its kernels, shape functions note `fewer than 16 samples`: ExecuTorch plans so."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 3, 6, 6)
    shapes = ({0: torch.export.Dim("batch", min=2, max=40)},)
    quantized = tq.quantize(
        model, x, [x], quantizer=XnnpackQuantizer(), algorithms=(), progress=False, dynamic_shapes=shapes
    )
    program = executorch_xnnpack.lower(quantized, x)
    more = torch.randn(40, 3, 6, 6)
    assert tq.sqnr_db(quantized(more), program(more)) > 40


def test_float_ops_that_the_delegate_or_the_portable_kernels_take_in_other_forms_only():
    """A transposed convolution of rows that is float; a pad with negative sizes beside a size that varies."""

    torch.manual_seed(0)
    layers = {"first": nn.Conv1d(3, 4, 3), "last": nn.ConvTranspose1d(4, 2, 3, stride=2, groups=2)}
    layers["last"] = nn.Sequential(nn.Conv1d(5, 4, 1), layers["last"])
    model = Call(lambda m, x: m.last(F.pad(m.first(x), (-1, -2, 0, 1))), **layers).eval()
    x, shapes = torch.randn(2, 3, 16), (({0: torch.export.Dim("batch", max=8)},),)
    quantized = tq.quantize(
        model, x, [x], quantizer=XnnpackQuantizer(), algorithms=(), progress=False, dynamic_shapes=shapes
    )
    program = executorch_xnnpack.lower(quantized, x)
    more = torch.randn(5, 3, 16)
    assert tq.sqnr_db(quantized(more), program(more)) > 40


def test_a_program_with_scales_found_at_run_time_can_be_looked_into():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x, quantizer = torch.randn(4, 8), XnnpackQuantizer("dynamic_int8")
    quantized = tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False)
    graph = lowering._XnnpackLowering().reference(quantized).graph
    held = [n for part in depth.parts_of(graph)[:-1] for n in part.results]
    assert len(held) == 2
    program = lowering._built(executorch_modules(), depth.with_outputs(graph, held), [x])
    expected = depth.with_outputs(graph, held)(x)
    assert all(tq.sqnr_db(a, b) > 40 for a, b in zip(expected, program(x), strict=True))


def test_a_size_without_a_bound_is_refused_with_the_remedy():
    with pytest.raises(tq.LoweringError, match=r"axis 0 has no upper bound.*Dim\('size', max=64\)"):
        lowered(net(), images(4), dynamic_shapes=({0: torch.export.Dim("batch")},))


class Running(nn.Module):
    """A filter with memory, not zero at first."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.register_buffer("memory", torch.full((2, 8), 0.5))

    def forward(self, x):
        self.memory.mul_(0.5).add_(x)
        return self.mix(self.memory)


def test_state_goes_from_call_to_call_from_its_first_value_and_can_be_reset(forms):
    model = Running()
    x = torch.randn(2, 8)
    for program in forms(lowered(model, (x,), scheme="dynamic_int8")):
        model.memory.fill_(0.5)
        for _ in range(3):
            assert tq.sqnr_db(model(x).detach(), program(x)) > 20
        assert torch.allclose(program.state["memory"], model.memory)
        program.reset()
        assert torch.equal(program.state["memory"], torch.full((2, 8), 0.5))


class Returned(nn.Module):
    """One value twice, a parameter, its input, and its state."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.register_buffer("memory", torch.zeros(2, 8))

    def forward(self, x):
        self.memory.add_(x)
        y = self.mix(self.memory)
        return y, y.clone(), x, self.mix.bias, self.memory, self.memory.clone()


def test_a_value_returned_twice_a_parameter_an_input_and_state_are_outputs_like_others(forms):
    model, x = Returned(), torch.randn(2, 8)
    for program in forms(lowered(model, (x,))):
        model.memory.zero_()
        expected, actual = model(x), program(x)
        assert all(tq.sqnr_db(a.detach(), b) > 25 for a, b in zip(expected, actual, strict=True))
        assert torch.equal(actual[0], actual[1])


def test_a_model_that_writes_into_its_input_does_so(forms):
    def forward(m, x):
        x.add_(1.0)
        return m.mix(x)

    model = Call(forward, mix=nn.Linear(8, 4))
    for program in forms(lowered(model, (torch.randn(2, 8),))):
        x = torch.randn(2, 8)
        before = x.clone()
        program(x)
        assert torch.allclose(x, before + 1)


@pytest.fixture(scope="module")
def two_images():
    """A program for two images."""
    return lowered(net(), images(2))


def test_a_loaded_program_has_the_report_and_the_proof(two_images, tmp_path):
    program = two_images
    again = executorch_xnnpack.load(program.save(tmp_path / "model.pte"))
    assert [(s.node, s.op, s.status) for s in again.sites] == [(s.node, s.op, s.status) for s in program.sites]
    assert again.proof == program.proof
    assert again.size_bytes == program.size_bytes


def test_any_runtime_runs_the_file_and_a_file_of_another_writer_loads(two_images, tmp_path):
    from executorch.extension.pybindings import portable_lib

    batch, program = images(2), two_images
    path = program.save(tmp_path / "model.pte")
    (plain,) = portable_lib._load_for_executorch(str(path)).forward(list(batch))
    assert torch.equal(plain, program(*batch))
    content = path.read_bytes()
    foreign = tmp_path / "foreign.pte"
    foreign.write_bytes(content[: executorch_xnnpack.program._end_of(content)])
    again = executorch_xnnpack.load(foreign)
    assert torch.equal(again(*batch), plain)
    assert (again.proof, again.sites) == (None, ())
    assert [i.shape for i in again.inputs] == [(2, 3, 8, 8)]


def test_a_file_cut_or_damaged_in_what_torchquant_wrote_is_refused(two_images, tmp_path):
    content = two_images.save(tmp_path / "model.pte").read_bytes()
    end = executorch_xnnpack.program._end_of(content)
    for name, bad in {
        "cut": content[: end + 40],
        "changed": content[: (end + len(content)) // 2] + b"\0\0\0\0" + content[(end + len(content)) // 2 + 4 :],
    }.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(tq.ArtifactError):
            executorch_xnnpack.load(tmp_path / name)


def test_a_weight_that_the_graph_makes_is_no_fault_of_its_scale():
    """As in a network that generates weights: what becomes of the op is the partitioner's to say."""
    model = Call(
        lambda m, x, w: F.linear(m.first(x), m.make(w).view(4, 8)), first=nn.Linear(8, 8), make=nn.Linear(2, 32)
    )
    batch = (torch.randn(3, 8), torch.randn(1, 2))
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=False)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
    quantized = tq.quantize(model, batch, [batch], quantizer=quantizer, algorithms=(), progress=False)
    sites = [s for s in tq.report(quantized).sites if s.status == "quantized"]
    computed = [s for s in sites if s.op == "linear" and not ops.is_constant(_weight_of(quantized, s.node))]
    assert len(computed) == 1
    refuse_overflow(quantized, sites)


def _weight_of(graph, name):
    return next(n for n in graph.graph.nodes if n.name == name).args[1]


def test_only_what_is_quantized_is_said_to_be_excluded():
    model = Call(lambda m, x: torch.diagonal(m.first(x)) * 2, first=nn.Linear(8, 8))
    batch = (torch.randn(8, 8),)
    quantized = tq.quantize(model, batch, [batch], quantizer=XnnpackQuantizer(), algorithms=(), progress=False)
    advice = {ops.op_name(n): way_out(n) for n in quantized.graph.nodes if ops.is_op(n)}
    assert advice["linear"].startswith("Exclude it from quantization, or write it")
    assert advice["diagonal"].startswith("Write it")
