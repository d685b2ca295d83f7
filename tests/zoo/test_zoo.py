"""Every model of the zoo ends right or refused by name: quantized always, on every way when run with `-m slow`."""

import copy
import warnings

import pytest

from zoo.judging import Float, differences, outcome, quantized_for_both, ways_of
from zoo.models import BY_NAME, CASES

LOWERED = {  # of all cases, those that are lowered in each run of the tests: one for each way of being unusual
    "x86/ours/dynamic": ["moving_mean"],
    "x86/foreign/static": ["shufflenet"],
    "xnnpack/ours/dynamic": ["in_place_everywhere"],
    "xnnpack/ours/static": ["kv_cache", "streaming_filter", "integer_arithmetic"],
}


def test_every_case_has_a_name_of_its_own_and_there_are_many():
    assert len(BY_NAME) == len(CASES) >= 60


QUANTIZED = [pytest.param(c, marks=[pytest.mark.slow] if c.name == "deep_chain" else [], id=c.name) for c in CASES]


@pytest.mark.parametrize("case", QUANTIZED)
def test_the_exported_graph_is_the_model_and_the_quantized_one_is_near(case):
    if case.expectation("export") != "right":
        pytest.skip(f"torch.export refuses it: {case.expectation('export')}")
    original = Float.of(case, dynamic=case.dynamic_shapes is not None)
    expected = original.expected()
    exact = differences(expected, original.streams(lambda: copy.deepcopy(original.exported)))
    assert all(d.db > 80 if d.is_float else d.unequal == 0 for d in exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs = quantized_for_both(original)
    for graph in graphs:
        near = differences(expected, original.streams(lambda graph=graph: copy.deepcopy(graph)))
        assert min((d.db for d in near if d.is_float), default=100.0) > case.at_least_db
        assert all(d.unequal <= case.most_unequal * d.count for d in near)


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, names in LOWERED.items() for name in names])
def test_some_of_them_are_right_when_lowered(way, name):
    case = BY_NAME[name]
    assert not outcome(case, way).problem(case.expectation(way))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), [pytest.param(c, w, id=f"{c.name}-{w}") for c in CASES for w in ways_of(c)])
def test_every_case_is_right_or_refused_by_name_on_every_way(case, way):
    assert not outcome(case, way).problem(case.expectation(way))
