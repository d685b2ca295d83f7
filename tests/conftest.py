"""Seeds, and what is expensive once for the whole session: lowered programs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHQUANT_POISON", "1")  # kernels hand out no memory of earlier calls; see `native.poisoned`
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the cores to other tests

import nets
import pytest
import torch

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.fx import passes
from torchquant.ops.x86 import native
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DATA = Path(os.environ.get("TORCHQUANT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"needs the data sets in {DATA} (TORCHQUANT_DATA)")
    return DATA


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"])
def instructions(request):
    """Each of the kernels' instruction sets that this CPU runs."""
    native.load()
    if request.param not in native.instruction_sets():
        pytest.skip(f"this CPU does not run {request.param}")
    with native.use(request.param), native.poisoned():
        yield request.param


@pytest.fixture
def cuts_by_rule(tmp_path, monkeypatch):
    """A cache folder of the test's own: what was tuned on this machine is not what is tested."""
    from torchquant.ops.gpu import configs

    def forget():
        configs.table.cache_clear()
        configs._chosen.cache_clear()

    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path))
    forget()
    yield
    forget()


@dataclass
class Lowered:
    """A float graph, what became of it, and one batch."""

    exported: Any
    quantized: Any
    program: Any
    batch: Any

    def expected(self, *inputs):
        return self.quantized(*(inputs or self.batch))


def lowered(backend, quantizer, model, batch, dynamic_shapes=None) -> Lowered:
    exported = tq.export(model.eval(), batch, dynamic_shapes=dynamic_shapes)
    quantized = tq.quantize(exported, batch, [batch], quantizer=quantizer, algorithms=(), progress=False)
    reference = passes.copy_graph(quantized)
    return Lowered(exported, reference, backend.lower(quantized, batch), batch)


@pytest.fixture(scope="session")
def x86_pixels() -> Lowered:
    """conv2d, residual, linears on 2-D, 3-D and permuted 4-D inputs; dynamic batch."""
    torch.manual_seed(0)
    batch = (torch.randn(3, 4, 8, 8),)
    inductor = inductor_settings()
    case = lowered(inductor_x86, X86Quantizer(), nets.Pixels(), batch, ({0: torch.export.Dim("batch")},))
    case.settings_before, case.settings_after = inductor, inductor_settings()
    return case


def inductor_settings():
    return {**torch._inductor.config.save_config_portable(), "grad": torch.is_grad_enabled()}


@pytest.fixture(scope="session")
def x86_residual() -> Lowered:
    torch.manual_seed(0)
    return lowered(inductor_x86, X86Quantizer(), nets.Residual(), (torch.randn(2, 16), torch.randn(2, 4, 8, 8)))


@pytest.fixture(scope="session")
def x86_block() -> Lowered:
    torch.manual_seed(0)
    return lowered(inductor_x86, X86Quantizer("dynamic_int8"), nets.Block(), (torch.randn(2, 8, 32),))


@pytest.fixture(scope="session")
def pte_mobile() -> Lowered:
    torch.manual_seed(0)
    model = nets.Mobile().train()
    for _ in range(3):
        model(torch.randn(4, 3, 16, 16))
    return lowered(executorch_xnnpack, XnnpackQuantizer(), model, (torch.randn(1, 3, 16, 16),))


@pytest.fixture(scope="session")
def pte_shared() -> Lowered:
    torch.manual_seed(0)
    return lowered(executorch_xnnpack, XnnpackQuantizer(), nets.Shared(), (torch.randn(1, 3, 8, 8),))


@pytest.fixture(scope="session")
def pte_block() -> Lowered:
    torch.manual_seed(0)
    return lowered(executorch_xnnpack, XnnpackQuantizer(), nets.Block(), (torch.randn(1, 8, 32),))


@pytest.fixture(scope="session")
def pte_static_block() -> Lowered:
    torch.manual_seed(0)
    return lowered(executorch_xnnpack, XnnpackQuantizer("static_int8"), nets.Block(), (torch.randn(1, 8, 32),))


@pytest.fixture(scope="session")
def pte_difference() -> Lowered:
    torch.manual_seed(0)
    batch = (torch.randn(2, 4), torch.randn(2, 4))
    return lowered(executorch_xnnpack, XnnpackQuantizer(), nets.Difference(), batch)
