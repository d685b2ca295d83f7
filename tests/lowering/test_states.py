"""Models that keep state in buffers: calibrated without changing them, and programs whose state is explicit."""

import copy
import threading

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.backends import inductor_cuda, inductor_x86
from torchquant.quantizers import CudaQuantizer, X86Quantizer, XnnpackQuantizer


class Filter(nn.Module):
    """A leaky sum, a ring buffer written by slices, and a count."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("level", torch.full((1, 16), 0.5))
        self.register_buffer("ring", torch.zeros(3, 16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.level.copy_(0.9 * self.level + self.inside(x))
        self.ring[1:] = self.ring[:-1].clone()
        self.ring[0] = self.level[0]
        self.count += 1
        return self.out(self.ring.mean(0, keepdim=True).tanh() + self.level.tanh()), self.count


def steps(n):
    return [torch.randn(1, 8) + 1 for _ in range(n)]


def over(run, inputs):
    with torch.no_grad():
        return torch.cat([run(x)[0].clone() for x in inputs])


def prepared_for(model, quantizer, through=tq.export):
    return prepare_pt2e(through(model, (steps(1)[0],)), quantizer)


def of_torch(model, inputs):
    return torch.export.export(model, inputs).module()


@pytest.mark.parametrize("through", [tq.export, of_torch])
@pytest.mark.parametrize("quantizer", [X86Quantizer, XnnpackQuantizer])
def test_calibration_and_optimization_leave_the_users_model_and_the_graph_as_they_were(quantizer, through):
    model, batches = Filter().eval(), steps(6)
    before = copy.deepcopy(model.state_dict())
    prepared = prepared_for(model, quantizer(), through)
    tq.calibrate(prepared, [tq.Steps(batches), *batches], progress=False)
    tq.optimize(prepared, [tq.Steps(batches)], [tq.AdaRound(), tq.BiasCorrection()], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quantized, unseen = convert_pt2e(prepared), steps(10)
    wanted = over(copy.deepcopy(model), unseen)  # the graph may share the model's buffers
    assert tq.sqnr_db(wanted, over(quantized, unseen)) > 20


def test_steps_see_the_range_of_the_state_and_single_batches_only_the_first():
    ranges = []
    for batches in ([tq.Steps(steps(12))], steps(12)):
        prepared = prepared_for(Filter().eval(), X86Quantizer())
        tq.calibrate(prepared, batches, progress=False)
        ranges.append(
            [float(m.max_val) for n, m in prepared.named_modules() if hasattr(m, "max_val") and m.max_val.numel() == 1]
        )
    assert max(a - b for a, b in zip(*ranges, strict=True)) > 0.05


@pytest.fixture(scope="module")
def lowered():
    torch.manual_seed(0)
    model = Filter().eval()
    prepared = prepared_for(model, X86Quantizer())
    tq.calibrate(prepared, [tq.Steps(steps(16))], progress=False)
    return copy.deepcopy(model), inductor_x86.lower(convert_pt2e(prepared), (steps(1)[0],), tune=False)


def test_a_program_carries_its_state_from_the_initial_one_and_can_go_back(lowered, tmp_path):
    model, program = lowered
    unseen = steps(12)
    wanted = over(copy.deepcopy(model), unseen)
    for run in (program, inductor_x86.load(program.save(tmp_path / "filter.pt2"))):
        run.reset()
        first = over(run, unseen)
        assert tq.sqnr_db(wanted, first) > 20
        assert int(run.state["count"]) == 12
        run.reset()
        assert torch.equal(run.state["level"], torch.full((1, 16), 0.5))
        assert torch.equal(over(run, unseen), first)


def test_two_streams_are_served_by_exchanging_the_state(lowered):
    _, program = lowered
    streams = [steps(6), steps(6)]
    program.reset()
    initial = program.state
    alone = []
    for stream in streams:
        program.reset()
        alone.append(over(program, stream))
    states, outputs = [initial, initial], [[], []]
    for pair in zip(*streams, strict=True):
        for i, x in enumerate(pair):
            program.state = states[i]
            outputs[i].append(program(x)[0])
            states[i] = program.state
    assert all(torch.equal(torch.cat(f), a) for f, a in zip(outputs, alone, strict=True))


def test_threads_do_not_share_the_state(lowered):
    _, program = lowered
    program.reset()
    inputs, results = steps(20), {}
    wanted = over(program, inputs)

    def work(name):
        results[name] = over(program, inputs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], wanted) for i in range(4))


def test_what_a_caller_does_to_the_outputs_does_not_reach_the_state(lowered):
    _, program = lowered
    program.reset()
    _, count = program(steps(1)[0])
    count.fill_(99)
    assert int(program.state["count"]) == 1


@pytest.mark.parametrize("wrong", [{}, {"level": torch.zeros(1, 16)}, {"level": torch.zeros(2), "ring": 0, "count": 0}])
def test_a_state_of_another_form_is_refused(lowered, wrong):
    with pytest.raises(tq.InputError):
        lowered[1].state = wrong


def test_a_model_that_writes_into_its_input_does_so_when_lowered_and_not_in_calibration():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, cache):
            cache[:, 1:] = cache[:, :-1].clone()
            cache[:, 0] = self.inner(x)
            return self.inner(cache.mean(1))

    model, batches = Cache().eval(), [(torch.randn(2, 8), torch.randn(2, 4, 8)) for _ in range(4)]
    kept = copy.deepcopy(batches)
    quantized = tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), progress=False)
    assert all(torch.equal(a, b) for x, y in zip(batches, kept, strict=True) for a, b in zip(x, y, strict=True))
    program = inductor_x86.lower(quantized, batches[0], tune=False)
    x, cache = batches[1]
    mine, other = cache.clone(), cache.clone()
    assert tq.sqnr_db(model(x, mine), program(x, other)) > 20
    assert tq.sqnr_db(mine, other) > 20
    assert not torch.equal(cache, other)


def test_a_program_for_gpus_carries_its_state_too(tmp_path):
    model = Filter().eval()
    prepared = prepared_for(model, CudaQuantizer("w8a16"))
    unseen = steps(6)
    wanted = over(copy.deepcopy(model), unseen)
    program = inductor_cuda.lower(convert_pt2e(prepared), (steps(1)[0],), device="cpu")
    assert int(program.state["count"]) == 0  # proving does not advance it
    assert tq.sqnr_db(wanted, over(program, unseen)) > 20
    loaded = inductor_cuda.load(program.save(tmp_path / "filter.pt2"), device="cpu")
    assert tq.sqnr_db(wanted, over(loaded, unseen)) > 20
    assert int(loaded.state["count"]) == 6


class ReadBeforeWritten(nn.Module):
    """Its layer reads the cache before the new values go in."""

    def __init__(self):
        super().__init__()
        self.read, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("cache", torch.randn(4, 8))

    def forward(self, x):
        y = self.read(self.cache)
        self.cache.mul_(0.5).add_(self.key(x))
        return y


@pytest.mark.parametrize("algorithm", [tq.RangeSearch, tq.BRECQ, tq.AdaRound], ids=lambda a: a.__name__)
def test_state_that_is_read_before_it_is_written_is_solved_and_lowered(algorithm):
    model, batches = ReadBeforeWritten().eval(), [torch.randn(4, 8) for _ in range(4)]
    prepared = prepare_pt2e(tq.export(model, (batches[0],)), X86Quantizer())
    tq.calibrate(prepared, [tq.Steps(batches)], progress=False)
    tq.optimize(prepared, [tq.Steps(batches)], [algorithm()], progress=False)
    quantized = convert_pt2e(prepared)
    with torch.no_grad():
        wanted = [model(x).clone() for x in batches]
        assert all(tq.sqnr_db(a, quantized(x)) > 20 for a, x in zip(wanted, batches, strict=True))


def test_a_foreign_quantizers_graph_that_would_lose_its_state_is_refused():
    graph = of_torch(ReadBeforeWritten().eval(), (torch.randn(4, 8),))
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    with pytest.raises(tq.ExportError, match=r"cache.*torchquant\.export"):
        tq.calibrate(prepared, [torch.randn(4, 8)], progress=False)


def test_a_second_name_for_memory_that_is_written_is_refused():
    class Tied(ReadBeforeWritten):
        def __init__(self):
            super().__init__()
            self.register_buffer("part", self.cache[:2])

        def forward(self, x):
            return super().forward(x) + self.part.sum()

    with pytest.raises(tq.ExportError, match=r"cache and part|part and cache"):
        tq.export(Tied(), torch.randn(4, 8))


def test_running_statistics_that_an_op_hides_are_refused():
    class Hidden(ReadBeforeWritten):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return nn.functional.batch_norm(self.read(x), self.norm.running_mean, self.norm.running_var, training=True)

    with pytest.raises(tq.ExportError, match="running"):
        tq.export(Hidden(), torch.randn(4, 8))


def test_a_saved_graph_keeps_its_state_and_runs_outside_no_grad(tmp_path):
    model, batches = ReadBeforeWritten().eval(), [torch.randn(4, 8) for _ in range(3)]
    quantized = tq.quantize(model, batches[0], batches, quantizer=X86Quantizer(), algorithms=(), progress=False)
    quantized(batches[0])  # its state is part of autograd now
    tq.save(quantized, tmp_path / "graph.pt2")
    loaded = tq.load(tmp_path / "graph.pt2")
    assert torch.equal(quantized(batches[1]), loaded(batches[1]))


class Rows(nn.Module):
    """Writes rows of one buffer and replaces another one; gives the first as it is then, too."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("rows", torch.zeros(4, 8))
        self.register_buffer("last", torch.zeros(1, 8))

    def forward(self, x, place):
        before = self.rows.sum(0, keepdim=True) + self.last
        self.rows.index_copy_(0, place, self.project(x))
        self.last.copy_(x)
        return self.project(before + x), self.rows


def test_rows_that_are_written_in_place_are_neither_read_early_nor_seen_in_earlier_outputs():
    torch.manual_seed(0)
    inputs = [(torch.randn(1, 8), torch.tensor([i])) for i in (0, 2, 2, 3)]
    options = {"quantizer": X86Quantizer(), "algorithms": (), "progress": False}
    quantized = tq.quantize(Rows().eval(), inputs[0], [tq.Steps(inputs)], **options)
    program = inductor_x86.lower(quantized, inputs[0], progress=False)
    assert program._about.in_place == ("rows",)
    rows = program._state.values["rows"]
    kept = []
    for x, place in inputs:
        wanted, got = quantized(x, place), program(x, place)
        assert tq.sqnr_db(wanted[0], got[0]) > 60
        kept.append((wanted[1].detach().clone(), got[1]))
    assert program._state.values["rows"] is rows
    for wanted, got in kept:
        assert torch.allclose(wanted, got, atol=1e-5)
    program.state = {"rows": torch.ones(8, 4).t(), "last": torch.zeros(1, 8)}  # not contiguous
    quantized.rows.fill_(1.0)
    quantized.last.zero_()
    assert tq.sqnr_db(quantized(*inputs[0])[0], program(*inputs[0])[0]) > 60
