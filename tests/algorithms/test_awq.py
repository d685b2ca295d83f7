"""AWQ: the float function stays the same, and the channels that matter are rounded better."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, groupwise, per_channel, per_tensor
from nets import Block
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import torchquant as tq
from torchquant.algorithms import awq
from torchquant.algorithms.awq import AWQ, salience_factor
from torchquant.calibration.calibrate import Recorder, recalibrate
from torchquant.fx import passes
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer


class Gated(nn.Module):
    """A decoder's feed-forward block: a normalization, a gate, and a product in front of the last linear."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[::8] *= 30

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def two_linears():
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        net[0].weight[::8] *= 20
    return net


QUANTIZERS = {
    "weights": lambda: WeightOnlyQuantizer("w3_g16"),
    "symmetric": lambda: WeightOnlyQuantizer("w3_symmetric"),
    "foreign": lambda: SpecQuantizer(("linear",), per_tensor(), per_channel(low=-4, high=3)),
    "foreign groups": lambda: SpecQuantizer(("linear",), per_tensor(), groupwise(16)),
}
NETWORKS = {
    "linears": (two_linears, lambda: torch.randn(64, 32)),
    "gated": (Gated, lambda: torch.randn(2, 24, 32)),
    "block": (Block, lambda: torch.randn(2, 8, 32)),
}


def prepared_of(network="linears", quantizer="weights"):
    torch.manual_seed(0)
    make, draw = NETWORKS[network]
    net, batches = make().eval(), [(draw(),) for _ in range(2)]
    prepared = prepare_pt2e(torch.export.export(net, batches[0]).module(), QUANTIZERS[quantizer]())
    tq.calibrate(prepared, batches, progress=False)
    return prepared, net, batches


def float_outputs(prepared, batches):
    run = Recorder(prepared, {}, observe=False)
    with torch.no_grad():
        return torch.cat([run(*b).flatten() for b in batches])


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # a Quantizer of linears alone
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_float_function_stays_the_same_under_any_quantizer(network, quantizer, explicit):
    prepared, net, batches = prepared_of(network, quantizer)
    twin, before = passes.copy_graph(prepared), float_outputs(prepared, batches)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    algorithm = AWQ(explicit=explicit)
    assert algorithm.transform(prepared, batches) or algorithm.notes
    assert (float_outputs(prepared, batches) - before).norm() <= 1e-5 * before.norm()
    assert torch.equal(float_outputs(twin, batches), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    recalibrate(prepared, batches, progress=False)
    tq.convert(prepared)(*batches[0])


def nearest(weight, width, levels):
    """Affine rounding of (out, in) in groups, its range from the least to the largest value and zero."""
    parts = weight.reshape(len(weight), -1, width)
    least, most = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / (levels - 1)).half().float()
    zero = torch.round(-least / scale).clamp(0, levels - 1)
    codes = (torch.round(parts / scale) + zero).clamp(0, levels - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def test_the_factor_is_that_of_the_papers_search(monkeypatch):
    prepared, net, batches = prepared_of()
    chosen = []
    monkeypatch.setattr(awq.folding, "fold", lambda model, group, s, *, name: chosen.append(s))
    assert AWQ().transform(prepared, batches) == 2
    with torch.no_grad():
        x = net[0](torch.cat([batch for (batch,) in batches]))
        y = net[1:3](x)
    for s, data, layer in zip(chosen, (x, y), (net[1], net[3]), strict=True):
        weight, errors, factors = layer.weight.detach(), [], []
        for alpha in torch.arange(21) / 20:
            factor = data.abs().mean(0).pow(alpha).clamp(min=1e-4)
            factors.append(factor / (factor.max() * factor.min()).sqrt())
            rounded = nearest(weight * factors[-1], 16, 8) / factors[-1]
            errors.append(float((data @ (rounded - weight).T).square().sum()))
        assert torch.allclose(s, factors[errors.index(min(errors))], rtol=1e-4)


def test_the_factors_product_of_extremes_is_one_and_dead_channels_stay_finite():
    s = salience_factor(torch.tensor([0.0, 0.5, 2.0, 40.0]), 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1)
    assert bool((s > 0).all())
    assert torch.allclose(s[3] / s[1], torch.tensor(80.0).sqrt())


@pytest.mark.parametrize(
    ("network", "quantizer", "gain_db"),
    [("linears", "weights", 1.5), ("gated", "weights", 1.5), ("linears", "symmetric", 0.2)],
)
def test_layers_with_outlying_inputs_are_rounded_better(network, quantizer, gain_db):
    prepared, net, batches = prepared_of(network, quantizer)
    result = tq.optimize(prepared, batches, [AWQ()], progress=False)
    (_, before, _), (_, after, kept) = result.steps
    assert kept
    assert after > before + gain_db
    held_out = NETWORKS[network][1]()
    plain, *_ = prepared_of(network, quantizer)
    expected = net(held_out)
    errors = [tq.sqnr_db(expected, tq.convert(graph)(held_out)) for graph in (plain, prepared)]
    assert errors[1] > errors[0] + gain_db / 2


def test_what_cannot_take_a_factor_is_named_and_can_be_multiplied_explicitly():
    class Post(nn.Module):  # as BERT: what a normalization makes goes into the sum too
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
            with torch.no_grad():
                self.norm.weight[::8] *= 20

        def forward(self, x):
            y = self.norm(x)
            return y + self.down(F.gelu(self.up(y)))

    NETWORKS["post"] = (Post, lambda: torch.randn(64, 32))
    prepared, _, batches = prepared_of("post")
    result = tq.optimize(prepared, batches, [AWQ()], progress=False)
    assert result.notes == [
        "AWQ: layer_norm: left as it is: layer_norm is read by add too",
        "AWQ: gelu: left as it is: a factor does not pass gelu gelu",
        "AWQ: nothing to change",
    ]
    result = tq.optimize(prepared, batches, [AWQ(explicit=True)], progress=False)
    assert result.steps[-1][1] > result.steps[0][1] + 1
    model = tq.convert(prepared)
    added = [s for s in tq.report(model).sites if s.reason.startswith("AWQ: layer_norm is read by add too")]
    assert [s.op for s in added] == ["mul"]


def test_convolutions_of_one_position_are_matrices_and_others_are_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    with torch.no_grad():
        net[0].weight[::8] *= 30
    batches = [(torch.randn(4, 3, 8, 8),)]
    prepared = tq.prepare(tq.export(net, batches[0]), WeightOnlyQuantizer("w3_g16"))
    tq.calibrate(prepared, batches, progress=False)
    result = tq.optimize(prepared, batches, [AWQ()], progress=False)
    assert "AWQ: relu_1: left as it is: a convolution of more than one position reads it" in result.notes
    assert result.steps[-1][1] > result.steps[0][1] + 0.3


def test_second_moments_in_several_passes_give_the_same(monkeypatch):
    whole, _, batches = prepared_of("gated")
    AWQ().transform(whole, batches)
    parts, *_ = prepared_of("gated")
    monkeypatch.setattr(awq, "_BYTES", 1)
    AWQ().transform(parts, batches)
    assert torch.equal(float_outputs(whole, batches), float_outputs(parts, batches))
    held = [dict(g.named_parameters()) for g in (whole, parts)]
    assert all(torch.equal(v, held[1][k]) for k, v in held[0].items())


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, monkeypatch):
    whole, _, batches = prepared_of("gated")
    tq.optimize(whole, batches, [AWQ(), tq.SeqMSE()], progress=False)
    solve, calls = tq.SeqMSE.solve, []

    def stopping(self, task, clock):
        calls.append(task.span.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(self, task, clock)

    monkeypatch.setattr(tq.SeqMSE, "solve", stopping)
    with pytest.raises(KeyboardInterrupt):
        tq.optimize(prepared_of("gated")[0], batches, [AWQ(), tq.SeqMSE()], checkpoint=tmp_path / "r", progress=False)
    resumed, *_ = prepared_of("gated")
    tq.optimize(resumed, batches, [AWQ(), tq.SeqMSE()], checkpoint=tmp_path / "r", progress=False)
    assert calls == ["gate", "up", "up", "down"]
    assert torch.equal(tq.convert(resumed)(*batches[0]), tq.convert(whole)(*batches[0]))


def test_a_wrong_argument_and_a_wrong_order_are_refused():
    with pytest.raises(tq.InputError, match="steps is 0"):
        AWQ(0)
    prepared, _, batches = prepared_of()
    with pytest.raises(tq.InputError, match="AWQ changes float weights, so it must come before"):
        tq.optimize(prepared, batches, [tq.SeqMSE(), AWQ()], progress=False)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("make", [two_linears, Gated])
def test_constants_keep_the_dtype_of_a_model_in_bfloat16(make, explicit):
    net, batches = make().bfloat16().eval(), [(torch.randn(2, 24, 32).bfloat16(),)]
    prepared = tq.prepare(tq.export(net, batches[0]), WeightOnlyQuantizer("w3_g16"))
    tq.calibrate(prepared, batches, progress=False)
    assert AWQ(explicit=explicit).transform(prepared, batches)
    assert {p.dtype for p in prepared.parameters()} == {torch.bfloat16}
    assert tq.sqnr_db(net(*batches[0]).float(), float_outputs(prepared, batches).reshape(2, 24, -1).float()) > 35


def test_a_tensor_that_is_not_finite_is_left_as_it_is():
    prepared, _, batches = prepared_of("gated")
    batches[1][0][0, 0, 0] = torch.inf
    algorithm = AWQ()
    assert algorithm.transform(prepared, batches) == 0
    assert any("it holds NaN, infinity" in note for note in algorithm.notes)


class TiedTable(nn.Module):
    """A decoder's ends: the head has the weight of the table."""

    def __init__(self):
        super().__init__()
        self.table, self.block, self.norm = nn.Embedding(50, 32), Gated(), nn.RMSNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.norm.weight[::8] *= 30

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.table(tokens))))


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("algorithm", "scheme"), [(AWQ, "w3_g16"), (tq.SmoothQuant, None)])
def test_a_table_that_is_also_the_head_stays_one(algorithm, scheme, explicit):
    net, batches = TiedTable().eval(), [torch.randint(0, 50, (2, 24)) for _ in range(2)]
    quantizer = WeightOnlyQuantizer(scheme) if scheme else X86Quantizer()
    prepared = prepare_pt2e(torch.export.export(net, (batches[0],)).module(), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    transform = algorithm(explicit=explicit)
    changed = transform.transform(prepared, batches)
    assert changed or algorithm is tq.SmoothQuant  # the block's own linears are scaled
    assert any("is also the table of embedding" in note for note in transform.notes)
    assert len({n.target for n in prepared.graph.nodes if n.op == "get_attr" and n.meta["val"].shape == (50, 32)}) == 1
