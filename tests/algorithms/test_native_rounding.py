"""The C++ loops of codes one after the other, against the same in PyTorch."""

import pytest
import torch

from torchquant.algorithms import gptq
from torchquant.algorithms.layers import descent
from torchquant.algorithms.layers.rounding import Problem
from torchquant.errors import LoweringError
from torchquant.ops.rounding import native

SIZES = [(1, 5, 7), (1, 32, 64), (1, 70, 200), (1, 1, 129), (4, 33, 9)]


def _problem(groups: int, outputs: int, inputs: int, low: int = -7, high: int = 7) -> Problem:
    generator = torch.Generator().manual_seed(groups + outputs + inputs)
    target = torch.randn(groups, outputs, inputs, generator=generator)
    data = torch.randn(groups, inputs, 3 * inputs, generator=generator)
    mixed = torch.eye(inputs) + 0.3 * torch.randn(groups, inputs, inputs, generator=generator) / inputs**0.5
    data = mixed @ data
    metric = data @ data.transpose(1, 2) / data.shape[-1]
    scale = (target.abs().amax(-1, keepdim=True) / high).expand(target.shape).contiguous()
    cells = torch.arange(groups * outputs).reshape(groups, outputs, 1).expand(target.shape).contiguous()
    zeros = torch.zeros_like(target) if low < 0 else torch.full_like(target, float(high // 2))
    return Problem(target, metric, scale, zeros, cells, groups * outputs, low, high)


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch):
    def choose(value: bool) -> None:
        monkeypatch.setattr(native, "is_built", lambda: not value)

    return choose


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("low", "high"), [(-7, 7), (0, 3)])
def test_descent_is_that_of_pytorch(size: tuple[int, int, int], low: int, high: int, in_pytorch) -> None:
    """Codes may differ where a value lies between two of them: the error says that both are as good."""
    assert native.is_built()
    problem = _problem(*size, low, high)
    errors = []
    for pytorch in (False, True):
        in_pytorch(pytorch)
        codes = descent.descend(problem, problem.nearest(), sweeps=3)
        assert torch.equal(codes, codes.round().clamp(low, high))
        errors.append(problem.error(codes))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[0] < problem.error(problem.nearest()) or min(size[1:]) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("low", "high"), [(-7, 7), (0, 3)])
def test_propagation_is_that_of_pytorch(size: tuple[int, int, int], low: int, high: int, in_pytorch) -> None:
    """An error that is carried on is chaotic in the last bit of a tie, so all but a few codes are the same."""
    problem = _problem(*size, low, high)
    answers = []
    for pytorch in (False, True):
        in_pytorch(pytorch)
        answers.append(gptq.propagate(problem)[0])
    assert (answers[0] != answers[1]).float().mean() < 0.01
    assert problem.error(answers[0]) == pytest.approx(problem.error(answers[1]), rel=0.02)


def test_one_block_is_equal_bit_for_bit() -> None:
    """Of numbers that float32 holds exactly: powers of two and small integers."""
    codes = torch.tensor([[0.0, 1.0], [2.0, -3.0]])
    slope, scale, inverse = torch.tensor([[2.0, -4.0], [8.0, 0.0]]), torch.full((2, 2), 0.5), torch.full((2, 2), 0.5)
    metric = torch.tensor([[4.0, 2.0], [2.0, 4.0]])
    moved = native.descend(codes, slope, scale, inverse, metric, (-7, 7))
    # column 0: 0 - 1 = -1 and 1 + 2 = 3; values move by -0.5 and 1; slopes of column 1: 8 - 1 = 7 and 0 + 2 = 2
    # column 1: 2 - 3.5 = -1.5 -> -2 (half to even) and -3 - 1 = -4
    assert codes.tolist() == [[-1.0, 3.0], [-2.0, -4.0]]
    assert moved.tolist() == [[-0.5, 1.0], [-2.0, -0.5]]


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise LoweringError("no compiler")

    monkeypatch.setattr(native, "built", refuse)
    native._library.cache_clear()
    try:
        assert not native.is_built()
        problem = _problem(1, 6, 10)
        assert problem.error(descent.descend(problem, problem.nearest())) <= problem.error(problem.nearest())
    finally:
        native._library.cache_clear()
