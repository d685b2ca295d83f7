"""Processes that share the batches, evenly or not, end where one with all of them ends, or all with one error."""

import importlib
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foreign import SpecQuantizer, calibrated, per_channel, per_tensor
from torch import nn
from torchao.quantization.pt2e.observer import HistogramObserver, MovingAverageMinMaxObserver

import torchquant as tq
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.brecq import BRECQ
from torchquant.fx.reading import observers
from torchquant.observers.ranges import ActivationEntropy, ActivationMSE, ActivationPercentile
from torchquant.solving.solved import SolvedWeight

OBSERVERS = {"histogram": HistogramObserver, "mse": ActivationMSE, "percentile": ActivationPercentile}
ALGORITHMS = {
    "adaround": lambda: [AdaRound(100), tq.BiasCorrection()],
    "brecq": lambda: [BRECQ(30)],
}


class Net(nn.Module):
    """Two convs and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def quantizer(observer=None):
    options = {} if observer is None else {"observer": observer}
    return SpecQuantizer(("conv2d", "linear"), per_tensor(torch.uint8, 0, 255, **options), per_channel(low=-7, high=7))


def data():
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([1, 2, 1, 1, 3, 1, 1, 4])
    return [torch.randn(4, 3, 8, 8, generator=generator) * scale for scale in scales]


def outcome(batches, folder=None):
    """Everything that the tests compare, from this process."""
    torch.manual_seed(0)
    model, values = Net().eval(), {}
    for name, observer in {"minmax": None, "entropy": ActivationEntropy, **OBSERVERS}.items():
        prepared = calibrated(model, batches, quantizer(observer))
        values[f"state {name}"] = {
            f"{node.target}.{key}": value.clone()
            for node, module in observers(prepared)
            for key, value in module.state_dict().items()
        }
        values[f"scale {name}"] = torch.cat([o.calculate_qparams()[0].reshape(-1) for _, o in observers(prepared)])
    tq.calibrate(prepared, batches, progress=False)  # what was seen before counts once
    values["state twice"] = {k: v.clone() for k, v in prepared.state_dict().items() if k.endswith("counts")}
    for name, algorithms in ALGORITHMS.items():
        prepared = calibrated(model, batches, quantizer())
        result = tq.optimize(prepared, batches, algorithms(), checkpoint=folder and folder / name, progress=False)
        codes = {str(n.target): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}
        values[name] = codes, result.steps, [(s.span, s.before, s.after) for s in result.spans]
        again = calibrated(model, batches, quantizer())
        tq.optimize(again, batches, algorithms(), checkpoint=folder and folder / name, progress=False)
        values[f"{name} resumed"] = {str(n.target): o.codes for n, o in observers(again) if isinstance(o, SolvedWeight)}
    return values


def refusals(batches):
    """The messages of what cannot be shared among processes."""
    with pytest.raises(tq.CalibrationError) as moving:
        calibrated(Net().eval(), batches, quantizer(MovingAverageMinMaxObserver))
    return str(moving.value)


def in_time(batches):
    """What comes of a budget that does not last: codes, steps, notes, seconds."""
    torch.manual_seed(0)
    prepared = calibrated(Net().eval(), batches, quantizer())
    result = tq.optimize(prepared, batches, [BRECQ(10**7)], budget_s=1 + 5 * dist.get_rank(), progress=False)
    codes = {str(n.target): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}
    return codes, result.steps, result.notes, result.seconds


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = data()[4 * rank : 4 * rank + 4]
    outcomes = outcome(batches, folder)
    outcomes["refusals"], outcomes["in time"] = refusals(batches), in_time(batches)
    torch.save(outcomes, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The outcomes of both processes, and of one with all the data."""
    folder = tmp_path_factory.mktemp("parallel")
    mp.spawn(work, (folder,), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return *both, outcome(data())


@pytest.mark.parametrize("name", ["minmax", "entropy", "mse", "percentile"])
def test_observers_end_exactly_as_in_one_process(runs, name):
    for run in runs[:2]:
        assert run[f"state {name}"].keys() == runs[2][f"state {name}"].keys()
        for key, value in runs[2][f"state {name}"].items():
            assert torch.equal(run[f"state {name}"][key], value), key
        assert torch.equal(run[f"scale {name}"], runs[2][f"scale {name}"])


def test_torchaos_histograms_are_the_same_everywhere_and_close_to_those_of_one_process(runs):
    one, other, single = (run["scale histogram"] for run in runs)
    assert torch.equal(one, other)
    assert torch.allclose(one, single, rtol=0.05)
    for key, value in runs[2]["state histogram"].items():
        assert torch.equal(runs[0]["state histogram"][key], runs[1]["state histogram"][key])
        if "histogram" in key:
            assert runs[0]["state histogram"][key].sum() == pytest.approx(float(value.sum()), rel=1e-4)


def test_a_second_calibration_counts_earlier_batches_once(runs):
    assert runs[2]["state twice"]
    for key, value in runs[2]["state twice"].items():
        assert torch.equal(runs[0]["state twice"][key], value)
        assert torch.equal(runs[1]["state twice"][key], value)


def differing(one, other):
    """The share of codes that differ."""
    assert one.keys() == other.keys()
    pairs = [(one[name], other[name]) for name in one]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_processes_choose_the_same_codes(runs, name):
    (one, *rest), (other, *same) = runs[0][name], runs[1][name]
    assert len(one) == 3
    assert differing(one, other) == 0
    assert rest == same


def test_the_codes_are_those_of_one_process_but_for_the_order_of_summation(runs):
    assert differing(runs[0]["adaround"][0], runs[2]["adaround"][0]) < 0.01
    for (_, db, kept), (_, alone, also) in zip(runs[0]["adaround"][1], runs[2]["adaround"][1], strict=True):
        assert db == pytest.approx(alone, abs=0.1)
        assert kept == also


def test_learned_blocks_improve_the_output_in_two_processes_as_in_one(runs):
    for run in runs:
        (_, before, _), (_, after, kept) = run["brecq"][1]
        assert kept
        assert after > before


@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_processes_resume_from_their_checkpoints(runs, name):
    for run in runs[:2]:
        assert differing(run[f"{name} resumed"], run[name][0]) == 0


def test_what_processes_cannot_share_is_refused_in_each(runs):
    for run in runs[:2]:
        assert "MovingAverageMinMaxObserver" in run["refusals"]


def test_a_budget_ends_all_processes_with_the_first(runs):
    (one, *rest, seconds), (other, *same, _) = (run["in time"] for run in runs[:2])
    assert differing(one, other) == 0
    assert rest == same
    assert seconds < 6


# every algorithm, any share of the batches, any error -----------------------------------------------------------------

EVERY = {
    "AdaQuant": lambda: [tq.AdaQuant(10)],
    "AdaRound": lambda: [AdaRound(20)],
    "AdaRound, sensitive": lambda: [AdaRound(20, sensitive=True)],
    "BRECQ": lambda: [BRECQ(5, rounds=2)],
    "BatchNormReestimation": lambda: [tq.BatchNormReestimation()],
    "BiasCorrection": lambda: [tq.BiasCorrection()],
    "CrossLayerEqualization": lambda: [tq.CrossLayerEqualization()],
    "QDrop": lambda: [tq.QDrop(5, rounds=2)],
    "RangeSearch": lambda: [tq.RangeSearch()],
    "Rotate": lambda: [tq.Rotate()],
    "SeqMSE": lambda: [tq.SeqMSE()],
    "AWQ": lambda: [tq.AWQ()],
    "AutoRound": lambda: [tq.AutoRound(5)],
    "GPTQ": lambda: [tq.GPTQ()],
    "HQQ": lambda: [tq.HQQ()],
    "LLMInt8": lambda: [tq.LLMInt8()],
    "SmoothQuant": lambda: [tq.SmoothQuant()],
    "SmoothQuant, then AdaRound": lambda: [tq.SmoothQuant(), AdaRound(20)],
}
QUICK = [name for name in EVERY if "," not in name]
SHARES = {2: {"even": (4, 4), "uneven": (1, 7), "empty": (8, 0)}, 3: {"uneven": (1, 5, 2), "empty": (5, 0, 3)}}
STEPS = ("batches", "spans", "begin", "solve", "error", "transform")


class Residual(nn.Module):
    """A convolution, and linears around quantized additions, with outliers in some channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.first.weight[3] *= 20
            self.norm.weight[5] *= 30

    def forward(self, x):
        x = self.second(self.first(x).relu()).mean((2, 3))
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(self.norm(x))


def residual(batches):
    torch.manual_seed(0)
    exported = tq.export(Residual().eval(), data()[0])
    kinds, activation = ("conv2d", "linear", "add"), per_tensor(torch.uint8, 0, 255)
    prepared = tq.prepare(exported, SpecQuantizer(kinds, activation, per_channel(low=-7, high=7)))
    tq.calibrate(prepared, batches, progress=False)
    return prepared


def optimized(batches, algorithms):
    """The prepared graph's every tensor after algorithms, and the dB of each step."""
    prepared = residual(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tq.TorchquantWarning)  # a step that is not kept is no matter here
        result = tq.optimize(prepared, batches, algorithms, progress=False)
    held = dict(prepared.state_dict())
    held.update({f"{n.target}.grid": o.grid.scale for n, o in observers(prepared) if isinstance(o, SolvedWeight)})
    return held, result.steps


class Failing:
    """An algorithm that fails in the last process at one step."""

    def __init__(self, algorithm, step):
        self._algorithm, self._step, self.error = algorithm, step, lambda task: self._at("error") or task.error()

    def _at(self, step):
        if step == self._step and dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError(f"out of luck at {step}")

    def spans(self, prepared, excluded):
        self._at("spans")
        return self._algorithm.spans(prepared, excluded)

    def begin(self, stream, spans, seed):
        stream.sensitivities(spans, seed)
        self._at("begin")

    def solve(self, task, clock):
        solution = self._algorithm.solve(task, clock)
        self._at("solve")
        return solution


class FailingTransform:
    """Likewise, while it rewrites the graph."""

    def transform(self, prepared, batches):
        changed = tq.SmoothQuant().transform(prepared, batches)
        Failing(None, "transform")._at("transform")
        return changed


class OfItsOwn(tq.BiasCorrection):
    """What an algorithm does that sums nothing over the processes."""

    def solve(self, task, clock):
        solution = super().solve(task, clock)
        solution.biases = {name: bias + 1e-6 * dist.get_rank() for name, bias in solution.biases.items()}
        return solution


def failure(run):
    """Type and message of what a call raises, and how long it took to."""
    start = time.perf_counter()
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "nothing", "", time.perf_counter() - start


def failures(batches):
    """What comes of an error in the last process, by the step it happens at."""
    last = dist.get_rank() == dist.get_world_size() - 1
    prepared, raised = residual(batches), {}
    for step in STEPS:
        algorithm = FailingTransform() if step == "transform" else Failing(AdaRound(5), step)
        bad = [torch.zeros(1, 7)] if step == "batches" and last else batches
        before = {k: v.clone() for k, v in prepared.state_dict().items()}
        raised[step] = failure(lambda a=algorithm, b=bad: tq.optimize(prepared, b, [a], progress=False))
        raised[f"{step} unchanged"] = all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
    broken = [torch.full((4, 3, 8, 8), torch.nan)] if last else batches
    raised["calibrate"] = failure(lambda: tq.calibrate(prepared, broken, progress=False))
    quantizer_of = (lambda: 5) if last else quantizer
    raised["quantize"] = failure(
        lambda: tq.quantize(Net().eval(), data()[0], batches, quantizer=quantizer_of(), progress=False)
    )
    uncalibrated = tq.prepare(tq.export(Net().eval(), data()[0]), quantizer()) if last else prepared
    raised["uncalibrated"] = failure(lambda: tq.optimize(uncalibrated, batches, [AdaRound(5)], progress=False))
    prepared = residual(batches)
    other = [tq.BiasCorrection()] if last else [AdaRound(5)]
    raised["other algorithms"] = failure(lambda: tq.optimize(prepared, batches, other, progress=False))
    own = residual(batches)
    raised["own sums"] = failure(lambda: tq.optimize(own, batches, [OfItsOwn()], progress=False))
    return raised


class Dying(AdaRound):
    """The last process is gone in the middle."""

    def solve(self, task, clock):
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(0)
        return super().solve(task, clock)


def work_on_shares(rank, folder, world, names, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    outcomes = {}
    for kind in shares:
        counts = SHARES[world][kind]
        first = sum(counts[:rank])
        batches = data()[first : first + counts[rank]]
        for name in names:
            outcomes[name, kind] = optimized(batches, EVERY[name]())
    batches = data()[rank::world]
    outcomes["failures"] = failures(batches)
    prepared = residual(batches)
    torch.save(outcomes, folder / f"{rank}.pt")
    outcomes["death"] = failure(lambda: tq.optimize(prepared, batches, [Dying(5)], progress=False))
    torch.save(outcomes, folder / f"{rank}.pt")


def on_shares(folder, world, names, shares):
    mp.spawn(work_on_shares, (folder, world, names, shares), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three processes, one of them without a batch."""
    return on_shares(tmp_path_factory.mktemp("three"), 3, QUICK, ["empty"])


def check_alike(runs, name, kind):
    held, steps = runs[0][name, kind]
    for other, same in (run[name, kind] for run in runs[1:]):
        assert other.keys() == held.keys()
        assert [k for k in held if not torch.equal(other[k], held[k])] == []
        assert same == steps


def check_failures(runs):
    *others, last = [run["failures"] for run in runs]
    typed = {"batches": "InputError", "quantize": "InputError", "calibrate": "CalibrationError"}
    typed["uncalibrated"] = "CalibrationError"
    for step in (*STEPS, *list(typed)[1:]):
        kind, message, _ = last[step]
        assert kind == typed.get(step, "ValueError"), step
        for raised in others:
            assert raised[step][0] == "ParallelError", step
            assert f"process {len(runs) - 1} of {len(runs)} failed with {kind}: {message[:50]}" in raised[step][1]
            assert raised[step][2] < 10
    for raised in (*others, last):
        assert all(raised[f"{step} unchanged"] for step in STEPS)
        assert raised["other algorithms"][:1] == ("ParallelError",)
        assert "do not agree on what `optimize` is to do" in raised["other algorithms"][1]
        assert raised["own sums"][:1] == ("ParallelError",)
        assert "do not agree on what the algorithms made of the graph" in raised["own sums"][1]
    for run in runs[:-1]:
        kind, message, seconds = run["death"]
        assert (kind, seconds < 10) == ("ParallelError", True)
        assert "another process has ended" in message


def test_every_algorithm_is_here():
    folder = Path(tq.__file__).parent / "algorithms"
    modules = [importlib.import_module(f"torchquant.algorithms.{file.stem}") for file in folder.glob("[a-z]*.py")]
    kinds = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    names = {
        k.__name__ for k in kinds if callable(getattr(k, "transform", None)) or callable(getattr(k, "spans", None))
    }
    assert names - {"Solver", "Transform", "Layerwise", "RowRounding"} == {name.partition(",")[0] for name in EVERY}


@pytest.mark.parametrize("name", QUICK)
def test_processes_end_with_one_network_though_one_has_no_batch(three, name):
    check_alike(three, name, "empty")


def test_processes_end_near_where_one_with_all_the_data_does(three):
    alone_steps = optimized(data(), EVERY["SmoothQuant"]())[1]
    for (_, db, _), (_, alone, _) in zip(three[0]["SmoothQuant", "empty"][1], alone_steps, strict=True):
        assert db == pytest.approx(alone, abs=0.5)


def test_an_error_in_one_process_ends_all_within_seconds(three):
    check_failures(three)


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARES)
def test_all_shares_and_errors_among_two_and_three_processes(tmp_path, world):
    runs = on_shares(tmp_path, world, list(EVERY), list(SHARES[world]))
    for name in EVERY:
        for kind in SHARES[world]:
            check_alike(runs, name, kind)
    check_failures(runs)
