"""Which nodes a pattern names."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.fx.patterns import match


@pytest.fixture
def graph():
    layers = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    return tq.export(nn.ModuleDict({"layers": layers})["layers"], torch.randn(2, 4))


def names(nodes):
    return {n.name for n in nodes}


def test_a_module_matches_with_all_that_is_inside_it(graph):
    assert names(match(graph, "0")) == {"linear", "relu"}
    assert names(match(graph, "*.0")) == {"linear", "linear_1"}
    assert names(match(graph, "[01]")) == {"linear", "relu", "linear_1", "relu_1"}


def test_op_and_node_patterns_take_globs(graph):
    assert names(match(graph, "op:linear")) == {"linear", "linear_1"}
    assert names(match(graph, "op:*e*u*")) == {"relu", "relu_1"}
    assert names(match(graph, "node:linear_1")) == {"linear_1"}
    assert names(match(graph, "node:*_1")) == {"linear_1", "relu_1"}


@pytest.mark.parametrize(
    ("pattern", "near"), [("0.00", "0.0"), ("op:linea", "linear"), ("node:linear_9", "linear_1"), ("zzz", "0")]
)
def test_a_pattern_that_matches_nothing_names_near_names(graph, pattern, near):
    with pytest.raises(tq.PatternError, match=rf"matches nothing.*Nearest names:.*{near}"):
        match(graph, pattern)


@pytest.mark.parametrize("pattern", ["", None, 3])
def test_a_pattern_is_a_non_empty_string(graph, pattern):
    with pytest.raises(tq.PatternError, match="non-empty string"):
        match(graph, pattern)
