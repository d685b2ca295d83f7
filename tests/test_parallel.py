"""Two processes, each with half of the batches, end where one with all of them ends."""

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
from torchquant.fx.sites import observers
from torchquant.ranges import ActivationEntropy, ActivationMSE, ActivationPercentile
from torchquant.solved import SolvedWeight

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
    model, found = Net().eval(), {}
    for name, observer in {"minmax": None, "entropy": ActivationEntropy, **OBSERVERS}.items():
        prepared = calibrated(model, batches, quantizer(observer))
        found[f"state {name}"] = {
            f"{node.target}.{key}": value.clone()
            for node, module in observers(prepared)
            for key, value in module.state_dict().items()
        }
        found[f"scale {name}"] = torch.cat([o.calculate_qparams()[0].reshape(-1) for _, o in observers(prepared)])
    tq.calibrate(prepared, batches, progress=False)  # what was seen before counts once
    found["state twice"] = {k: v.clone() for k, v in prepared.state_dict().items() if k.endswith("counts")}
    for name, algorithms in ALGORITHMS.items():
        prepared = calibrated(model, batches, quantizer())
        result = tq.optimize(prepared, batches, algorithms(), checkpoint=folder and folder / name, progress=False)
        codes = {str(n.target): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}
        found[name] = codes, result.steps, [(s.span, s.before, s.after) for s in result.spans]
        again = calibrated(model, batches, quantizer())
        tq.optimize(again, batches, algorithms(), checkpoint=folder and folder / name, progress=False)
        found[f"{name} resumed"] = {str(n.target): o.codes for n, o in observers(again) if isinstance(o, SolvedWeight)}
    return found


def refusals(batches):
    """The messages of what cannot be shared among processes."""
    with pytest.raises(tq.CalibrationError) as moving:
        calibrated(Net().eval(), batches, quantizer(MovingAverageMinMaxObserver))
    return str(moving.value)


def in_time(batches):
    """What comes of a budget that does not last: codes, steps, notes, seconds."""
    torch.manual_seed(0)
    prepared = calibrated(Net().eval(), batches, quantizer())
    result = tq.optimize(prepared, batches, [BRECQ(10**7)], budget_s=2 + 5 * dist.get_rank(), progress=False)
    codes = {str(n.target): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}
    return codes, result.steps, result.notes, result.seconds


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = data()[4 * rank : 4 * rank + 4]
    found = outcome(batches, folder)
    found["refusals"], found["in time"] = refusals(batches), in_time(batches)
    torch.save(found, folder / f"{rank}.pt")
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
    for found in runs[:2]:
        assert found[f"state {name}"].keys() == runs[2][f"state {name}"].keys()
        for key, value in runs[2][f"state {name}"].items():
            assert torch.equal(found[f"state {name}"][key], value), key
        assert torch.equal(found[f"scale {name}"], runs[2][f"scale {name}"])


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
    assert seconds < 7
