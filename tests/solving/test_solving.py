"""optimize: answers are guarded, timed, kept on disk; what is refused, and what the result says."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import nets
import pytest
import torch
from foreign import PlaceholderObserver, SpecQuantizer, calibrated, dynamic, per_channel, per_tensor
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import torchquant as tq
from torchquant.algorithms.adaround import AdaRound
from torchquant.algorithms.brecq import BRECQ
from torchquant.algorithms.layers.layerwise import float_weight
from torchquant.algorithms.seq_mse import SeqMSE
from torchquant.calibration import batches as data
from torchquant.calibration.stream import Stream
from torchquant.fx import ops
from torchquant.fx.blocks import layers, weight_grid
from torchquant.fx.reading import observers
from torchquant.quantizers import WeightOnlyQuantizer
from torchquant.solving import checkpoints, judging
from torchquant.solving.results import SpanResult
from torchquant.solving.solved import Solution, SolvedWeight

LINEAR = SpecQuantizer(("linear",), per_tensor(torch.uint8, 0, 255), per_channel(low=-3, high=3))


def chain(count=5):
    sizes = [8] * count + [4]
    return nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))


@pytest.fixture
def batches():
    return [torch.randn(16, 8) for _ in range(3)]


@pytest.fixture
def model():
    return chain()


def solved(prepared):
    """The codes that stand in the graph, by observer."""
    return {str(n.target): o.codes for n, o in observers(prepared) if isinstance(o, SolvedWeight)}


def assert_same_codes(one, other):
    assert solved(one).keys() == solved(other).keys()
    assert all(torch.equal(codes, solved(other)[name]) for name, codes in solved(one).items())


class Spoil:
    """Answers with random codes; `only` names the spans that it spoils, the others get the nearest ones."""

    def __init__(self, only=None):
        self.only = only

    def spans(self, prepared, excluded):
        return layers(prepared, excluded)

    def solve(self, task, clock):
        (site,) = task.span.sites
        weight, grid = float_weight(task.prepared, site), weight_grid(task.prepared, site)
        codes = grid.encode(weight)
        if self.only is None or ops.module_path(site) in self.only:
            codes = torch.randint(-3, 4, weight.shape, generator=clock.generator())
        return Solution({site.name: (codes, grid)})


class BehindTheBack(Spoil):
    """Spoils a range that no result of its span depends on, so that only the whole output tells."""

    def solve(self, task, clock):
        last = [str(n.target) for n, _ in observers(task.prepared) if not ops.is_constant(n.args[0])][-1]
        return Solution(activations={last: (1e-6, 0)}) if ops.module_path(task.span.sites[0]) == "0" else Solution()


def test_a_worse_answer_for_a_span_is_not_kept(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [Spoil(only=("2", "6"))], progress=False)
    assert [(s.span, s.kept) for s in result.spans] == [
        ("0", True),
        ("2", False),
        ("4", True),
        ("6", False),
        ("8", True),
    ]
    assert all(s.kept == (s.after <= s.before) for s in result.spans)
    assert len(solved(prepared)) == 3
    assert result.steps[-1][1] == pytest.approx(result.steps[0][1])


class Watching(Spoil):
    """Notes what reaches each span from the quantized prefix; with a measure of its own nothing is passed on."""

    def __init__(self, only=None):
        super().__init__(only)
        self.inputs = []

    def solve(self, task, clock):
        batches = range(task.count)
        self.inputs.append([v.clone() for b in batches for v in task.inputs(b, "quantized").values()])
        return super().solve(task, clock)


class Apart(Watching):
    def error(self, task):
        return task.error()


def test_what_follows_a_span_reads_what_the_guard_measured_or_what_it_put_back(model, batches):
    heard = []
    for kind in (Watching, Apart):
        prepared = calibrated(model, batches, LINEAR)
        watching = kind(only={"2", "6"})
        result = tq.optimize(prepared, batches, [watching], progress=False)
        assert {s.span for s in result.spans if not s.kept} == {"2", "6"}
        heard.append(watching.inputs)
    assert len(heard[0]) == 5
    for one, other in zip(*heard, strict=True):
        assert all(map(torch.equal, one, other))


def test_outputs_that_the_guard_computed_are_not_computed_again(model, batches, monkeypatch):
    runs, runs_of = [], Stream._run
    monkeypatch.setattr(Stream, "_run", lambda self, *where: runs.append(where[2]) or runs_of(self, *where))
    prepared = calibrated(model, batches, LINEAR)
    tq.optimize(prepared, batches, [Spoil(only={"2"})], progress=False)
    behind = runs.count("quantized") - runs.count("float")
    assert behind == 1 - 5  # of five spans, that one alone whose answer was taken back


@pytest.mark.parametrize(
    ("shapes", "dtype", "every"),
    [
        ([(1, 512)] * 8, torch.int64, 4),
        ([(1, 512)] * 3, torch.int64, 2),
        ([(1, 64)] * 8, torch.int64, 1),
        ([(16, 3)] * 8, torch.float32, 1),
        ([(16, 3)] * 32, torch.float32, 4),
        ([(16, 3)] * 17, torch.float32, 2),
        ([(4096, 3)], torch.float32, 1),
        ([()] * 4, torch.int64, 1),
    ],
)
def test_of_much_data_some_are_judged(shapes, dtype, every):
    given = [data.Given((torch.zeros(shape, dtype=dtype), None)) for shape in shapes]
    assert judging._judged_every(given) == every


def test_an_algorithm_that_lowers_the_whole_output_is_taken_back_with_a_warning(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    with pytest.warns(tq.TorchquantWarning, match="BehindTheBack would lower .* the plain result is kept"):
        result = tq.optimize(prepared, batches, [AdaRound(20), BehindTheBack()], progress=False)
    assert [(name, kept) for name, _, kept in result.steps] == [
        ("as calibrated", True),
        ("AdaRound", True),
        ("BehindTheBack", False),
    ]
    again = calibrated(model, batches, LINEAR)
    tq.optimize(again, batches, [AdaRound(20)], progress=False)
    assert_same_codes(prepared, again)
    assert torch.equal(tq.convert(prepared)(batches[0]), tq.convert(again)(batches[0]))


def test_steps_say_what_the_converted_model_gives(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [AdaRound(50), tq.BiasCorrection()], progress=False)
    kept = [db for _, db, kept in result.steps if kept]
    assert kept == sorted(kept)
    converted = tq.convert(prepared)
    outputs = [converted(b) for b in batches]
    noise = sum(float((f - model(b)).detach().square().sum()) for f, b in zip(outputs, batches, strict=True))
    signal = sum(float(model(b).detach().square().sum()) for b in batches)
    assert kept[-1] == pytest.approx(10 * torch.log10(torch.tensor(signal / noise)).item(), abs=0.01)


def test_the_result_records_what_was_done(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [AdaRound(10)], memory_bytes=1, progress=False)
    assert all(isinstance(span, SpanResult) for span in result.spans)
    assert [span.span for span in result.spans] == ["0", "2", "4", "6", "8"]
    assert {span.algorithm for span in result.spans} == {"AdaRound"}
    assert all(span.before > 0 and span.seconds > 0 for span in result.spans)
    assert result.seconds >= sum(span.seconds for span in result.spans)
    assert result.peak_bytes > 2**20
    assert result.spilled_bytes > 0
    assert [name for name, _, _ in result.steps] == ["as calibrated", "AdaRound"]
    text = str(result)
    assert "AdaRound" in text
    assert " dB" in text
    assert "5 spans in" in text
    assert tq.optimize(prepared, batches, [SeqMSE()], progress=False).spilled_bytes == 0


# interrupted ----------------------------------------------------------------------------------------------------------


class Interrupted(AdaRound):
    """AdaRound that is stopped in its third span, once."""

    stop: BaseException | None = None
    calls = 0

    def solve(self, task, clock):
        type(self).calls += 1
        if self.stop is not None and type(self).calls == 3:
            raise self.stop
        return super().solve(task, clock)


@pytest.fixture
def stopped(monkeypatch):
    def by(reason):
        monkeypatch.setattr(Interrupted, "stop", reason)
        monkeypatch.setattr(Interrupted, "calls", 0)
        return Interrupted(30)

    return by


@pytest.mark.parametrize("in_a_new_process", [True, False])
@pytest.mark.parametrize("reason", [RuntimeError("no power"), KeyboardInterrupt()])
def test_a_resumed_run_equals_an_unbroken_one(model, batches, tmp_path, stopped, reason, in_a_new_process):
    unbroken = calibrated(model, batches, LINEAR)
    whole = tq.optimize(unbroken, batches, [stopped(None), tq.BiasCorrection()], progress=False)
    prepared = calibrated(model, batches, LINEAR)
    with pytest.raises(type(reason)):
        tq.optimize(prepared, batches, [stopped(reason), tq.BiasCorrection()], checkpoint=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.pt"))) == 2
    if in_a_new_process:
        prepared = calibrated(model, batches, LINEAR)
    algorithms = [stopped(None), tq.BiasCorrection()]
    result = tq.optimize(prepared, batches, algorithms, checkpoint=tmp_path, progress=False)
    assert Interrupted.calls == 3
    assert_same_codes(prepared, unbroken)
    assert result.steps == whole.steps
    assert [(s.span, s.before, s.after, s.kept) for s in result.spans] == [
        (s.span, s.before, s.after, s.kept) for s in whole.spans
    ]
    assert torch.equal(tq.convert(prepared)(batches[0]), tq.convert(unbroken)(batches[0]))


def test_a_run_that_is_stopped_within_a_block_goes_on_behind_the_last_layer(model, batches, tmp_path, monkeypatch):
    """BRECQ's spans are whole blocks; what stops here is the process, after the n-th file."""
    algorithm = BRECQ(8, rounds=3, start=AdaRound(10), min_sites=2, max_sites=3)
    unbroken = calibrated(model, batches, LINEAR)
    whole = tq.optimize(unbroken, batches, [algorithm], progress=False)
    write, solve = checkpoints.write, AdaRound.solve
    written, solved_layers = [], []

    def counted(path, solution):
        write(path, solution)
        written.append(path.name)
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write", counted)
    monkeypatch.setattr("torchquant.solving.run.write", counted)
    monkeypatch.setattr(AdaRound, "solve", lambda *a: solved_layers.append(a) or solve(*a))
    for attempt in range(100):
        stop, prepared = attempt < 99, calibrated(model, batches, LINEAR)
        before = len(solved_layers)
        try:
            result = tq.optimize(prepared, batches, [algorithm], checkpoint=tmp_path, progress=False)
            break
        except KeyboardInterrupt:
            assert len(solved_layers) - before <= 1  # no layer is solved again
    sites = sum(len(span.sites) for span in algorithm.spans(calibrated(model, batches, LINEAR), frozenset()))
    assert attempt == len(written) > sites
    assert len(set(written)) == len(written)
    assert not list(tmp_path.glob("*.part.pt"))
    assert_same_codes(prepared, unbroken)
    assert result.steps == whole.steps


def test_a_finished_run_read_again_solves_nothing(model, batches, tmp_path, stopped):
    first, second = calibrated(model, batches, LINEAR), calibrated(model, batches, LINEAR)
    tq.optimize(first, batches, [stopped(None)], checkpoint=tmp_path, progress=False)
    tq.optimize(second, batches, [stopped(RuntimeError("not reached"))], checkpoint=tmp_path, progress=False)
    assert Interrupted.calls == 0
    assert_same_codes(first, second)


def test_an_interrupt_leaves_a_graph_with_what_was_solved(model, batches, stopped):
    whole, prepared = calibrated(model, batches, LINEAR), calibrated(model, batches, LINEAR)
    tq.optimize(whole, batches, [stopped(None)], progress=False)
    with pytest.raises(KeyboardInterrupt):
        tq.optimize(prepared, batches, [stopped(KeyboardInterrupt())], progress=False)
    assert len(solved(prepared)) == 2
    assert all(torch.equal(codes, solved(whole)[name]) for name, codes in solved(prepared).items())
    prepared.graph.lint()
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db > 10


def test_an_error_leaves_the_graph_as_it_came(model, batches, stopped):
    prepared = calibrated(model, batches, LINEAR)
    before = tq.compare(model, tq.convert(calibrated(model, batches, LINEAR)), batches).sqnr_db
    with pytest.raises(RuntimeError, match="no power"):
        tq.optimize(prepared, batches, [stopped(RuntimeError("no power"))], progress=False)
    assert not solved(prepared)
    assert tq.compare(model, tq.convert(prepared), batches).sqnr_db == before


def test_equal_settings_are_the_same_run_also_where_an_algorithm_holds_another(model, batches, tmp_path):
    for _ in range(2):
        prepared = calibrated(model, batches, LINEAR)
        algorithm = BRECQ(5, start=AdaRound(7))
        tq.optimize(prepared, batches, [algorithm], checkpoint=tmp_path, progress=False)
    with pytest.raises(tq.ArtifactError, match="another run"):
        tq.optimize(prepared, batches, [BRECQ(5, start=AdaRound(8))], checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("change", ["seed", "data", "model", "algorithm", "order", "exclude", "quantizer"])
def test_checkpoints_of_another_run_are_refused_with_their_folder(model, batches, tmp_path, change):
    arguments = {"algorithms": [SeqMSE(8), tq.BiasCorrection()], "seed": 0, "exclude": ()}
    tq.optimize(calibrated(model, batches, LINEAR), batches, **arguments, checkpoint=tmp_path, progress=False)
    calibration, quantizer = batches, LINEAR
    if change == "seed":
        arguments["seed"] = 1
    elif change == "data":
        calibration = [*batches[:2], batches[2] + 1]
    elif change == "model":
        model[0].weight.data[0, 0] += 1
    elif change == "algorithm":
        arguments["algorithms"] = [SeqMSE(9), tq.BiasCorrection()]
    elif change == "order":
        arguments["algorithms"] = arguments["algorithms"][::-1]
    elif change == "exclude":
        arguments["exclude"] = ("2",)
    else:
        quantizer = SpecQuantizer(("linear",), per_tensor(torch.uint8, 0, 255), per_channel(low=-7, high=7))
    prepared = calibrated(model, batches, quantizer)
    with pytest.raises(tq.ArtifactError, match=rf"{tmp_path.name} holds the checkpoints of another run"):
        tq.optimize(prepared, calibration, **arguments, checkpoint=tmp_path, progress=False)


def kept_run(model, batches, folder):
    tq.optimize(calibrated(model, batches, LINEAR), batches, [SeqMSE(8)], checkpoint=folder, progress=False)


def test_a_broken_checkpoint_is_refused_with_its_path(model, batches, tmp_path):
    kept_run(model, batches, tmp_path)
    first, file = sorted(tmp_path.glob("*.pt"))[:2]
    for content in (b"half of a file", b"", first.read_bytes(), file.read_bytes()[:-1], b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(tq.ArtifactError, match=rf"{file.name}.*delete it"):
            kept_run(model, batches, tmp_path)
    torch.save({"weights": {}, "biases": {}, "activations": {}}, file)
    with pytest.raises(tq.ArtifactError, match=file.name):
        kept_run(model, batches, tmp_path)


@pytest.mark.slow
def test_no_bit_of_a_checkpoint_may_change(model, batches, tmp_path):
    kept_run(model, batches, tmp_path)
    file = sorted(tmp_path.glob("*.pt"))[0]
    content = file.read_bytes()
    for position in range(0, len(content), len(content) // 40):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(tq.ArtifactError, match=file.name):
            kept_run(model, batches, tmp_path)


@pytest.mark.parametrize("change", ["codes", "range", "shape", "scale", "node", "bias", "target"])
def test_a_checkpoint_that_does_not_fit_its_weights_is_refused(model, batches, tmp_path, monkeypatch, change):
    def wrong(path, solution, write=checkpoints.write):
        ((name, (codes, grid)),) = solution.weights.items()
        if change == "codes":
            grid = replace(grid, dtype=torch.int32)
        elif change == "range":
            codes = torch.full_like(codes, -128)
        elif change == "shape":
            codes = codes[:1]
        elif change == "scale":
            grid = replace(grid, scale=grid.scale * torch.nan)
        biases = {name: torch.full((4,), torch.nan)} if change == "bias" else {}
        activations = {"elsewhere": (1.0, 0)} if change == "target" else {}
        write(path, Solution({"nowhere" if change == "node" else name: (codes, grid)}, biases, activations))

    with monkeypatch.context() as patch:
        patch.setattr("torchquant.solving.run.write", wrong)
        kept_run(model, batches, tmp_path)
    with pytest.raises(tq.ArtifactError, match=r"00-00000\.pt"):
        kept_run(model, batches, tmp_path)


def test_another_version_or_budget_is_another_run(model, batches, tmp_path, monkeypatch):
    kept_run(model, batches, tmp_path)
    prepared = calibrated(model, batches, LINEAR)
    with pytest.raises(tq.ArtifactError, match="another run"):
        tq.optimize(prepared, batches, [SeqMSE(8)], budget_s=1000, checkpoint=tmp_path, progress=False)
    monkeypatch.setattr("torchquant.solving.checkpoints.versions", lambda: {"torch": "9.9"})
    with pytest.raises(tq.ArtifactError, match="versions"):
        kept_run(model, batches, tmp_path)


def test_a_folder_that_cannot_hold_checkpoints_is_refused_with_its_name(model, batches, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(tq.ArtifactError, match="cannot be made a folder"):
            kept_run(model, batches, folder)
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "run.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(tq.ArtifactError, match="delete the folder"):
        kept_run(model, batches, tmp_path / "marked")
    (tmp_path / "nested" / "run.txt").mkdir(parents=True)
    with pytest.raises(tq.ArtifactError, match=r"run\.txt"):
        kept_run(model, batches, tmp_path / "nested")


# settings -------------------------------------------------------------------------------------------------------------


def test_what_is_not_solved_when_the_time_is_up_stays_and_a_note_says_so(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [AdaRound()], budget_s=1e-9, progress=False)
    assert result.notes == ["AdaRound: the time was up; 5 of 5 spans were left as they were"]
    assert "5 of 5" in str(result)
    assert not solved(prepared)


def test_the_time_is_kept(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [BRECQ(10**7)], budget_s=2, progress=False)
    assert 1 < result.seconds < 4
    assert result.spans


def test_the_seed_decides_all_that_is_drawn(model, batches):
    errors = []
    for seed in (0, 0, 1):
        prepared = calibrated(model, batches, LINEAR)
        torch.manual_seed(len(errors))  # the global generator plays no part
        result = tq.optimize(prepared, batches, [Spoil()], seed=seed, progress=False)
        errors.append([span.after for span in result.spans])
    assert errors[0] == errors[1]
    assert errors[0] != errors[2]
    assert len(set(errors[0])) == len(errors[0])


@pytest.mark.parametrize(("exclude", "left"), [(["2"], ["2"]), (["op:linear"], "02468"), (["0", "8"], ["0", "8"])])
def test_excluded_places_stay_as_they_are(model, batches, exclude, left):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [SeqMSE(8)], exclude=exclude, progress=False)
    assert [span.span for span in result.spans] == [name for name in "02468" if name not in left]
    assert len(solved(prepared)) == 5 - len(left)


def test_an_exclude_pattern_that_matches_nothing_is_refused(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    with pytest.raises(tq.PatternError, match="nowhere"):
        tq.optimize(prepared, batches, [SeqMSE(8)], exclude=["nowhere"], progress=False)


class Transformed:
    """A transform that changes nothing, or says that it did."""

    def __init__(self, changed=0):
        self.changed = changed

    def transform(self, prepared, batches):
        return self.changed


def test_a_transform_is_recalibrated_and_judged_as_a_step(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    result = tq.optimize(prepared, batches, [Transformed(), Transformed(1), SeqMSE(8)], progress=False)
    assert result.notes == ["Transformed: nothing to change"]
    assert [name for name, _, _ in result.steps] == ["as calibrated", "Transformed", "SeqMSE"]
    assert result.steps[0][1] == pytest.approx(result.steps[1][1])


@pytest.mark.parametrize(
    ("algorithms", "words"),
    [
        ([AdaRound], r"AdaRound is a class; pass an instance: AdaRound\(\)"),
        (["adaround"], "str is no algorithm"),
        ([SeqMSE(8), Transformed()], "Transformed changes float weights, so it must come before"),
    ],
)
def test_what_is_no_algorithm_or_in_the_wrong_place_is_refused(model, batches, algorithms, words):
    prepared = calibrated(model, batches, LINEAR)
    with pytest.raises(tq.InputError, match=words):
        tq.optimize(prepared, batches, algorithms, progress=False)
    assert not solved(prepared)


def test_a_transform_after_an_earlier_solver_is_refused(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    tq.optimize(prepared, batches, [SeqMSE(8)], progress=False)
    with pytest.raises(tq.InputError, match="must come before"):
        tq.optimize(prepared, batches, [Transformed()], progress=False)


@pytest.mark.parametrize("budget_s", [0, -1.0])
def test_a_budget_of_no_time_is_refused(model, batches, budget_s):
    with pytest.raises(tq.InputError, match="budget_s"):
        tq.optimize(calibrated(model, batches, LINEAR), batches, [SeqMSE(8)], budget_s=budget_s, progress=False)


def test_a_graph_without_calibration_or_observers_is_refused(model, batches):
    exported = tq.export(model, batches[0])
    with pytest.raises(tq.CalibrationError, match="never saw data"):
        tq.optimize(tq.prepare(exported, LINEAR), batches, [SeqMSE(8)], progress=False)
    with pytest.raises(tq.CalibrationError, match="no observers"):
        tq.optimize(exported, batches, [SeqMSE(8)], progress=False)


def test_no_batches_and_batches_that_do_not_fit_are_refused(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    with pytest.raises(tq.CalibrationError, match="no calibration batch"):
        tq.optimize(prepared, [], [SeqMSE(8)], progress=False)
    with pytest.raises(tq.InputError, match="batch 1"):
        tq.optimize(prepared, [batches[0], torch.randn(16, 9)], [SeqMSE(8)], progress=False)


@pytest.mark.filterwarnings("ignore:the Quantizer left:torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("algorithm", [AdaRound(5), SeqMSE(5), BRECQ(5)])
def test_a_weight_without_an_integer_grid_is_refused_with_its_site(batches, algorithm):
    half = per_tensor(torch.float16, None, None, observer=PlaceholderObserver)
    prepared = calibrated(chain(2), batches, SpecQuantizer(("linear",), dynamic(), half))
    with pytest.raises(tq.SchemeError, match=r"^0: PlaceholderObserver gives its weight no static integer grid"):
        tq.optimize(prepared, batches, [algorithm], progress=False)
    left_out = tq.optimize(prepared, batches, [algorithm], exclude=["0", "2"], progress=False)
    assert not left_out.spans


def test_a_generator_of_batches_is_enough(batches):
    prepared = calibrated(nets.mlp(), batches, LINEAR)
    assert tq.optimize(prepared, iter(batches), [SeqMSE(8), tq.BiasCorrection()], progress=False).spans


def test_a_graph_that_is_not_on_the_cpu_is_refused_with_the_way_out(model, batches):
    prepared = calibrated(model, batches, LINEAR)
    prepared.register_buffer("elsewhere", torch.empty(1, device="meta"))
    with pytest.raises(tq.InputError, match=r"lies on meta.*algorithms=\(\)"):
        tq.optimize(prepared, batches, [AdaRound()], progress=False)


@pytest.mark.parametrize("noise", [math.nan, math.inf])
def test_a_network_that_returns_no_numbers_is_as_bad_as_can_be(noise):
    assert judging._db(SimpleNamespace(signal=1.0, noise=noise)) == -math.inf


def test_layers_of_a_single_sample_are_solved_as_a_batch_of_one_or_refused():
    model, batches = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), [torch.randn(3, 8, 8)] * 2
    quantizer = SpecQuantizer(("conv2d",), per_tensor(torch.uint8, 0, 255), per_channel(low=-3, high=3))
    prepared = calibrated(model, batches, quantizer)
    assert [s.kept for s in tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False).spans] == [True, True]
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
    tq.calibrate(prepared, batches, progress=False)
    with pytest.raises(tq.InputError, match=r"conv2d conv2d takes a single sample.*torchquant\.export"):
        tq.optimize(prepared, batches, [tq.BiasCorrection()], progress=False)


@pytest.mark.filterwarnings("ignore:AdaQuant would lower")
@pytest.mark.parametrize("algorithm", [tq.BiasCorrection(), tq.AdaQuant(4), tq.BatchNormReestimation()])
@pytest.mark.parametrize("quantizer", [LINEAR, SpecQuantizer(("linear",), dynamic(), per_channel())])
def test_an_infinite_output_stays_infinite(batches, algorithm, quantizer):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].bias.data[1] = -math.inf
    prepared = calibrated(model, batches, quantizer)
    tq.optimize(prepared, batches, [algorithm], progress=False)
    actual, wanted = tq.convert(prepared)(batches[0]), model(batches[0])
    assert torch.equal(actual[:, 1], wanted[:, 1])
    assert bool(actual[:, 2:].isfinite().all())


class Tied(nn.Module):
    """A table that is also the head, and a linear that is called twice."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.mix = nn.Embedding(50, 48), nn.LayerNorm(48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.mix(torch.relu(self.mix(self.norm(x))) * 3))


def tied(scheme):
    torch.manual_seed(0)
    net, batches = Tied().eval(), [(torch.randint(0, 50, (8, 7)),) for _ in range(3)]
    return net, batches, calibrated(net, batches, WeightOnlyQuantizer(scheme))


@pytest.mark.parametrize("algorithm", [tq.GPTQ, tq.SeqMSE, tq.BiasCorrection, lambda: BRECQ(10)])
def test_what_is_reported_holds_for_weights_that_several_ops_read(algorithm):
    net, batches, prepared = tied("w3_g16")
    result = tq.optimize(prepared, batches, [algorithm()], progress=False)
    converted = tq.convert(prepared)
    with torch.no_grad():
        outputs = (torch.cat([model(*b) for b in batches]) for model in (net, converted))
    kept = [db for _, db, was_kept in result.steps if was_kept]
    assert tq.sqnr_db(*outputs) == pytest.approx(kept[-1], abs=0.01)
    assert kept[-1] >= kept[0]


def test_an_answer_that_harms_other_readers_of_its_weight_is_taken_back_alone():
    _, batches, prepared = tied("w3")
    result = tq.optimize(prepared, batches, [tq.SeqMSE()], progress=False)
    assert [s.span for s in result.spans] == ["mix", "head"]
    assert result.notes == ["SeqMSE: mix: left as it was, for the sake of other readers of its weight"]
    assert len(solved(prepared)) == 1
    assert result.steps[-1][1] > result.steps[0][1] + 1
