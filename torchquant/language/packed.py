"""Codes in words of 32 bits as checkpoints of transformers and vLLM lay them out; each layout in both directions.

Legend: codes and zero points are unsigned here, `codes (outputs, inputs)`, `zero_point` and `scale (outputs,
groups)`; a weight is `(codes - zero_point) * scale`.

- compressed-tensors, `pack-quantized`: rows of codes as one stream of bits; zero points likewise down the columns.
  https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized
- GPTQ: streams down the inputs; zero points along the outputs, less one in the first version of the format.
  https://github.com/AutoGPTQ/AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py
- AWQ, version gemm: streams along the outputs, of which each eight are in the order 0, 2, 4, 6, 1, 3, 5, 7.
  https://github.com/mit-han-lab/llm-awq, and AutoAWQ, modules/linear/gemm.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Codes", "PackedLayout", "pack_bits", "unpack_bits"]

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """A weight in unsigned codes: see the legend above.

    Args:
        bits: of a field; codes and zero points are below 2 ** bits.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def values(self) -> Tensor:
        """float32 (outputs, inputs)."""
        inputs, groups = self.codes.shape[1], self.scale.shape[1]
        scale, zero_point = (part.repeat_interleave(inputs // groups, 1) for part in (self.scale, self.zero_point))
        return (self.codes.float() - zero_point.float()) * scale.float()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers (rows, n) as int32 (rows, ceil(n bits / 32)): the first in the lowest bits, none left out."""
    rows, n = values.shape
    padded = torch.nn.functional.pad(values.to(torch.int64), (0, -n % _WORD)).view(rows, -1, _WORD)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64)
    for i in range(_WORD):
        word, place = divmod(i * bits, _WORD)
        words[..., word] |= padded[..., i] << place
        if place + bits > _WORD:
            words[..., word + 1] |= padded[..., i] >> (_WORD - place)
    words &= 0xFFFFFFFF
    signed = words - ((words >> 31) << 32)
    return signed.to(torch.int32).flatten(1)[:, : -(-n * bits // _WORD)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The uint8 (rows, n) that `pack_bits` was given; raises ValueError if there are other numbers of words."""
    rows, count = packed.shape
    if count != -(-n * bits // _WORD):
        raise ValueError(f"{count} words a row for {n} fields of {bits} bits")
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, -count % bits)).view(rows, -1, bits)
    values = torch.empty(rows, words.shape[1], _WORD, dtype=torch.uint8)
    for i in range(_WORD):
        word, place = divmod(i * bits, _WORD)
        field = words[..., word] >> place
        if place + bits > _WORD:
            field = field | words[..., word + 1] << (_WORD - place)
        values[..., i] = (field & (2**bits - 1)).to(torch.uint8)
    return values.flatten(1)[:, :n]


@dataclass(frozen=True)
class PackedLayout:
    """How a weight of a checkpoint is stored.

    Args:
        parts: names of its tensors, without the module's.
        pack: of the codes, and whether zero points are half of the grid everywhere, the tensors by these names.
        unpack: the reverse, of bits; raises ValueError where sizes do not fit each other.
        optional: parts that a weight may be without.
    """

    parts: tuple[str, ...]
    pack: Callable[[Codes, bool], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], int], Codes]
    optional: tuple[str, ...] = ()


# compressed-tensors --------------------------------------------------------------------------------------------------


def _pack_stream(weight: Codes, is_symmetric: bool) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack_bits(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero_point.t(), weight.bits).t().contiguous()
    return tensors


def _unpack_stream(tensors: Mapping[str, Tensor], bits: int) -> Codes:
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    _require(tensors["weight_shape"], (2,), None)
    outputs, inputs = map(int, tensors["weight_shape"].tolist())
    _require(packed, (outputs, -(-inputs * bits // _WORD)), torch.int32)
    groups = _groups(scale, (outputs, None), inputs)
    zero_point = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        _require(stored, (-(-outputs * bits // _WORD), groups), torch.int32)
        zero_point = unpack_bits(stored.t(), bits, outputs).t()
    codes = Codes(unpack_bits(packed, bits, inputs), scale, zero_point, bits)
    return _ordered(codes, tensors.get("weight_g_idx"))


# GPTQ ----------------------------------------------------------------------------------------------------------------


def _pack_gptq(less: int) -> Callable[[Codes, bool], dict[str, Tensor]]:
    def pack(weight: Codes, is_symmetric: bool) -> dict[str, Tensor]:
        inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
        return {
            "qweight": pack_bits(weight.codes, weight.bits).t().contiguous(),
            "qzeros": pack_bits(weight.zero_point.t().to(torch.int64) - less, weight.bits),
            "scales": weight.scale.t().contiguous(),
            "g_idx": (torch.arange(inputs) // (inputs // groups)).to(torch.int32),
        }

    return pack


def _unpack_gptq(less: int) -> Callable[[Mapping[str, Tensor], int], Codes]:
    def unpack(tensors: Mapping[str, Tensor], bits: int) -> Codes:
        packed, scale = tensors["qweight"], tensors["scales"]
        _require(packed, (None, None), torch.int32)
        inputs, outputs = packed.shape[0] * _WORD // bits, packed.shape[1]
        groups = _groups(scale.t(), (outputs, None), inputs)
        _require(tensors["qzeros"], (groups, -(-outputs * bits // _WORD)), torch.int32)
        zeros = unpack_bits(tensors["qzeros"], bits, outputs).to(torch.int16) + less
        codes = Codes(unpack_bits(packed.t(), bits, inputs), scale.t(), zeros.t(), bits)
        return _ordered(codes, tensors.get("g_idx"))

    return unpack


# AWQ -----------------------------------------------------------------------------------------------------------------


def _interleaved(values: Tensor) -> Tensor:
    rows = values.view(len(values), -1, len(_AWQ_ORDER))
    return rows[..., torch.tensor(_AWQ_ORDER)].flatten(1)


def _straight(values: Tensor) -> Tensor:
    rows = values.reshape(len(values), -1, len(_AWQ_ORDER))
    return rows[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _pack_awq(weight: Codes, is_symmetric: bool) -> dict[str, Tensor]:
    return {
        "qweight": pack_bits(_interleaved(weight.codes.t().contiguous()), weight.bits),
        "qzeros": pack_bits(_interleaved(weight.zero_point.t().contiguous()), weight.bits),
        "scales": weight.scale.t().contiguous(),
    }


def _unpack_awq(tensors: Mapping[str, Tensor], bits: int) -> Codes:
    packed, scale = tensors["qweight"], tensors["scales"]
    _require(packed, (None, None), torch.int32)
    inputs, outputs = packed.shape[0], packed.shape[1] * _WORD // bits
    groups = _groups(scale.t(), (outputs, None), inputs)
    _require(tensors["qzeros"], (groups, packed.shape[1]), torch.int32)
    codes, zeros = (_straight(unpack_bits(tensors[name], bits, outputs)).t() for name in ("qweight", "qzeros"))
    return Codes(codes, scale.t(), zeros, bits)


# all -----------------------------------------------------------------------------------------------------------------


def _require(tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None) -> None:
    """Raise ValueError unless a tensor is so; sizes and dtypes of None may be any, of integers."""
    fits = len(shape) == tensor.ndim and all(a in (None, b) for a, b in zip(shape, tensor.shape, strict=True))
    if not fits or (tensor.dtype.is_floating_point if dtype is None else tensor.dtype != dtype):
        raise ValueError(f"a tensor of {tuple(tensor.shape)} {tensor.dtype} where {shape} {dtype or 'integers'} fits")


def _ordered(weight: Codes, order: Tensor | None) -> Codes:
    """The weight where `order` (inputs,) says which group each input belongs to; raises ValueError for others."""
    inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
    if order is None:
        return weight
    _require(order, (inputs,), None)
    order = order.to(torch.int64)
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise ValueError(f"groups {int(order.min())} to {int(order.max())} where there are {groups}")
    if torch.equal(order, torch.arange(inputs) // (inputs // groups)):
        return weight
    return replace(weight, scale=weight.scale[:, order], zero_point=weight.zero_point[:, order])


def _groups(scale: Tensor, shape: tuple[int | None, ...], inputs: int) -> int:
    """How many scales a row has; raises ValueError where they are no floats or divide the inputs in no whole groups."""
    fits = scale.ndim == 2 and scale.shape[0] == shape[0] and scale.dtype.is_floating_point
    if not fits or not 0 < scale.shape[1] <= inputs or inputs % scale.shape[1]:
        raise ValueError(f"scales of {tuple(scale.shape)} {scale.dtype} for {shape[0]} outputs and {inputs} inputs")
    return scale.shape[1]


_ORDER = "weight_g_idx"
_PARTS = ("qweight", "qzeros", "scales")
LAYOUTS = {
    "pack-quantized": PackedLayout(
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", _ORDER),
        _pack_stream,
        _unpack_stream,
        ("weight_zero_point", _ORDER),
    ),
    "gptq": PackedLayout((*_PARTS, "g_idx"), _pack_gptq(1), _unpack_gptq(1), ("g_idx",)),
    "gptq_v2": PackedLayout((*_PARTS, "g_idx"), _pack_gptq(0), _unpack_gptq(0), ("g_idx",)),
    "gemm": PackedLayout(_PARTS, _pack_awq, _unpack_awq),
}
