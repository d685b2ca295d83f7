"""TensorRT's rules for explicitly quantized models, checked on a file: rules checked, not run.

NVIDIA, "TensorRT Developer Guide: Working with Quantized Types". TensorRT itself is needed to build an engine, and
torchquant has never run one of these files in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchquant.backends.onnx_qdq.packages import runtime_package
from torchquant.errors import ArtifactError
from torchquant.files.whole import reading

__all__ = ["Violation", "check"]

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_BLOCKS = {"INT4": (64, 128), "FLOAT4E2M1": (16,)}
_TYPES = ("INT8", "FLOAT8E4M3FN", *_BLOCKS)
_DYNAMIC = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class Violation:
    """What TensorRT would refuse or run in float: the node, and the rule that it breaks."""

    node: str
    rule: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}"


def check(path: str | os.PathLike[str]) -> tuple[Violation, ...]:
    """The rules that a saved model breaks; empty if it follows them all. That is no proof: TensorRT is not run.

    Raises:
        ArtifactError: no such file, or not an ONNX model. MissingDependencyError: the extra `onnx` is not installed.
    """
    onnx, file = runtime_package().onnx, Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    with reading(file, "an ONNX model"):
        model = onnx.load(str(file))
        return tuple(_Rules(onnx, model).violations())


class _Rules:
    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.graph = onnx, model.graph
        self.stored = {t.name: t for t in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def violations(self) -> Iterator[Violation]:
        for node in self.graph.node:
            name = node.name or node.output[0]
            if node.op_type in _DYNAMIC:
                yield Violation(name, f"{node.op_type}: scales are to be known before run time")
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield from (Violation(name, rule) for rule in self._of_codes(node))
            elif node.op_type in _PRODUCTS:
                yield from (Violation(name, rule) for rule in self._of_product(node))

    def _of_codes(self, node: Any) -> Iterator[str]:
        kind = self._type_of(node)
        if kind not in _TYPES:
            yield f"codes are {kind}, and TensorRT takes {', '.join(_TYPES)}"
        zeros = self._value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zeros is not None and bool(np.any(zeros.astype(np.float32))):
            yield "a zero point is not 0"
        scales = self._value(node.input[1])
        if scales is None:
            yield "its scale is computed at run time"
        elif not np.all(scales.astype(np.float32) > 0):
            yield "a scale is not positive"
        block = next((a.i for a in node.attribute if a.name == "block_size"), 0)
        if block and block not in _BLOCKS.get(kind, ()):
            yield f"blocks of {block} {kind} codes, and TensorRT takes blocks of " + (
                ", ".join(map(str, _BLOCKS.get(kind, ()))) or "none"
            )
        elif kind in _BLOCKS and not block:
            yield f"{kind} codes are to have a scale for each block"
        is_activation = node.op_type == "QuantizeLinear" or node.input[0] not in self.stored
        if is_activation and scales is not None and scales.size != 1:
            yield "an activation has more than one scale"

    def _of_product(self, node: Any) -> Iterator[str]:
        x, weight = (self.makers.get(name) for name in node.input[:2])
        decoded = [n is not None and n.op_type == "DequantizeLinear" for n in (x, weight)]
        if decoded[0] and not decoded[1]:
            yield "its input has codes, and its weight has none"
        if decoded[1] and not decoded[0] and weight is not None and self._type_of(weight) not in _BLOCKS:
            yield "its weight has codes of 8 bits, and its input has none"

    def _type_of(self, node: Any) -> str:
        """The type of the codes that a node makes or reads."""
        source = node.input[2] if len(node.input) > 2 and node.input[2] else node.input[0]
        if source in self.stored:
            return str(self.onnx.TensorProto.DataType.Name(self.stored[source].data_type))
        maker = self.makers.get(node.input[0])
        if node.op_type == "DequantizeLinear" and maker is not None and maker.op_type == "QuantizeLinear":
            return self._type_of(maker)
        return "UINT8"  # what QuantizeLinear makes without a zero point

    def _value(self, name: str) -> np.ndarray[Any, Any] | None:
        return np.asarray(self.onnx.numpy_helper.to_array(self.stored[name])) if name in self.stored else None
