"""A metric of the user's own: what it is given, what it may return, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.measure.metric import scored
from torchquant.quantizers import X86Quantizer


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * scale


@pytest.fixture(scope="module")
def exported():
    return tq.export(TwoInputs(), {"x": torch.randn(2, 8), "scale": torch.randn(2, 1)})


@pytest.mark.parametrize(
    "value",
    [1, 0.5, True, torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.array(0.5), np.array([[0.5]]), math.inf],
)
def test_numbers_and_what_holds_one_are_taken(value) -> None:
    assert scored(lambda model: value, nn.Identity(), "the model") == np.asarray(value).item()


@pytest.mark.parametrize("value", [None, "0.5", torch.randn(3), {"top1": 0.5}, [0.5], 1j, np.ones(2)])
def test_what_is_no_number_is_refused(value) -> None:
    with pytest.raises(tq.InputError, match="which is no number"):
        scored(lambda model: value, nn.Identity(), "the model")


@pytest.mark.parametrize("value", [math.nan, torch.tensor(math.nan)])
def test_nan_is_refused_with_the_models_name(value) -> None:
    with pytest.raises(tq.InputError, match="NaN for the quantized model"):
        scored(lambda model: value, nn.Identity(), "the quantized model")


def test_what_a_metric_raises_is_told() -> None:
    def broken(model):
        raise KeyError("labels")

    with pytest.raises(tq.InputError, match="raised KeyError on the float model: 'labels'") as error:
        scored(broken, nn.Identity(), "the float model")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("metric", [None, 5, "accuracy", nn.MSELoss(), nn.MSELoss])
def test_what_cannot_be_a_metric_is_refused(metric) -> None:
    with pytest.raises(tq.InputError, match="metric is a function"):
        scored(metric, nn.Identity(), "the model")


def test_a_graph_takes_arguments_in_any_order_and_eval_and_train(exported) -> None:
    x, scale = torch.randn(2, 8), torch.randn(2, 1)

    def metric(model):
        model.eval()
        model.train(False)
        assert not torch.is_grad_enabled()
        first, second = model(scale=scale, x=x), model(x=x, scale=scale)
        assert torch.equal(first, second)
        return first.mean()

    assert math.isfinite(scored(metric, exported, "the float model"))


# in optimize ----------------------------------------------------------------------------------------------------------


def _prepared(batches, model=None):
    model = model or nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    prepared = tq.prepare(tq.export(model, batches[0]), X86Quantizer("static_int8"))
    tq.calibrate(prepared, batches, progress=False)
    return prepared


def _batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 16, generator=generator),) for _ in range(count)]


def test_an_algorithm_that_the_metric_dislikes_is_taken_back() -> None:
    """Whatever the SQNR says of it."""
    batches = _batches(4)
    prepared = _prepared(batches)
    before = tq.convert(_copy(prepared))(*batches[0])

    class Falling:
        value = 1.0

        def __call__(self, model):
            assert model(*batches[0]).shape == (16, 8)
            self.value -= 0.1
            return self.value

    with pytest.warns(tq.TorchquantWarning, match=r"BiasCorrection.* by the metric"):
        result = tq.optimize(prepared, batches, [_bias()], metric=Falling(), progress=False)
    assert [kept for _, _, kept in result.steps] == [True, False]
    assert result.scores == pytest.approx([0.9, 0.8])
    assert torch.equal(tq.convert(prepared)(*batches[0]), before)


def test_where_the_metric_is_the_same_the_output_decides() -> None:
    batches = _batches(4)
    result = tq.optimize(_prepared(batches), batches, [_bias()], metric=lambda model: 1.0, progress=False)
    (_, before, _), (_, after, kept) = result.steps
    assert kept == (after >= before)
    assert "metric 1" in str(result)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")  # whichever is kept
def test_figures_say_what_they_were_measured_on() -> None:
    few, many, other = _batches(4), _batches(16), _batches(2, seed=5)
    fitted = tq.optimize(_prepared(few), few, [_bias()], progress=False)
    assert fitted.measured_on == "4 batches of the calibration data, which the algorithms fit"
    split = tq.optimize(_prepared(many), many, [_bias()], progress=False)
    assert split.measured_on == "2 batches of the calibration data, not shown to the algorithms"
    apart = tq.optimize(_prepared(few), few, [_bias()], validation=(b for b in other), progress=False)
    assert apart.measured_on == "2 batches held out from calibration, not shown to the algorithms"
    assert f"measured on {apart.measured_on}" in str(apart)
    assert _measured_on(few, validation=few) == "4 batches of the calibration data, which the algorithms fit"
    partly = _measured_on(few, validation=[*other, few[1]])
    assert partly == "3 batches, 1 of them calibrated on, 1 of which the algorithms fit"


def _measured_on(batches: list, **data) -> str:
    return tq.optimize(_prepared(batches), batches, [_bias()], progress=False, **data).measured_on


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_figures_on_validation_are_those_of_the_graph_there() -> None:
    batches, other = _batches(4), _batches(3, seed=5)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    prepared = _prepared(batches, model)
    result = tq.optimize(prepared, batches, [_bias()], validation=other, progress=False)
    kept = [db for _, db, is_kept in result.steps if is_kept][-1]
    assert kept == pytest.approx(tq.compare(model, tq.convert(prepared), other).sqnr_db, abs=0.05)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_what_is_held_out_is_not_solved_on() -> None:
    batches = _batches(16)
    seen: list[int] = []

    class Counting(tq.BiasCorrection):
        def solve(self, task, clock):
            seen.append(task.count)
            return super().solve(task, clock)

    tq.optimize(_prepared(batches), batches, [Counting()], progress=False)
    assert set(seen) == {14}
    seen.clear()
    tq.optimize(_prepared(batches), batches, [Counting()], validation=_batches(1, seed=5), progress=False)
    assert set(seen) == {16}


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_a_graph_calibrated_by_hand_says_that_it_does_not_know() -> None:
    batches = _batches(2)
    prepared = tq.prepare(tq.export(nn.Linear(16, 4), batches[0]), X86Quantizer("static_int8"))
    for batch in batches:
        prepared(*batch)
    assert "is not known" in tq.optimize(prepared, batches, [_bias()], progress=False).measured_on


@pytest.mark.parametrize(
    ("algorithms", "message"), [(tq.Rotate(), r"not a single Rotate: write \[Rotate\(\)\]"), ("gptq", "single str")]
)
def test_algorithms_are_a_list(algorithms, message: str) -> None:
    batches = _batches(2)
    with pytest.raises(tq.InputError, match=message):
        tq.optimize(_prepared(batches), batches, algorithms, progress=False)


def test_empty_and_single_validation_is_refused() -> None:
    batches = _batches(2)
    for validation in ([], iter(())):
        with pytest.raises(tq.TorchquantError, match=r"no calibration batch|no batch"):
            tq.optimize(_prepared(batches), batches, [_bias()], validation=validation, progress=False)
    with pytest.raises(tq.InputError, match="wrap it"):
        tq.quantize(
            nn.Linear(16, 4), batches[0], batches, quantizer=X86Quantizer(), validation=batches[0][0], progress=False
        )


@pytest.mark.parametrize("options", [{"metric": lambda model: 1}, {"validation": [torch.randn(2, 16)]}])
def test_what_judges_algorithms_needs_some(options) -> None:
    batches = _batches(2)
    with pytest.raises(tq.InputError, match="algorithms is empty"):
        tq.quantize(
            nn.Linear(16, 4), batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False, **options
        )


def _bias():
    return tq.BiasCorrection()


def _copy(prepared):
    from torchquant.fx.passes import copy_graph

    return copy_graph(prepared)


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
def test_a_metric_may_ask_any_model_for_its_device_and_mode(exported) -> None:
    batches = [{"x": torch.randn(2, 8), "scale": torch.randn(2, 1)} for _ in range(2)]
    quantized = tq.quantize(exported, batches[0], batches, quantizer=X86Quantizer(), progress=False)

    def metric(model):
        model.eval()
        device = next(model.parameters()).device
        model.to(device)
        return float(model(**{name: value.to(device) for name, value in batches[0].items()}).mean())

    for model in (exported, quantized):
        assert math.isfinite(scored(metric, model, "the model"))


def test_a_metric_may_ask_for_the_device(exported) -> None:
    """As of a model of transformers."""
    assert scored(lambda model: model.device == torch.device("cpu"), exported, "the model") == 1.0
    assert scored(lambda model: model.device.type == "cpu", tq.export(nn.ReLU(), torch.randn(2)), "the model") == 1.0


def test_a_metric_may_treat_a_program_like_a_model() -> None:
    """As the commands give it one: with `eval`, parameters and a device."""
    x = torch.randn(2, 8)
    quantized = tq.quantize(nn.Linear(8, 4), x, [x], quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, x, progress=False)

    def metric(model):
        model.eval()
        device = next(model.parameters()).device
        assert device == model.device
        return model(input=x.to(device)).shape[-1]

    assert scored(metric, program, "the program") == 4
