"""Blocks of the k-quants are what ggml decodes, and lose no more than ggml's own encoders."""

import pytest
import torch

import torchquant as tq
from torchquant.formats import k_quants

gguf = pytest.importorskip("gguf")

# MSE of ggml's encoders without an importance matrix, on 1 M numbers of N(0, 1)
TYPES = {
    "Q4_K": (k_quants.encode_q4_k, 5.091e-3),
    "Q5_K": (k_quants.encode_q5_k, 1.305e-3),
    "Q6_K": (k_quants.encode_q6_k, 3.146e-4),
}


def decoded(name, stored):
    return torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", TYPES)
def test_the_error_on_gaussian_numbers_is_below_that_of_ggml(name):
    encode, reference = TYPES[name]
    values = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    stored = encode(values)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert stored.shape == (256, 4096 // block * size)
    assert float((decoded(name, stored) - values).square().mean()) < reference


@pytest.mark.parametrize("name", TYPES)
def test_values_on_a_grid_of_the_type_come_back_but_for_scales_in_float16(name):
    draw = torch.Generator().manual_seed(1)
    low, high = {"Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}[name]
    values = torch.randint(low, high + 1, (8, 512), generator=draw).float() / 64
    if name == "Q6_K":
        values.view(8, -1, 16)[..., 0] = low / 64  # each block reaches the end of its grid, whose sign is that of -128
    else:
        values.view(8, -1, 32)[..., 0] = high / 64
    error = (decoded(name, TYPES[name][0](values)) - values).abs().max()
    assert float(error) <= max(-low, high) / 64 * 2**-11


@pytest.mark.parametrize("name", TYPES)
def test_odd_values_are_encoded(name):
    draw = torch.Generator().manual_seed(2)
    values = torch.zeros(6, 256)
    values[1] = 1.0
    values[2, 5] = -3.0
    values[3] = torch.randn(256, generator=draw) * 1e-6
    values[4] = torch.randn(256, generator=draw) * 1e4
    values[5] = torch.randn(256, generator=draw) + 20
    back = decoded(name, TYPES[name][0](values))
    assert torch.equal(back[0], values[0])
    assert bool(back.isfinite().all())
    for row in (1, 2, 4, 5):
        assert tq.sqnr_db(values[row], back[row]) > 15
    transposed = torch.randn(256, 4, generator=draw).t()
    assert tq.sqnr_db(transposed, decoded(name, TYPES[name][0](transposed))) > 15


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 255), "255 columns"),
        (torch.full((1, 256), torch.nan), "finite"),
        (torch.full((1, 256), 1e6), "65504"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(name, values, message):
    with pytest.raises(tq.InputError, match=message):
        TYPES[name][0](values)
