"""A decoder over a static cache as a mobile program."""

import torch
from decoders import Own

import torchquant as tq
from torchquant.backends import executorch_xnnpack
from torchquant.quantizers import XnnpackQuantizer


def test_a_decoder_is_lowered_with_its_cache_and_generates_what_its_graph_does(tmp_path):
    example = (torch.randint(0, 50, (1, 6)), torch.arange(6), torch.arange(6))
    options = {"quantizer": XnnpackQuantizer(), "algorithms": (), "progress": False}
    quantized = tq.quantize(Own.exported(), example, [example], **options)
    program = executorch_xnnpack.lower(quantized, example, progress=False)
    wanted = tq.generate(quantized, [4, 9, 2], 10)
    assert torch.equal(tq.generate(program, [4, 9, 2], 10), wanted)
    loaded = executorch_xnnpack.load(program.save(tmp_path / "decoder.pte"))
    assert all(not v.any() for v in loaded.state.values())
    assert torch.equal(tq.generate(loaded, [4, 9, 2], 10), wanted)
