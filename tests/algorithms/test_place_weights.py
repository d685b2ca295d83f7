"""Columns of a linear's input counted as the network's output feels errors at their places."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.algorithms.layers.gram import Moments, moments
from torchquant.algorithms.layers.layout import Layout
from torchquant.calibration.stream import Stream
from torchquant.errors import TorchquantWarning
from torchquant.fx.blocks import layers
from torchquant.quantizers import WeightOnlyQuantizer


class Pooled(nn.Module):
    """Two linears over tokens, and the mean of those that a mask keeps."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x, mask):
        y = self.down(self.up(x).relu())
        return (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def padded(count=4):
    """Sequences of 12 tokens of which 4 count; the others are large."""
    for _ in range(count):
        x, mask = torch.randn(8, 12, 16), torch.zeros(8, 12)
        mask[:, :4] = 1
        x[:, 4:] *= 20
        yield x, mask


@pytest.fixture
def calibrated_net():
    batches = list(padded())
    prepared = tq.prepare(tq.export(Pooled().eval(), batches[0]), WeightOnlyQuantizer("w3_g16"))
    tq.calibrate(prepared, batches, progress=False)
    return prepared, batches


def test_moments_are_of_the_columns_that_the_output_feels(calibrated_net):
    prepared, batches = calibrated_net
    stream, spans = Stream(prepared, batches), layers(prepared)
    stream.sensitivities(spans, 0, 2, elements=False, metrics=False, places=True)
    walk = stream.walk(spans)
    task = next(walk)
    (site,) = task.span.sites
    weights = [task.place_weights(site, batch) for batch in range(task.count)]
    assert all(bool((w[:, 4:] == 0).all()) and bool((w[:, :4] > 0).any()) for w in weights)
    assert torch.cat(weights).mean() == pytest.approx(1.0, rel=1e-5)
    whole = Moments.joined(moments(task, site, Layout(torch.Size((32, 16))), weigh=True))
    rows, columns = torch.cat(weights).reshape(-1), torch.cat([x for x, _ in batches]).reshape(-1, 16)
    assert torch.allclose(whole.a[0], (columns * rows[:, None]).T @ columns / rows.sum(), rtol=1e-2, atol=1e-4)
    assert torch.allclose(whole.mean[0], (columns * rows[:, None]).sum(0) / rows.sum(), rtol=1e-2, atol=1e-3)
    walk.close()


def test_without_measurement_all_columns_count_alike(calibrated_net):
    prepared, batches = calibrated_net
    stream, spans = Stream(prepared, batches), layers(prepared)
    walk = stream.walk(spans)
    task = next(walk)
    (site,) = task.span.sites
    assert task.place_weights(site, 0) is None
    layout = Layout(torch.Size((32, 16)))
    for weighed, plain in zip(moments(task, site, layout, weigh=True), moments(task, site, layout), strict=True):
        assert torch.equal(weighed.a, plain.a)
    walk.close()


def test_gptq_does_better_where_it_counts(calibrated_net):
    prepared, batches = calibrated_net
    with pytest.warns(TorchquantWarning, match="would lower the output's SQNR"):  # it serves the padding
        tq.optimize(prepared, batches, [tq.GPTQ()], progress=False)
    result = tq.optimize(prepared, batches, [tq.GPTQ(weigh_places=True)], progress=False)
    (_, before, _), (_, after, is_kept) = result.steps
    assert is_kept
    assert after > before + 2


def test_a_block_algorithm_measures_what_its_start_asks_for(calibrated_net):
    prepared, batches = calibrated_net
    for fisher in (True, False):
        algorithm = tq.BRECQ(fisher=fisher, start=tq.GPTQ(weigh_places=True))
        stream, spans = Stream(prepared, batches), algorithm.spans(prepared, frozenset())
        algorithm.begin(stream, spans, 0)
        assert len(stream.place_means) == 2
        assert min(stream.place_means.values()) > 0
        stream.close()
