"""Codes side by side: nothing is lost, and nothing is wasted."""

import pytest
import torch

from torchquant.formats.packed import bits_of, pack_codes, unpack_codes


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (16, 64), (2, 3, 7)])
@pytest.mark.parametrize(("dtype", "low"), [(torch.int8, -64), (torch.int8, 0), (torch.uint8, 0), (torch.int8, -128)])
def test_codes_come_back_from_their_bytes(bits, shape, dtype, low):
    codes = (torch.randint(0, 2**bits, shape) + low).to(dtype)
    packed = pack_codes(codes, bits, low)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-codes.numel() // 8) * bits)
    back = unpack_codes(packed, bits, low, shape, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, codes)


def test_the_op_is_known_to_tracing():
    packed = pack_codes(torch.arange(-8, 8, dtype=torch.int8), 4, -8)
    arguments = (packed, 4, -8, [4, 4], torch.int8)
    torch.library.opcheck(torch.ops.torchquant.unpack_codes.default, arguments)
    torch.library.opcheck(torch.ops.torchquant.widen.default, (torch.rand(3).half(), torch.float32))


def test_bits_are_as_many_as_the_codes_need():
    assert [bits_of(*r) for r in ((-8, 7), (-7, 7), (0, 15), (-2, 1), (-1, 1), (-127, 127))] == [4, 4, 4, 2, 2, 8]
