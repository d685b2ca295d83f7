"""The report as a page and as JSON: held against its schema, and used in a real browser."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.quantizers import X86Quantizer
from torchquant.reporting.html import positions

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x))) / 4


def _made(blocks: int):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(16, 4)).eval()
    batches = [(torch.randn(8, 16),) for _ in range(2)]
    exported = tq.export(model, batches[0])
    prepared = tq.prepare(exported, X86Quantizer("static_int8", exclude=["1.b"]))
    tq.calibrate(prepared, batches, progress=False)
    analysis = tq.analyze(prepared, batches)
    plans = tq.search(exported, batches, X86Quantizer, ["w8", "w2"]).curve(3) if blocks < 5 else []
    return tq.report(tq.convert(prepared), analysis=analysis, plans=plans)


@pytest.fixture(scope="module")
def report():
    return _made(3)


def _opened(browser, path, **options):
    page = browser.new_page(**options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=20000)
    return page, said


def _column(page, field: str) -> list[str]:
    return page.locator(f".tabulator-row .tabulator-cell[tabulator-field={field}]").all_inner_texts()


def test_json_is_as_its_schema_says(report) -> None:
    read = json.loads(report.to_json())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(read, SCHEMA)
    assert read["analysis"]["sites"]
    broken = {**read, "sites": [{**read["sites"][0], "status": "fine"}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_edges_lead_through_what_is_no_site(report) -> None:
    edges = {(a, b) for a, b in report.to_dict()["graph"]["edges"]}
    assert ("linear", "relu") in edges
    assert ("relu", "linear_1") in edges
    assert all(a != b for a, b in edges)


def test_every_edge_leads_down() -> None:
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    place = positions(["a", "b", "c", "d", "e"], edges)
    assert all(place[target][1] > place[source][1] for source, target in edges)
    assert len(set(place.values())) == 5


def test_suffixes_say_what_is_written(report, tmp_path) -> None:
    assert report.save(tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads(report.save(tmp_path / "r.json").read_text())["kind"] == "torchquant-report"
    assert "made by" in report.save(tmp_path / "r.txt").read_text()
    assert "<table>" in report._repr_html_()


def test_the_page_sorts_filters_and_shows_an_op(report, browser, tmp_path) -> None:
    page, said = _opened(browser, report.save(tmp_path / "r.html"))
    assert len(_column(page, "op")) == 7
    shares = [float(text.split()[0]) for text in _column(page, "share") if text]
    assert shares == sorted(shares, reverse=True)
    page.locator(".tabulator-col[tabulator-field=module]").click()
    modules = _column(page, "module")
    assert modules == sorted(modules)
    page.select_option("#status", "excluded")
    assert _column(page, "module") == ["1.b"]
    page.select_option("#status", "")
    page.fill("#search", "2.a")
    assert _column(page, "module") == ["2.a"]
    page.fill("#search", "")
    page.uncheck("#compute")
    assert "relu" in _column(page, "op")
    page.locator(".tabulator-row").first.click()
    assert page.locator("#detail").is_visible()
    page.select_option("#colour", "share")
    assert not said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_aside(report, browser, tmp_path, scheme: str) -> None:
    page, said = _opened(
        browser, report.save(tmp_path / "r.html"), viewport={"width": 390, "height": 844}, color_scheme=scheme
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
    assert page.locator("#graph canvas").count() > 0
    assert not said


def test_names_cannot_break_the_page(browser, tmp_path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"</script><b>x&y": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["</script><b>x&y"](x)

    prepared = tq.prepare(tq.export(Odd(), (torch.randn(2, 8),)), X86Quantizer("static_int8"))
    tq.calibrate(prepared, [(torch.randn(2, 8),)], progress=False)
    page, said = _opened(browser, tq.report(prepared).save(tmp_path / "odd.html"))
    assert "</script><b>x&y" in _column(page, "module")[0]
    assert not said


def test_five_hundred_sites_are_small_and_quick(browser, tmp_path) -> None:
    report = _made(125)
    assert len(report.sites) >= 500
    path = report.save(tmp_path / "r.html")
    assert path.stat().st_size < 3e6
    page, said = _opened(browser, path)
    assert page.evaluate("performance.getEntriesByType('navigation')[0].duration") > 0
    assert not said
