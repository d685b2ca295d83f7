"""A number format of one's own, in one file: NF4, a codebook of 16 values with a scale for each group of 64 weights.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, appendix E: the
values are quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributions import Normal

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.formats.encoded import EncodedFormat
from torchquant.lowering.target import Target
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Format, Scheme, TensorSpec


def normal_quantiles() -> torch.Tensor:
    """Seven below zero, zero, and eight above, from -1 to 1."""
    offset = 0.5 * (1 / 32 + 1 / 30)  # of the outermost quantiles from probability 0 and 1
    above = Normal(0, 1).icdf(torch.linspace(1 - offset, 0.5, 9))[:-1]
    below = -Normal(0, 1).icdf(torch.linspace(1 - offset, 0.5, 8))[:-1]
    values = torch.cat([below, torch.zeros(1), above]).sort().values
    return values / values.abs().max()


@dataclass(frozen=True)
class CodebookFormat(EncodedFormat):
    """Each weight is the nearest of 16 values times its group's largest magnitude; two codes to a byte."""

    def encode(self, cells: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = cells.abs().amax(1, keepdim=True).clamp(min=1e-12)
        codes = (cells / scale).unsqueeze(-1).sub(normal_quantiles()).abs().argmin(-1).to(torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale.half()

    def decode(self, *stored: torch.Tensor) -> torch.Tensor:
        codes, scale = stored
        pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        return normal_quantiles()[pairs.long()] * scale.float()


NF4 = CodebookFormat("nf4", torch.uint8, 0, 15)
INT3 = Format("int3", torch.int8, -4, 3)  # an affine grid needs no code at all
SCHEMES = {
    "nf4": Scheme("nf4", None, TensorSpec(NF4, symmetric=True, granularity="group", group_size=64)),
    "int3": Scheme("int3", None, TensorSpec(INT3, symmetric=True, granularity="group", group_size=64)),
}


class WeightOnly(CapabilityQuantizer):
    """Linears in whichever of the two, for no target in particular."""

    target = Target("weights", "", "", "", SCHEMES, (Capability("linear", tuple(SCHEMES), "weighted"),))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()
    x = torch.randn(32, 128)
    for name, algorithms in (("int3", []), ("int3", [tq.AdaRound()]), ("nf4", [tq.AdaRound()]), ("nf4", [])):
        try:
            graph = tq.quantize(model, x, [x], quantizer=WeightOnly(name), algorithms=algorithms, progress=False)
        except tq.SchemeError as error:
            print(f"{name} with AdaRound is refused: {error}")
            continue
        bits = SCHEMES[name].weight.format.bits_per_weight(64)
        used = ", ".join(type(a).__name__ for a in algorithms) or "round to nearest"
        print(f"{name}, {used}: {bits} bits a weight, {tq.compare(model, graph, [x]).sqnr_db:.1f} dB on the same batch")
    print(tq.report(graph))
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(tq.load(tq.save(graph, Path(folder) / "nf4.pt2"))(x), graph(x))
    try:
        inductor_x86.lower(graph, x)
    except tq.LoweringError as error:
        print(f"x86: {error}")
