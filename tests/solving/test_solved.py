"""Solved observers: convert emits exactly the codes that were chosen, and a solution can be taken out again."""

import nets
import pytest
import torch
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, groupwise, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

import torchquant as tq
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.backends import inductor_x86
from torchquant.calibration.evaluator import FLOAT_BIAS, Evaluator
from torchquant.calibration.stream import Stream
from torchquant.fx import ops, passes
from torchquant.fx.blocks import layers, weight_grid, weight_of
from torchquant.fx.reading import observers
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer
from torchquant.solving.solved import Solution, SolvedActivation, SolvedWeight, apply

U8 = per_tensor(torch.uint8, 0, 255)


def random_codes(prepared, scale=1.1):
    """A solution with random codes on each weight's grid, its scale changed."""
    weights = {}
    for span in layers(prepared):
        (site,) = span.sites
        grid = weight_grid(prepared, site)
        shape = float_weight(prepared, site).shape
        weights[site.name] = (
            torch.randint(grid.quant_min, grid.quant_max + 1, shape).float(),
            grid.with_scale(grid.scale * scale),
        )
    return Solution(weights)


def stored(converted, site):
    """The codes that a converted op reads, and their decoded values."""
    node = next(n for n in converted.graph.nodes if n.name == site)
    source = ops.argument(node, 1)
    assert ops.is_dequantize(source)
    return ops.constant_value(converted, source.args[0]), ops.constant_value(converted, source)


WEIGHTS = {
    "per tensor": per_tensor(low=-127, symmetric=True),
    "per tensor affine": per_tensor(torch.uint8, 0, 255),
    "per channel": per_channel(low=-7, high=7),
    "per channel affine": per_channel(torch.uint8, 0, 15, symmetric=False),
    "axis 1": per_channel(axis=1),
    "per group": groupwise(4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_convert_emits_exactly_the_chosen_codes(name, dtype):
    model, batches = nets.mlp().to(dtype), [torch.randn(4, 8, dtype=dtype)]
    prepared = calibrated(model, batches, SpecQuantizer(("linear",), U8, WEIGHTS[name]))
    solution = random_codes(prepared)
    apply(prepared, solution)
    stream = Stream(prepared, batches)
    assert list(stream.walk([])) == []
    converted = convert_pt2e(prepared)
    for site, (codes, grid) in solution.weights.items():
        weight, values = stored(converted, site)
        assert weight.dtype == grid.dtype
        assert torch.equal(weight.float(), codes)
        assert values.dtype == dtype
        assert torch.equal(values, grid.decode(codes).to(dtype))
    exact, noise = model(*batches), stream.noise
    assert noise == pytest.approx(float((converted(*batches) - exact).double().square().sum()), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_convolution_keeps_its_chosen_codes(dtype):
    model, batches = nn.ConvTranspose2d(4, 6, 2, stride=2).to(dtype), [torch.randn(2, 4, 5, 5, dtype=dtype)]
    quantizer = SpecQuantizer(("conv_transpose2d",), U8, per_channel(axis=1))
    prepared = calibrated(model, batches, quantizer)
    solution = random_codes(prepared)
    apply(prepared, solution)
    converted = convert_pt2e(prepared)
    for site, (codes, _) in solution.weights.items():
        assert torch.equal(stored(converted, site)[0].float(), codes)


def state(prepared):
    """All that a solution could change."""
    nodes = [(n.name, n.op, str(n.target), str(n.args), sorted(map(str, n.meta))) for n in prepared.graph.nodes]
    modules = {name: id(module) for name, module in prepared.named_modules(remove_duplicate=False)}
    sources = {name: [id(o) for o in m.obs_or_fqs] for name, m in prepared.named_modules() if hasattr(m, "obs_or_fqs")}
    tensors = {name: id(t) for name, t in [*prepared.named_parameters(), *prepared.named_buffers()]}
    return nodes, modules, sources, tensors


def whole_solution(prepared):
    """Codes and biases for every site, ranges for every static activation that stands alone."""
    solution = random_codes(prepared)
    for span in layers(prepared):
        (site,) = span.sites
        axis = -1 if ops.op_name(site) == "linear" else 1
        solution.biases[site.name] = torch.randn(site.meta["val"].shape[axis])
    weights = {str(weight_of(prepared, s.sites[0])[0].target) for s in layers(prepared)}
    for node, observer in observers(prepared):
        if str(node.target) not in weights and getattr(observer, "qscheme", None) is torch.per_tensor_affine:
            solution.activations[str(node.target)] = (0.5, 3)
    return solution


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    ("make", "sample", "quantizer"),
    [
        (EveryKind, lambda: torch.randn(2, 4, 8, 8), EverySpec),  # derived biases
        (nets.Shared, lambda: torch.randn(2, 3, 8, 8), lambda: XnnpackQuantizer("static_int8")),  # shared observers
        (nets.Mobile, lambda: torch.randn(2, 3, 16, 16), XnnpackQuantizer),
        (lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)), lambda: torch.randn(2, 8), X86Quantizer),
    ],
)
def test_undo_restores_the_graph_exactly(make, sample, quantizer):
    batch = sample()
    prepared = calibrated(make(), [batch], quantizer())
    before, converted = state(prepared), convert_pt2e(passes.copy_graph(prepared))(batch)
    undo = apply(prepared, whole_solution(prepared))
    assert state(prepared) != before
    prepared.graph.lint()
    changed = convert_pt2e(passes.copy_graph(prepared))(batch)
    assert not torch.allclose(changed, converted)
    undo()
    assert state(prepared) == before
    assert torch.equal(convert_pt2e(passes.copy_graph(prepared))(batch), converted)


def test_solutions_on_top_of_each_other_are_undone_in_reverse():
    batch = torch.randn(2, 8)
    prepared = calibrated(nets.mlp(), [batch], X86Quantizer())
    states, undos = [state(prepared)], []
    for _ in range(3):
        undos.append(apply(prepared, whole_solution(prepared)))
        states.append(state(prepared))
    assert not any(isinstance(o.original, (SolvedWeight, SolvedActivation)) for _, o in observers(prepared))
    for undo in reversed(undos):
        assert state(prepared) == states.pop()
        undo()
    assert state(prepared) == states.pop()


def test_a_derived_bias_follows_the_new_scales():
    batch = torch.randn(2, 4, 8, 8)
    prepared = calibrated(EveryKind(), [batch], EverySpec())
    site = layers(prepared)[0].sites[0]
    bias = next(o for n, o in observers(prepared) if n is site.args[2])
    before = bias.calculate_qparams()[0]
    codes, grid = random_codes(prepared, 2.0).weights[site.name]
    undo = apply(prepared, Solution({site.name: (codes, grid)}, activations={str(site.args[0].target): (0.5, 3)}))
    assert torch.allclose(bias.calculate_qparams()[0], grid.scale * 0.5)
    undo()
    assert torch.equal(bias.calculate_qparams()[0], before)


def test_a_shared_observer_is_replaced_wherever_it_stands():
    model = Call(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    prepared = calibrated(model, [torch.randn(2, 3, 4, 4)], XnnpackQuantizer("static_int8"))
    by_module = {}
    for node, observer in observers(prepared):
        by_module.setdefault(id(observer), []).append(str(node.target))
    shared = next(targets for targets in by_module.values() if len(targets) > 1)
    undo = apply(prepared, Solution(activations={shared[0]: (0.25, 1)}))
    assert len({id(prepared.get_submodule(target)) for target in shared}) == 1
    assert isinstance(prepared.get_submodule(shared[-1]), SolvedActivation)
    undo()
    assert not any(isinstance(o, SolvedActivation) for _, o in observers(prepared))


@pytest.mark.parametrize("bias", [True, False])
def test_a_corrected_bias_leaves_the_float_flow_as_it_was(bias):
    model, batch = nn.Linear(8, 4, bias=bias), torch.randn(2, 8)
    prepared = calibrated(model, [batch], X86Quantizer())
    site = layers(prepared)[0].sites[0]
    for _ in range(2):  # the second one on top of the first
        apply(prepared, Solution(biases={site.name: torch.full((4,), 100.0)}))
    source = site.args[2]
    assert FLOAT_BIAS in source.meta
    exact = Evaluator(prepared, "float").value(source, {})
    assert exact is None if not bias else torch.equal(exact, model.bias)
    assert Evaluator(prepared, "quantized").value(source, {}).tolist() == [100.0] * 4
    assert tq.convert(prepared)(batch).mean() > 90


def test_an_empty_solution_is_false():
    assert not Solution()
    assert Solution(biases={"a": torch.zeros(1)})


# programs -------------------------------------------------------------------------------------------------------------


def test_an_optimized_cnn_keeps_all_int8_kernels_on_x86():
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    prepared = calibrated(nets.cnn(), batches, X86Quantizer())
    tq.optimize(prepared, batches, [AdaRound(20)], progress=False)
    assert sum(isinstance(o, SolvedWeight) for _, o in observers(prepared)) == 2
    quantized = tq.convert(prepared)
    expected = quantized(batches[0])
    program = inductor_x86.lower(quantized, batches[0])
    assert program.proof.annotated == program.proof.fused == 2
    assert sum(program.proof.kernels.values()) == 2
    assert tq.sqnr_db(expected, program(batches[0])) > 40


def test_an_optimized_cnn_runs_on_xnnpack():
    pytest.importorskip("executorch")
    from torchquant.backends import executorch_xnnpack

    batches = [torch.randn(1, 3, 8, 8) for _ in range(8)]
    prepared = calibrated(nets.cnn(), batches, XnnpackQuantizer())
    tq.optimize(prepared, batches, [AdaRound(20)], progress=False)
    quantized = tq.convert(prepared)
    expected = quantized(batches[0])
    program = executorch_xnnpack.lower(quantized, batches[0])
    assert program.proof.annotated == program.proof.fused == 2
    assert program.proof.kernels["delegate calls"] == 1
    assert tq.sqnr_db(expected, program(batches[0])) > 30
