"""OnnxQuantizer: the scheme follows the network, weights of 7 bits where asked for, what is unknown is refused."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.errors import SchemeError
from torchquant.fx.sites import read_sites
from torchquant.quantizers import OnnxQuantizer


def sites(model, x, **options):
    graph = tq.quantize(model.eval(), (x,), [(x,)], quantizer=OnnxQuantizer(**options), algorithms=(), progress=False)
    return [s for s in read_sites(graph) if s.compute]


def test_auto_is_dynamic_without_convolutions_and_static_with_them():
    linear, _ = sites(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8))
    assert linear.activation.dynamic
    conv, linear = sites(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(6, 2)), torch.randn(2, 3, 8))
    assert not conv.activation.dynamic
    assert not linear.activation.dynamic


@pytest.mark.parametrize("options", [{"reduced_range": True}, {"scheme": "static_int8_reduced_range"}])
def test_a_reduced_range_has_weights_of_7_bits_that_sum_in_16(options):
    (site,) = sites(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8), **options)
    assert (site.weight.quant_min, site.weight.quant_max) == (-63, 63)
    assert 2 * 255 * site.weight.quant_max < 2**15


def test_a_scheme_that_is_unknown_or_has_no_reduced_range_is_refused():
    with pytest.raises(SchemeError, match="static_int8"):
        OnnxQuantizer("w5_g7")
    with pytest.raises(SchemeError, match="reduced_range goes with"):
        OnnxQuantizer("w4_g32", reduced_range=True)


def test_for_tensorrt_every_activation_is_symmetric_and_outputs_are_not_quantized():
    graph_sites = sites(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(2, 3, 8, 8),
                        scheme="tensorrt_int8")  # fmt: skip
    assert [int(s.activation.zero_point) for s in graph_sites] == [0, 0]
    assert all(s.activation.dtype == torch.int8 for s in graph_sites)
