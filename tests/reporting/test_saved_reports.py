"""A report's own JSON is a report again, with all that was in it; damaged and foreign files are refused."""

import json

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.quantizers import X86Quantizer
from torchquant.reporting.saved import read_report


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    exported = tq.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x)
    prepared = tq.prepare(exported, X86Quantizer(exclude=["node:linear_1"]))
    tq.calibrate(prepared, [x], progress=False)
    analysis = tq.analyze(prepared, [x])
    plans = tq.search(exported, [x], X86Quantizer, ["w8", "w4"]).curve(2)
    return tq.report(prepared, analysis=analysis, plans=plans)


def test_a_saved_report_gives_the_same_page_and_data(report, tmp_path):
    kept = read_report(report.save(tmp_path / "report.json"))
    assert kept.to_dict() == json.loads(report.to_json())
    assert kept.to_dict()["analysis"]["sites"]
    assert kept.to_dict()["plans"]
    again, first = kept.save(tmp_path / "again.html"), report.save(tmp_path / "first.html")
    assert again.read_text() == first.read_text()
    assert read_report(kept.save(tmp_path / "again.json")) == kept


def test_its_text_has_every_compute_op(report, tmp_path):
    text = str(read_report(report.save(tmp_path / "report.json")))
    lines = [line for line in text.splitlines() if line.startswith("linear")]
    assert lines == [line for line in str(report).splitlines() if line.startswith("linear")]
    assert "excluded" in lines[1]
    assert text.startswith(report.summary())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a report"),
        ("[" * 100000, "cannot be read as a report"),
        ("[]", "is no report"),
        ('{"kind": "torchquant-plan", "version": 1}', "is no report"),
        ('{"kind": "torchquant-report", "version": 2}', "is no report"),
        ('{"kind": "torchquant-report", "version": 1}', "no sensible summary"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, message):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(tq.ArtifactError, match=message):
        read_report(file)


@pytest.mark.parametrize("field", ["sites", "summary", "programs", "versions", "graph"])
def test_a_damaged_report_is_refused_by_the_field(report, tmp_path, field):
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**report.to_dict(), field: [1] if field == "sites" else 1}))
    with pytest.raises(tq.ArtifactError, match=f"no sensible {field}"):
        read_report(file)
    with pytest.raises(tq.ArtifactError, match="cannot be read"):
        read_report(tmp_path / "absent.json")
