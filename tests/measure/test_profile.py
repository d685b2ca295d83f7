"""A profile: parts that make up the whole, figures that are measured or unknown, arguments that make no sense."""

import json
import time

import pytest
import torch
from nets import Counting
from torch import nn

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.fx.work import work
from torchquant.measure import resources
from torchquant.measure.traced import traced
from torchquant.quantizers import X86Quantizer


class Wide(nn.Module):
    """Enough work in our kernels and in Inductor's that the call itself is small beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return torch.cumsum(self.second(x), 0)


@pytest.fixture(scope="module")
def wide(request):
    batch = (torch.randn(2048, 256),)
    exported = tq.export(Wide(), batch)
    quantized = tq.quantize(exported, batch, [batch], quantizer=X86Quantizer(), algorithms=(), progress=False)
    program = inductor_x86.lower(quantized, batch, progress=False, named_kernels=True)
    return exported, quantized, program, batch


def test_the_parts_make_up_the_whole(wide) -> None:
    """To within a tenth, as measured: nothing is what is left over."""
    _, _, program, batch = wide
    traces = [program.trace(batch) for _ in range(5)]
    assert any(trace.is_complete for trace in traces), [(t.parts_ms, t.whole_ms) for t in traces]
    for trace in traces:
        assert 0 < trace.parts_ms <= trace.whole_ms * 1.1
    regions = [part for part in traces[0].parts if part.name == "x86_region"]
    assert sorted(name for part in regions for name in part.sites if name.startswith("linear")) == [
        "linear",
        "linear_1",
    ]


def test_the_parts_of_a_small_program_make_up_the_whole() -> None:
    """Where the call takes as long as the ops, it has parts of its own."""
    batch = torch.randn(2, 16)
    quantized = tq.quantize(
        nn.Linear(16, 8).eval(), batch, [batch], quantizer=X86Quantizer(), algorithms=(), progress=False
    )
    program = inductor_x86.lower(quantized, batch, progress=False)
    traces = [program.trace(batch) for _ in range(5)]
    assert any(trace.is_complete for trace in traces), [(t.parts_ms, t.whole_ms) for t in traces]
    names = [part.name for part in traces[0].parts]
    assert (names[0], names[-1]) == ("arguments", "outputs")
    assert "x86_region" in names
    assert all(trace.parts_ms <= trace.whole_ms for trace in traces)


def test_what_a_delegate_takes_beside_its_ops_is_a_part() -> None:
    """XNNPACK counts whole microseconds: of three ops of 1.6 us each it says 1 us."""
    parts = pytest.importorskip("torchquant.backends.executorch_xnnpack.traces").parts_of
    call = [("a", 0.001, True), ("b", 0.001, True), ("DELEGATE_CALL", 0.005, False)]
    own = [("copy", 0.002, False), ("OPERATOR_CALL", 0.003, False)]
    rows = [*call, *own, *call, ("Method::execute", 0.014, False)]
    beside = [part.ms for part in parts(rows) if part.name == "delegate, beside its ops"]
    assert beside == pytest.approx([0.003, 0.003])
    assert sum(part.ms for part in parts(rows)) == pytest.approx(0.012)


def test_ops_have_times_of_their_own_where_the_graph_is_given(wide) -> None:
    exported, quantized, program, batch = wide
    profile = tq.profile(program, batch, reference=exported, graph=quantized, rounds=8)
    assert set(profile.op_ms) == {"linear", "linear_1"}
    assert all(0 < ms < 10 * profile.latency.median_ms for ms in profile.op_ms.values())
    report = tq.report(quantized, program, profile=profile)
    assert json.loads(report.to_json())["profile"]["site_ms"].keys() >= {"linear", "linear_1"}
    row = next(line for line in str(report).splitlines() if line.startswith("linear "))
    assert f"{profile.op_ms['linear']:.4f}" in row
    image = torch.randn(2, 3, 4, 4)
    with pytest.raises(tq.InputError, match="of another graph"):
        tq.report(
            tq.quantize(nn.Conv2d(3, 4, 1), image, [image], quantizer=X86Quantizer(), algorithms=(), progress=False),
            profile=profile,
        )


def test_work_is_counted_from_the_graph(wide, tmp_path) -> None:
    _, quantized, program, batch = wide
    macs = 2048 * 256 * 1024 * 2
    assert sum(row.macs for row in work(quantized)) == macs
    loaded = inductor_x86.load(program.save(tmp_path / "model.pt2"))
    for one in (program, loaded):
        profile = tq.profile(one, batch, rounds=4, callers=())
        assert (profile.int_operations, profile.float_operations) == (2 * macs, 0)
        assert profile.weight_bytes == 2 * 256 * 1024
        assert profile.activation_bytes == 2048 * (256 + 1024) * 2
        assert profile.program_bytes == program.size_bytes
    assert loaded.facts == program.facts


def test_a_slower_reference_is_seen_to_be_slower() -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.004)
            return x

    profile = tq.profile(nn.Identity(), torch.randn(2), reference=Slow(), rounds=8, callers=(1, 3))
    assert profile.others["reference"].median_ms >= 4 > profile.latency.median_ms
    assert [c.callers for c in profile.concurrent] == [1, 3]
    assert profile.int_operations is None
    assert "unknown integer" in str(profile)
    json.loads(profile.to_json())


def test_callers_that_sleep_do_so_at_once() -> None:
    class Sleeping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    profile = tq.profile(Sleeping(), torch.randn(2), rounds=8, callers=(1, 4))
    one, four = profile.concurrent
    assert four.calls_per_s > 2 * one.calls_per_s
    assert one.p99_ms >= one.p50_ms >= 20


@pytest.mark.parametrize("inputs", ["tuple", "dict"])
def test_any_form_of_a_batch_is_taken(inputs: str) -> None:
    exported = tq.export(nn.Linear(4, 2), (torch.randn(3, 4),))
    batch = (torch.randn(3, 4),) if inputs == "tuple" else {"input": torch.randn(3, 4)}
    assert tq.profile(exported, batch, rounds=4, callers=()).sizes == ((3, 4),)


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (5, {}, "takes a program"),
        (nn.Identity, {}, "takes a program"),
        (nn.Identity(), {"rounds": 1}, "rounds"),
        (nn.Identity(), {"rounds": 2.5}, "rounds"),
        (nn.Identity(), {"callers": 2}, "callers"),
        (nn.Identity(), {"callers": [0]}, "callers"),
        (nn.Identity(), {"compiled": True}, "reference"),
    ],
)
def test_arguments_are_checked(program, options, message: str) -> None:
    with pytest.raises(tq.InputError, match=message):
        tq.profile(program, torch.randn(2), **options)


def test_inputs_that_do_not_fit_are_refused(wide) -> None:
    with pytest.raises(tq.InputError):
        tq.profile(wide[2], (torch.randn(3, 7),))


def test_an_error_in_a_caller_is_raised() -> None:
    class Twice(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import threading

            if threading.current_thread() is not threading.main_thread():
                raise ValueError("not in threads")
            return x

    with pytest.raises(ValueError, match="not in threads"):
        tq.profile(Twice(), torch.randn(2), rounds=4)


# energy ---------------------------------------------------------------------------------------------------------------


def test_no_meter_is_no_joule(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    energy = resources.measure_energy(lambda: sum(range(100_000)), 5, powercap=tmp_path)
    assert energy.joules is None
    assert energy.cpu_seconds > 0
    assert "no RAPL counter" in energy.meter


@pytest.mark.parametrize("steps", [3_000_000, -5])
def test_joules_are_the_counters_difference(tmp_path, steps: int) -> None:
    package = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("999999999")  # a part of the package, not to be added
    package.mkdir()
    counter = package / "energy_uj"
    counter.write_text("1000")

    def run() -> None:
        counter.write_text(str(int(counter.read_text()) + steps))

    energy = resources.measure_energy(run, 4, powercap=tmp_path)
    assert energy.joules == (3.0 if steps > 0 else None)
    assert ("reset" in energy.meter) == (steps < 0)


def test_a_trace_names_what_runs() -> None:
    a = torch.randn(512, 512)
    trace = traced(lambda: torch.relu(a @ a))
    assert [part.name for part in trace.parts] == ["aten::matmul", "aten::relu"]
    assert trace.parts[0].first_size == 512 * 512


def test_states_are_as_they_were() -> None:
    batch = torch.randn(2, 8)
    exported = tq.export(Counting(), batch)
    prepared = tq.prepare(exported, X86Quantizer())
    tq.calibrate(prepared, [batch], progress=False)
    quantized = tq.convert(prepared)
    program = inductor_x86.lower(quantized, batch, progress=False)
    program(batch)
    tq.profile(program, batch, reference=exported, graph=quantized, rounds=4, callers=())
    assert [float(v) for v in (program.state["calls"], exported.calls, quantized.calls)] == [1.0, 0.0, 0.0]
