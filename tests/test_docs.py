"""The pages that newcomers read: each block of Python runs as it stands, and no link leads nowhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
RUN = ("README.md", "docs/getting-started.md", "docs/troubleshooting.md", "docs/onnx.md")


def blocks(page, kind):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


CASES = [(page, i) for page in RUN for i in range(len(blocks(page, "python")))]


@pytest.mark.filterwarnings("ignore::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(("page", "number"), CASES)
def test_a_block_of_a_page_runs_as_it_stands(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    batches = [torch.randn(8, 16) for _ in range(4)]
    names = {"model": model, "example_inputs": (batches[0],), "batches": batches}
    exec(compile(blocks(page, "python")[number], f"{page}[{number}]", "exec"), names)


@pytest.mark.parametrize("number", range(len(blocks("docs/getting-started.md", "python gpu"))))
def test_a_block_for_gpus_runs_as_it_stands(number, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("docs/getting-started.md", "python gpu")[number], "gpu", "exec"), {})


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_no_link_of_a_page_leads_nowhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken
