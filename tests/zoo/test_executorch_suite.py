"""ExecuTorch's own tests of its XNNPACK backend pass with XnnpackQuantizer, but for differences that are choices."""

import pytest

from zoo import executorch_suite as suite


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", suite.PARTS)
def test_executorchs_own_tests_hold_with_xnnpack_quantizer(part):
    if not (suite.INSTALLED / suite.PARTS[part]).is_dir():
        pytest.skip("this ExecuTorch comes without its tests")
    records = suite.run(suite.PARTS[part])
    assert len(records) > 100
    assert not suite.unexplained(records)


def test_a_failure_without_a_reason_is_found():
    wrong = {"outcome": "failed", "text": "AssertionError: Output 0 does not match reference output."}
    chosen = {
        "outcome": "failed",
        "text": "AssertionError: Expected 4 quantized_decomposed.quantize nodes but found 0.",
    }
    assert suite.unexplained({"wrong": wrong, "chosen": chosen, "fine": {"outcome": "passed", "text": ""}}) == {
        "wrong": wrong["text"]
    }
