"""A rewritten graph as an ONNX model: torch's exporter, then codes of few bits, names, and the least opset."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from torchquant.artifacts.serialize import export_again
from torchquant.backends.onnx_qdq.dialect import OPS, translations
from torchquant.backends.onnx_qdq.packages import exporting_packages
from torchquant.backends.onnx_qdq.rewriting import rewrite
from torchquant.errors import LoweringError, TorchquantError
from torchquant.fx import ops, passes
from torchquant.fx.sites import marked

__all__ = ["Exported", "to_onnx"]

_PLAIN, _BLOCKS, _TWO_BITS = 18, 21, 25  # opsets: the exporter's least; with 4 bits, blocks and 16 bits; with 2 bits
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "MatMulInteger", "Gemm", "Gather")
_IR_VERSIONS = {_PLAIN: 8, _BLOCKS: 10, _TWO_BITS: 13}


@dataclass(frozen=True)
class Exported:
    """An ONNX model.

    Args:
        model: an `onnx.ModelProto`, whose products bear the names of their sites.
        opset: of the operators' own domain.
        sites: name of a node or of its result -> the site that it was written for.
    """

    model: Any
    opset: int
    sites: Mapping[str, str]


def to_onnx(graph: GraphModule, tensors: Sequence[torch.Tensor]) -> Exported:
    """Write a converted graph, a pure function of tensors, as an ONNX model.

    Args:
        graph: as `fx.flat` makes it: its inputs are those of the model, then its state.
        tensors: one batch and state.

    Raises:
        MissingDependencyError: the extra is not installed.
        LoweringError: the exporter cannot write it.
    """
    packages = exporting_packages()
    twin = passes.copy_graph(graph)
    rewrite(twin)
    opset = _opset_for(twin)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                export_again(twin, tuple(tensors)),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations(packages.opset),
            )
        assert program is not None
        assert program.exported_program is not None
        model = program.model_proto
    except TorchquantError:
        raise
    except Exception as error:
        raise LoweringError(f"onnx_qdq: torch cannot write the graph as ONNX: {_causes(error)}") from error
    sources = {n.name: n for n in program.exported_program.graph.nodes}
    return Exported(model, opset, _finish(packages.onnx, model, sources, opset))


def _opset_for(graph: GraphModule) -> int:
    """The least opset with what the graph writes."""
    needed = _PLAIN
    for node in graph.graph.nodes:
        if node.target is OPS.dequantize.default:
            block, bits = node.args[4:6]
            needed = max(needed, _TWO_BITS if bits == 2 else _BLOCKS if block or bits else _PLAIN)
        if node.op == "get_attr" and _dtype_of(graph, node) in (torch.int16, torch.uint16, torch.float8_e4m3fn):
            needed = max(needed, _BLOCKS)
    return needed


def _dtype_of(graph: GraphModule, node: Node) -> torch.dtype | None:
    value = ops.constant_value(graph, node) if ops.is_constant(node) else None
    return None if value is None else value.dtype


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that nobody asked for, and torch of its own pytrees."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _causes(error: BaseException) -> str:
    """The innermost causes of an error, which say more than the exporter's own text."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {str(cause).strip()[:600]}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "; of ".join(reversed(texts[-3:]))


# what is done to the model ------------------------------------------------------------------------------------------


def _finish(onnx: Any, model: Any, sources: Mapping[str, Node], opset: int) -> dict[str, str]:
    """Names, types of few bits and versions; without stack traces. Returns what was written for which site."""
    written: dict[str, str] = {}
    results: dict[str, str] = {}
    narrow = _Narrow(onnx, model)
    taken: dict[str, int] = {}
    for node in model.graph.node:
        source = sources.get(_scope_of(node))
        if node.op_type == "DequantizeLinear" and source is not None and source.target is OPS.dequantize.default:
            narrow.read_by(node, int(source.args[5]))  # type: ignore[arg-type]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _strip_attributes(node)
        if site := "" if source is None else marked(source):
            if node.op_type in _PRODUCTS:
                number = taken[site] = taken.get(site, 0) + 1
                node.name = site if number == 1 else f"{site}.{number}"
            results |= dict.fromkeys(node.output, site)
            written[node.name] = site
        del node.metadata_props[:]
        node.doc_string = ""
    narrow.drop_unread()
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.name, model.graph.doc_string = "torchquant", ""
    model.producer_name, model.producer_version, model.doc_string = "torchquant", "", ""
    model.ir_version = _IR_VERSIONS[opset]
    for entry in [o for o in model.opset_import if o.domain]:
        if not any(n.domain == entry.domain for n in model.graph.node):
            model.opset_import.remove(entry)
    return {**results, **written}  # where a node has the name of another's result, OpenVINO means the node


def _scope_of(node: Any) -> str:
    """The node of the exported program that an ONNX node was made for."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    try:
        return str(json.loads(text.replace("'", '"'))[-1])
    except (ValueError, IndexError):
        return ""


def _strip_attributes(node: Any) -> None:
    """Without the attributes of later opsets, and of no meaning."""
    blocks = any(a.name == "block_size" and a.i for a in node.attribute)
    kept = [a for a in node.attribute if a.name == "axis" or (a.name == "block_size" and blocks)]
    del node.attribute[:]
    node.attribute.extend(kept)


class _Narrow:
    """Stored codes as int4, uint4, int2 or uint2: torch has no tensors of them that the exporter takes."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.graph = onnx, model.graph
        self._stored = {t.name: t for t in model.graph.initializer}
        self._made: dict[tuple[str, int], str] = {}

    def read_by(self, node: Any, bits: int) -> None:
        """Let a DequantizeLinear read its codes and zero points in so many bits; 0: as they are."""
        for position in (0, 2) if bits else ():
            if position < len(node.input) and node.input[position] in self._stored:
                node.input[position] = self._narrowed(node.input[position], bits)

    def _narrowed(self, name: str, bits: int) -> str:
        if (name, bits) not in self._made:
            tensor = self._stored[name]
            codes = self.onnx.numpy_helper.to_array(tensor)
            kind = f"{'U' if codes.dtype == np.uint8 else ''}INT{bits}"
            new = self.graph.initializer.add()
            new.name, new.data_type = f"{name}_{kind.lower()}", getattr(self.onnx.TensorProto, kind)
            new.dims.extend(tensor.dims)
            new.raw_data = _packed(codes, bits)
            self._made[name, bits] = new.name
        return self._made[name, bits]

    def drop_unread(self) -> None:
        """Delete the bytes that nothing reads any more, and what was said of their type."""
        read = {name for node in self.graph.node for name in node.input} | {o.name for o in self.graph.output}
        for name in [old for old, _ in self._made if old not in read and old in self._stored]:
            self.graph.initializer.remove(self._stored.pop(name))
            for info in [v for v in self.graph.value_info if v.name == name]:
                self.graph.value_info.remove(info)


def _packed(codes: np.ndarray[Any, Any], bits: int) -> bytes:
    """Codes in bytes, the first in the lowest bits, as ONNX stores them."""
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.uint8) & ((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    whole = np.zeros(len(flat), np.uint8)
    for i in range(each):
        whole |= flat[:, i] << (bits * i)
    return whole.tobytes()
