"""What runs a network on a CPU, each built as its users would: Inductor, XNNPACK, ONNX Runtime, OpenVINO, and ours."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from candidates import QUANTIZERS, lower, quantize
from executorch.backends.transforms.duplicate_dynamic_quant_chain import DuplicateDynamicQuantChainPass
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from networks import Batch, Network
from torch.fx import GraphModule

import torchquant as tq
from torchquant.artifacts.program import Program
from torchquant.backends import executorch_xnnpack

__all__ = ["RUNTIMES", "Case", "Runtime", "set_threads"]

Run = Callable[[Batch], torch.Tensor]
FLOAT = "float"
BF16 = "bf16"


@dataclass
class Case:
    """One network at one batch size; `artefacts` holds what serves every thread count.

    Args:
        network: its calibration batches have the batch size.
        threads: for what is built next.
        folder: for the files of artefacts.
    """

    network: Network
    folder: Path
    threads: int = 1
    artefacts: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, build: Callable[[], Any]) -> Any:
        """`build()` the first time, then its result again."""
        if name not in self.artefacts:
            self.artefacts[name] = build()
        return self.artefacts[name]

    def quantized(self, key: str) -> GraphModule:
        """The network converted with one of `QUANTIZERS`, calibrated in batches of this case's size."""
        network = self.network
        build = lambda: quantize(QUANTIZERS[key], network.model, network.calibration)[0]  # noqa: E731
        converted: GraphModule = self.once(f"converted {key}", build)
        return converted

    def file(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A file that `write` makes the first time."""
        path = self.folder / name
        self.once(name, lambda: write(path))
        return path


@dataclass(frozen=True)
class Runtime:
    """A way to run the network: `build` returns the callable and its int8 coverage."""

    name: str
    build: Callable[[Case], tuple[Run, str]]
    cnn: bool = True
    transformer: bool = True


def set_threads(threads: int) -> None:
    """Threads of what torch and ExecuTorch load from now on; the other runtimes are told when built."""
    torch.set_num_threads(threads)
    _unsafe_reset_threadpool(threads)


# Inductor -----------------------------------------------------------------------------------------------------


def inductor_float(case: Case) -> tuple[Run, str]:
    """fp32 compiled with frozen weights."""
    return _compiled(case.network.model, case), FLOAT


def inductor_bf16(case: Case) -> tuple[Run, str]:
    """bf16 autocast compiled with frozen weights."""
    return _compiled(_Autocast(case.network.model).eval(), case), BF16


class _Autocast(torch.nn.Module):
    """The model in bf16 where autocast has it so, its output in fp32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: torch.Tensor = self.model(*inputs).float()
        return output


def inductor_torchao(case: Case, key: str = "torchao_x86") -> tuple[Run, str]:
    """torchao's flow: X86InductorQuantizer, convert_pt2e, torch.compile with frozen weights."""
    converted = case.quantized(key)
    return _compiled(converted, case), tq.report(converted).coverage


def _compiled(model: torch.nn.Module, case: Case) -> Run:
    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():  # as every later call must be
        compiled(*case.network.example)
    return _runner(compiled)


def _runner(call: Callable[..., Any]) -> Run:
    def run(batch: Batch) -> torch.Tensor:
        outputs = call(*batch)
        output: torch.Tensor = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        return output

    return run


def ours_x86(case: Case, key: str = "x86") -> tuple[Run, str]:
    """`inductor_x86.lower`."""
    return _runner(_lowered(case, key)), tq.report(case.quantized(key)).coverage


def _lowered(case: Case, key: str) -> Program:
    """Our artefact from the Quantizer `key` of ours."""
    program, refusal = case.once(
        f"lowered {key}", lambda: lower(QUANTIZERS[key].backend, case.quantized(key), case.network.example)
    )
    if refusal:
        print(f"  {key}: first refused: {refusal}", flush=True)
    if program is None:
        raise tq.LoweringError(refusal)
    return program


# XNNPACK ------------------------------------------------------------------------------------------------------


def xnnpack_float(case: Case) -> tuple[Run, str]:
    """A float .pte as ExecuTorch's documentation builds it."""
    example = case.network.example
    path = case.file("float.pte", lambda p: _plain_pte(torch.export.export(case.network.model, example), p))
    return _runner(executorch_xnnpack.load(path)), FLOAT


def xnnpack_upstream(case: Case, key: str = "et_xnnpack") -> tuple[Run, str]:
    """A .pte from ExecuTorch's own XNNPACKQuantizer."""
    converted = case.quantized(key)

    def build(path: Path) -> None:
        DuplicateDynamicQuantChainPass()(converted)
        _plain_pte(torch.export.export(converted, case.network.example), path)

    path = case.file(f"{key}.pte", build)
    return _runner(executorch_xnnpack.load(path)), tq.report(converted).coverage


def _plain_pte(exported: torch.export.ExportedProgram, path: Path) -> None:
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def ours_xnnpack(case: Case, key: str = "xnnpack") -> tuple[Run, str]:
    """`executorch_xnnpack.lower`, saved and loaded."""
    path = case.file(f"{key}-ours.pte", lambda p: _lowered(case, key).save(p))
    return _runner(executorch_xnnpack.load(path)), tq.report(case.quantized(key)).coverage


# ONNX Runtime -------------------------------------------------------------------------------------------------


def onnxruntime_float(case: Case) -> tuple[Run, str]:
    """ONNX Runtime on the float export."""
    return _onnx_session(_onnx_file(case), case), FLOAT


def onnxruntime_static(case: Case) -> tuple[Run, str]:
    """ONNX Runtime's static quantization: QDQ, uint8 activations, int8 weights per channel, min-max.

    Of a transformer the products alone: with every op, the range of the attention mask ruins the rest.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    def build(path: Path) -> None:
        options: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True, "weight_type": QuantType.QInt8}
        if case.network.transformer:
            options["op_types_to_quantize"] = ["MatMul", "Gemm"]
        quantize_static(_onnx_prepared(case), path, _OnnxReader(case), activation_type=QuantType.QUInt8, **options)

    path = case.file("static.onnx", build)
    return _onnx_session(path, case), _onnx_coverage(path)


def onnxruntime_dynamic(case: Case) -> tuple[Run, str]:
    """ONNX Runtime's dynamic quantization: int8 weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def build(path: Path) -> None:
        quantize_dynamic(_onnx_prepared(case), path, per_channel=True, weight_type=QuantType.QInt8)

    path = case.file("dynamic.onnx", build)
    return _onnx_session(path, case), _onnx_coverage(path)


def _onnx_file(case: Case) -> Path:
    import onnxscript  # noqa: F401  torch.onnx needs it; missing, it is named as the reason

    def write(path: Path) -> None:
        with _quiet():
            torch.onnx.export(case.network.model, case.network.example, path, dynamo=True, external_data=False)

    return case.file("float.onnx", write)


def _onnx_prepared(case: Case) -> Path:
    from onnxruntime.quantization import quant_pre_process

    source = _onnx_file(case)
    return case.file("prepared.onnx", lambda p: quant_pre_process(source, p, skip_symbolic_shape=True))


class _OnnxReader:
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, case: Case) -> None:
        self._batches = iter(case.network.calibration)
        self._names = _onnx_inputs(case)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else _named(self._names, batch)


def _named(names: list[str], batch: Batch) -> dict[str, Any]:
    return {name: t.numpy() for name, t in zip(names, batch, strict=True)}


def _onnx_inputs(case: Case) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(_onnx_file(case)).graph.input]


def _onnx_session(path: Path, case: Case) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda batch: torch.from_numpy(session.run(None, _named(names, batch))[0])


def _onnx_coverage(path: Path) -> str:
    """Products with integer inputs of all products."""
    import onnx

    nodes = onnx.load(path).graph.node
    dequantized = {o for n in nodes if n.op_type == "DequantizeLinear" for o in n.output}
    integer = sum(n.op_type in ("MatMulInteger", "ConvInteger") for n in nodes)
    products = [n for n in nodes if n.op_type in ("Conv", "Gemm", "MatMul")]
    fused = sum(set(n.input[:2]) <= dequantized for n in products)
    return f"{integer + fused}/{integer + len(products)}"


# OpenVINO -----------------------------------------------------------------------------------------------------


def openvino_float(case: Case) -> tuple[Run, str]:
    """OpenVINO held to fp32 (its default computes in bf16 where the CPU can)."""
    import openvino

    return _openvino(openvino.convert_model(_onnx_file(case)), case, "f32"), FLOAT


def openvino_bf16(case: Case) -> tuple[Run, str]:
    """OpenVINO on the float model in bf16."""
    import openvino

    return _openvino(openvino.convert_model(_onnx_file(case)), case, "bf16"), BF16


def openvino_int8(case: Case) -> tuple[Run, str]:
    """OpenVINO after `nncf.quantize`; what is not int8 runs in OpenVINO's default precision, bf16 where the CPU can."""
    import nncf
    import openvino

    def build() -> Any:
        kind = {"model_type": nncf.ModelType.TRANSFORMER} if case.network.transformer else {}
        batches = [[t.numpy() for t in batch] for batch in case.network.calibration]
        with _quiet():
            source = openvino.convert_model(_onnx_file(case))
            return nncf.quantize(source, nncf.Dataset(batches), subset_size=len(batches), **kind)

    model = case.once("nncf", build)
    return _openvino(model, case), _openvino_coverage(model)


def _openvino(model: Any, case: Case, precision: str | None = None) -> Run:
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.compile_model(model, "CPU", options)
    return lambda batch: torch.from_numpy(compiled([t.numpy() for t in batch])[0].copy())


def _openvino_coverage(model: Any) -> str:
    """Products whose data input is quantized, of all products."""
    products = [
        n for n in model.get_ordered_ops() if n.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
    ]
    return f"{sum(_behind_views(n).get_type_name() == 'FakeQuantize' for n in products)}/{len(products)}"


def _behind_views(node: Any) -> Any:
    source = node.input_value(0).get_node()
    while source.get_type_name() in ("Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    return source


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor log lines below errors."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logging.disable(logging.NOTSET)


RUNTIMES: dict[str, Runtime] = {
    "inductor_fp32": Runtime("Inductor fp32, frozen", inductor_float),
    "inductor_bf16": Runtime("Inductor bf16", inductor_bf16),
    "inductor_torchao": Runtime("Inductor int8, torchao X86InductorQuantizer", inductor_torchao),
    "inductor_torchao_dynamic": Runtime(
        "Inductor int8 dynamic, torchao X86InductorQuantizer",
        lambda case: inductor_torchao(case, "torchao_x86_dynamic"),
        cnn=False,
    ),
    "x86": Runtime("torchquant inductor_x86 static", ours_x86),
    "x86_dynamic": Runtime("torchquant inductor_x86 dynamic", lambda case: ours_x86(case, "x86_dynamic"), cnn=False),
    "xnnpack_fp32": Runtime("ExecuTorch XNNPACK fp32", xnnpack_float),
    "xnnpack_upstream": Runtime("ExecuTorch XNNPACK int8, its XNNPACKQuantizer", xnnpack_upstream, transformer=False),
    "xnnpack_upstream_dynamic": Runtime(
        "ExecuTorch XNNPACK int8 dynamic, its XNNPACKQuantizer",
        lambda case: xnnpack_upstream(case, "et_xnnpack_dynamic"),
        cnn=False,
    ),
    "xnnpack": Runtime("torchquant executorch_xnnpack", ours_xnnpack),
    "xnnpack_static": Runtime(
        "torchquant executorch_xnnpack static", lambda case: ours_xnnpack(case, "xnnpack_static"), cnn=False
    ),
    "ort_fp32": Runtime("ONNX Runtime fp32", onnxruntime_float),
    "ort_static": Runtime("ONNX Runtime int8 static", onnxruntime_static),
    "ort_dynamic": Runtime("ONNX Runtime int8 dynamic", onnxruntime_dynamic, cnn=False),
    "openvino_fp32": Runtime("OpenVINO fp32", openvino_float),
    "openvino_bf16": Runtime("OpenVINO bf16", openvino_bf16),
    "openvino_int8": Runtime("OpenVINO int8, NNCF", openvino_int8),
}
