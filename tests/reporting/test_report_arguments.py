"""What a report is made of is checked; its figures go to Model Explorer; a program's report is made again from it."""

import json

import nets
import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.quantizers import X86Quantizer
from torchquant.reporting.node_data import node_data
from torchquant.reporting.saved import saved_report


def _quantized(model, batch):
    return tq.quantize(model, batch, [batch], quantizer=X86Quantizer(), algorithms=(), progress=False)


@pytest.mark.parametrize("plans", [5, "plan", [5], {"about": {}}, None])
def test_plans_are_a_list_of_plans(plans) -> None:
    with pytest.raises(tq.InputError, match="list of plans"):
        tq.report(_quantized(nets.mlp(), torch.randn(2, 8)), plans=plans)


def test_a_single_plan_asks_for_brackets() -> None:
    plan = tq.Plan("X86Quantizer", "w8", {})
    with pytest.raises(tq.InputError, match="list of plans"):
        tq.report(_quantized(nets.mlp(), torch.randn(2, 8)), plans=plan)


@pytest.mark.parametrize("program", [5, "model.pt2", nn.Identity(), None])
def test_what_is_no_program_is_refused(program) -> None:
    with pytest.raises(tq.InputError, match=r"lower\(\) or load\(\) returned"):
        tq.report(_quantized(nets.mlp(), torch.randn(2, 8)), program)


def test_programs_of_other_models_are_refused(x86_pixels, x86_block, pte_mobile, pte_shared) -> None:
    for case, other in ((x86_pixels, x86_block), (pte_mobile, pte_shared), (x86_block, pte_mobile)):
        assert tq.report(case.quantized, case.program).programs == (case.program,)
        with pytest.raises(tq.InputError, match="lowered from another graph"):
            tq.report(case.quantized, other.program)


@pytest.mark.parametrize("profile", [5, {"site_ms": {}}, "profile"])
def test_what_is_no_profile_is_refused(profile) -> None:
    with pytest.raises(tq.InputError, match=r"torchquant\.profile returned"):
        tq.report(_quantized(nets.mlp(), torch.randn(2, 8)), profile=profile)


def test_a_program_gives_the_report_of_its_graph_again(x86_pixels, pte_mobile) -> None:
    for case in (x86_pixels, pte_mobile):
        report, again = tq.report(case.quantized, case.program), saved_report(case.program)
        assert again.coverage == report.coverage
        assert again.weight_bytes == report.weight_bytes
        first, second = (r.to_dict() for r in (report, again))
        assert second["graph"] == first["graph"]
        assert second["programs"] == first["programs"]
        compute = [[s for s in r["sites"] if s["compute"]] for r in (first, second)]
        assert [s["node"] for s in compute[0]] == [s["node"] for s in compute[1]]
        assert again._repr_html_()


# Model Explorer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analyzed():
    batch = torch.randn(4, 8)
    prepared = tq.prepare(tq.export(nets.mlp(), batch), X86Quantizer("static_int8"))
    tq.calibrate(prepared, [batch], progress=False)
    return tq.report(prepared, analysis=tq.analyze(prepared, [batch]))


@pytest.mark.parametrize("measure", ["share", "alone_db", "cumulative_db", "output_db"])
def test_node_data_hold_a_value_for_each_op(analyzed, tmp_path, measure: str) -> None:
    read = json.loads(analyzed.save_node_data(tmp_path / "data.json", measure).read_text())
    assert set(read) == {"name", "results", "gradient"}
    assert set(read["results"]) == {"linear", "linear_1"}
    for node, result in read["results"].items():
        site = next(s for s in analyzed.analysis.sites if s.site.node == node)
        assert result == {"value": pytest.approx(getattr(site, measure))}
    assert [stop["stop"] for stop in read["gradient"]] == [0, 1]
    assert all(len(stop["bgColor"]) == 7 for stop in read["gradient"])


def test_times_colour_the_graph_too() -> None:
    report = {"profile": {"site_ms": {"linear": 0.5}}, "analysis": None}
    assert node_data(report, "ms")["results"] == {"linear": {"value": 0.5}}


def test_measures_that_a_report_lacks_are_named(analyzed) -> None:
    with pytest.raises(tq.InputError, match=r"profile=torchquant\.profile"):
        node_data(analyzed.to_dict(), "ms")
    with pytest.raises(tq.InputError, match="choose from share"):
        node_data(analyzed.to_dict(), "beauty")


def test_findings_stand_before_the_table(analyzed) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    batch, large = torch.randn(16, 8), 6 * torch.randn(16, 8)
    prepared = tq.prepare(tq.export(Broken(), batch), X86Quantizer("static_int8"))
    tq.calibrate(prepared, [batch], progress=False)
    text = str(tq.report(prepared, analysis=tq.analyze(prepared, [large])))
    assert text.index("error: clipped: linear") < text.index("compute ops\n")
