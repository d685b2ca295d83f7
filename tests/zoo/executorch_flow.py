"""A pytest plugin that puts XnnpackQuantizer in the place of ExecuTorch's own in ExecuTorch's tests, and records them.

    TORCHQUANT_RECORD=found.json python -m pytest -p zoo.executorch_flow .../executorch/backends/test/suite/operators

The suite gets one flow, `torchquant`, instead of those of all backends; the XNNPACK delegate's own tests get a
`Quantize` stage with our Quantizer. With TORCHQUANT_FLOW=executorch their own Quantizer runs, to compare with.
"""

import json
import os
from pathlib import Path
from typing import Any

import executorch.backends.test.suite.flow as flows
import executorch.backends.xnnpack.test.tester as tester_package
import executorch.backends.xnnpack.test.tester.tester as tester
import pytest
from executorch.backends.test.harness.stages import Quantize
from executorch.backends.test.suite.flows import xnnpack

from torchquant.errors import TorchquantError
from torchquant.quantizers import XnnpackQuantizer

RECORDED: dict[str, dict[str, str]] = {}
OURS = os.environ.get("TORCHQUANT_FLOW", "torchquant") == "torchquant"


class OurQuantize(Quantize):
    """Their stage with our Quantizer, whatever scheme their configuration comes near to."""

    def __init__(self, quantizer: Any = None, quantization_config: Any = None, **options: Any) -> None:
        activation = getattr(quantization_config, "input_activation", None)
        scheme = "dynamic_int8" if activation is not None and activation.is_dynamic else None
        super().__init__(XnnpackQuantizer(scheme, is_qat=options.get("is_qat", False)), None, **options)


def flow() -> flows.TestFlow:
    if not OURS:
        return xnnpack.XNNPACK_STATIC_INT8_PER_CHANNEL_TEST_FLOW
    return flows.TestFlow(
        "torchquant", "xnnpack", tester.Tester, quantize=True, quantize_stage_factory=lambda: OurQuantize()
    )


chosen = flow()
flows.all_flows = lambda: {chosen.name: chosen}
if OURS:
    tester.Quantize = tester_package.Quantize = OurQuantize


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note how each test ended, and what it was refused with."""
    report = (yield).get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    error = call.excinfo.value if call.excinfo is not None else None
    causes = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    refusal = next((e for e in causes if isinstance(e, TorchquantError)), None)
    last = refusal or next((e for e in reversed(causes) if e is not None), None)
    outcome = "refused" if refusal is not None else report.outcome
    text = "" if last is None else f"{type(last).__name__}: {' '.join(str(last).split())[:300]}"
    RECORDED[report.nodeid.partition("executorch/")[2] or report.nodeid] = {"outcome": outcome, "text": text}
    if path := os.environ.get("TORCHQUANT_RECORD"):
        Path(path).write_text(json.dumps(RECORDED, indent=1) + "\n")  # after each test: a run may be stopped
