"""Gauss-Newton steps on codes: the error never rises, a tiny block ends near the best, derivatives are exact."""

import itertools

import pytest
import torch
from foreign import EveryKind, EverySpec, SpecQuantizer, calibrated, per_channel, per_tensor
from torch import nn

from torchquant.algorithms.layers.layerwise import trial
from torchquant.algorithms.spans.compensation import Compensated
from torchquant.algorithms.spans.gauss_newton import _Steps, improve_codes
from torchquant.algorithms.spans.objective import Objective
from torchquant.algorithms.spans.reconstruction import standing
from torchquant.calibration.stream import Stream
from torchquant.fx.blocks import blocks
from torchquant.solving.contract import Clock
from torchquant.solving.solved import Solution

KINDS = ("conv2d", "linear")
W3A8 = SpecQuantizer(KINDS, per_tensor(torch.uint8, 0, 255), per_channel(low=-3, high=3))


def one_block(model, batches, quantizer=W3A8):
    prepared = calibrated(model, batches, quantizer)
    walk = Stream(prepared, batches).walk(blocks(prepared, min_sites=len(list(model.children())), max_sites=20))
    return next(walk), walk


def net(*sizes):
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU())][:-1])


@pytest.mark.parametrize("coupled", [0, 100])
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("sensitive", [False, True])
def test_the_error_never_rises_and_falls_from_rounding_to_nearest(drop, sensitive, coupled, monkeypatch):
    monkeypatch.setattr("torchquant.algorithms.spans.gauss_newton._LARGEST_COUPLED", coupled)
    batches = [torch.randn(16, 8) for _ in range(3)]
    prepared = calibrated(net(8, 12, 6), batches, W3A8)
    spans, stream = blocks(prepared), Stream(prepared, batches)
    if sensitive:
        stream.sensitivities(spans, seed=0)
    for task in stream.walk(spans):
        objective, start = Objective(task, sensitive=sensitive), standing(task)
        solutions = [improve_codes(objective, start, Clock(), rounds=n, drop=drop) for n in (0, 1, 3, 20)]
        errors = [_Steps(objective, start, Clock(), drop, True).look(s).error for s in solutions]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < (0.7 if coupled else 0.9) * errors[0]


def test_the_derivatives_are_those_of_the_error():
    task, _walk = one_block(net(5, 4, 3), [torch.randn(20, 5)])
    objective, start = Objective(task, sensitive=False), standing(task)
    point = _Steps(objective, start, Clock(), 0.0, True).look(start)
    assert point.error == pytest.approx(objective.of(trial(task, start)), rel=1e-5)
    last = task.span.sites[-1].name
    codes, grid = start.weights[last]
    for row, column in ((0, 0), (2, 3)):
        moved = codes.clone().float()
        moved[row, column] += (step := 0.01)
        weights = start.weights | {last: (moved, grid)}
        error = objective.of(trial(task, Solution(weights, start.biases)))
        slope = 2 * float(point.slopes[last][0, row, column]) * step * float(grid.expand(codes.shape)[0][row, 0])
        assert error - point.error == pytest.approx(slope, rel=0.1, abs=1e-3 * abs(point.error))


def test_it_ends_near_the_best_codes_of_a_tiny_block():
    task, _walk = one_block(
        net(2, 1, 1), [torch.rand(64, 2)], SpecQuantizer(KINDS, per_tensor(), per_channel(low=-3, high=3))
    )
    objective, start = Objective(task, sensitive=False), standing(task)
    error = objective.of(trial(task, improve_codes(objective, start, Clock(), rounds=30, biases=False)))
    best = min(
        objective.of(trial(task, Solution(_with(start, task, values), start.biases)))
        for values in itertools.product(range(-3, 4), repeat=3)
    )
    assert best <= error <= max(1.5 * best, 1e-6)


def _with(start, task, values):
    one, two = (start.weights[s.name] for s in task.span.sites)
    codes = torch.tensor(values, dtype=torch.float32)
    names = [s.name for s in task.span.sites]
    return {names[0]: (codes[:2].reshape(1, 2), one[1]), names[1]: (codes[2:].reshape(1, 1), two[1])}


def test_every_kind_of_spec_can_be_improved():
    batches = [torch.randn(2, 4, 8, 8) for _ in range(2)]
    prepared = calibrated(EveryKind(), batches, EverySpec())
    spans, stream = blocks(prepared), Stream(prepared, batches)
    stream.sensitivities(spans, seed=0)
    for task in stream.walk(spans):
        objective, start = Objective(task, sensitive=True), standing(task)
        after = improve_codes(objective, start, Clock(), rounds=5)
        assert objective.of(trial(task, after)) <= objective.of(trial(task, start)) * (1 + 1e-5)
        for codes, grid in after.weights.values():
            assert codes.min() >= grid.quant_min
            assert codes.max() <= grid.quant_max


def test_compensated_weights_bring_the_results_nearer_to_the_float_ones_than_float_weights_do():
    coarse = SpecQuantizer(KINDS, per_tensor(low=-4, high=3), per_channel())
    batches = [torch.randn(64, 8) @ torch.randn(8, 8) for _ in range(4)]
    prepared = calibrated(net(8, 12, 12, 6), batches, coarse)
    spans = blocks(prepared, min_sites=1, max_sites=1)
    for task in Stream(prepared, batches).walk(spans):
        aim, off = Compensated(task), [0.0, 0.0]
        for batch in range(task.count):
            inputs, [wanted] = task.inputs(batch, "quantized"), task.targets(batch)
            [compensated], [plain] = aim.results(inputs), task.outputs(batch, task.evaluator("float"))
            off[0] += float((compensated - wanted).square().sum())
            off[1] += float((plain - wanted).square().sum())
        assert off[0] <= off[1] * (1 + 1e-6) + 1e-6
