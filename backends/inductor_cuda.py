"""NVIDIA GPUs: packed weights and int8 or float8 products as opaque ops of ours, the rest compiled by Inductor."""

from __future__ import annotations

import math
import operator
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from torchquant import archive, dynamo
from torchquant import batches as data
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.files import write_whole
from torchquant.formats import FLOAT8, INT4, INT8, INT8_NARROW
from torchquant.fx import ops, passes
from torchquant.fx.flat import flat
from torchquant.fx.windows import window_of
from torchquant.lowering import accountable_sites, left_float
from torchquant.ops.gpu.rewriting import OPS, rewrite
from torchquant.owned import OwnFolder
from torchquant.program import Metadata, Program, Proof, State, metadata_from, write_metadata
from torchquant.proof import cases_of, hold_against
from torchquant.serialize import export_again, graph_in
from torchquant.surroundings import own_modes, unchanged
from torchquant.types import FLOAT_RANGE, Capability, Scheme, Site, TensorSpec
from torchquant.verify import Comparison

__all__ = ["CAPABILITIES", "SCHEMES", "TARGET", "CudaProgram", "dynamo_backend", "load", "lower", "transform"]

TARGET = "inductor_cuda"
_INT8_CHANNEL = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
_INT8_TOKEN = TensorSpec(INT8_NARROW, symmetric=True, granularity="token", dynamic=True)
_FLOAT8_CHANNEL = TensorSpec(FLOAT8, symmetric=True, granularity="channel")
_FLOAT8_TOKEN = TensorSpec(FLOAT8, symmetric=True, granularity="token", dynamic=True)
_FLOAT8_TENSOR = TensorSpec(FLOAT8, symmetric=True)
_FLOAT8_DYNAMIC = TensorSpec(FLOAT8, symmetric=True, dynamic=True)


def _int4(group_size: int, symmetric: bool) -> TensorSpec:
    return TensorSpec(INT4, symmetric=symmetric, granularity="group", group_size=group_size)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a16", None, _int4(128, symmetric=True)),
        Scheme("w4a16_g64", None, _int4(64, symmetric=True)),
        Scheme("w4a16_g32", None, _int4(32, symmetric=True)),
        Scheme("w4a16_asymmetric", None, _int4(128, symmetric=False)),
        Scheme("w4a16_asymmetric_g64", None, _int4(64, symmetric=False)),
        Scheme("w4a16_asymmetric_g32", None, _int4(32, symmetric=False)),
        Scheme("w8a16", None, _INT8_CHANNEL),
        Scheme("dynamic_int8", _INT8_TOKEN, _INT8_CHANNEL),
        Scheme("static_int8", TensorSpec(INT8, symmetric=False), _INT8_CHANNEL),
        Scheme("dynamic_fp8", _FLOAT8_TOKEN, _FLOAT8_CHANNEL),
        Scheme("dynamic_fp8_tensor", _FLOAT8_DYNAMIC, _FLOAT8_TENSOR),
        Scheme("static_fp8", _FLOAT8_TENSOR, _FLOAT8_CHANNEL),
        Scheme("static_fp8_tensor", _FLOAT8_TENSOR, _FLOAT8_TENSOR),
    )
}

_NO_CONVOLUTION = "neither torch nor torchquant has an int8 or float8 kernel of this convolution for GPUs"
_TWO_ACTIVATIONS = "it multiplies two activations; float16 and bfloat16 run on tensor cores as they are"
_FLOAT = {
    "conv3d": _NO_CONVOLUTION,
    "conv_transpose1d": _NO_CONVOLUTION,
    "conv_transpose2d": _NO_CONVOLUTION,
    "conv_transpose3d": _NO_CONVOLUTION,
    "matmul": _TWO_ACTIVATIONS,
    "addmm": _TWO_ACTIVATIONS,
    "einsum": _TWO_ACTIVATIONS,
    "attention": "attention runs in its own float kernel",
    "embedding": "a lookup reads a few rows of its table only, so there is nothing to gain",
    "bilinear": "it multiplies two activations; there is no int8 or float8 kernel for it",
    "recurrent": "there is no int8 or float8 kernel for recurrent layers",
}
_ELEMENTWISE = "in float, fused by Inductor"


def _whole_groups(node: Node, scheme: str) -> str | None:
    """The input axis must be whole groups."""
    weight, shape = SCHEMES[scheme].weight, ops.shape_of(node.args[1])  # type: ignore[arg-type]
    size = weight.group_size if weight is not None else None
    if size is None or shape is None or shape[1] % size == 0:
        return None
    return f"its {shape[1]} input features are no multiple of the group size {size} nor of 32; choose w8a16"


def _has_kernel(node: Node, scheme: str) -> str | None:
    """A convolution of one group multiplies codes by codes; with weights alone only where it is a matrix product."""
    kernel, image = (ops.shape_of(n) for n in node.args[:2][::-1])  # type: ignore[arg-type]
    if kernel is None or image is None or len(image) != len(kernel):
        return "its input has no batch dimension"
    if ops.arguments(node).get("groups", 1) != 1:
        return "a grouped convolution is bound by memory, and no matrix product"
    if SCHEMES[scheme].activation is None and not window_of(node, kernel[2:]).one_pixel:  # type: ignore[arg-type]
        return "only a matrix product (kernel size 1, no padding) has a kernel that unpacks weights: quantize both"
    return _whole_groups(node, scheme)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CALLS = {f"torchquant::{name}" for name in OPS}  # as the profiler names them
_UNPROVEN = Proof({}, 0, 0, Comparison(-math.inf, math.inf, 0.0), {})
_ALL = tuple(SCHEMES)
_DYNAMO_OPTIONS = {"allow_float", "min_sqnr_db", "device", "cuda_graphs", "freezing"}
_ONE_GROUP = "one group; kernel size 1 and no padding where weights alone are quantized"
CAPABILITIES: tuple[Capability, ...] = (
    Capability("linear", _ALL, "weighted", condition=_whole_groups, reason="whole groups of input features"),
    Capability("conv1d", _ALL, "weighted", condition=_has_kernel, reason=_ONE_GROUP),
    Capability("conv2d", _ALL, "weighted", condition=_has_kernel, reason=_ONE_GROUP),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
    *(Capability(k.name, reason=_ELEMENTWISE) for k in ops.KINDS if not (k.compute or k.moves)),
)


class CudaProgram(Program):
    """A graph of packed ops that `torch.compile` compiles at the first call, and again for sizes of another kind.

    Args:
        graph: from `transform`.
        about: its inputs, sites and proof.
        device: where it runs; inputs are moved there.
        settings: of Inductor, for this program alone.
    """

    target = TARGET

    def __init__(self, graph: GraphModule, about: Metadata, device: torch.device, settings: Mapping[str, Any]) -> None:
        self.graph, self.device, self.settings = _moved(graph, device), device, dict(settings)
        self._about = about
        self.inputs, self.sites, self.proof = about.signature.tensors, about.sites, about.proof
        self._state = State({name: value.to(device) for name, value in about.states.items()})
        self._run: Callable[..., Any] = torch.compile(self.graph, options=self.settings)
        self._compiled = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs)
        with own_modes() if self._compiled else unchanged(), torch.no_grad():
            found = self.run(*tensors, *self._state.values.values())
        self._compiled = True
        return self._finish(self._about, tensors, found)

    def run(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """The compiled graph on the tensors of the signature and the states; they are not changed."""
        shapes = [*(spec.shape for spec in self.inputs), *(v.shape for v in self._about.states.values())]
        placed = [self._placed(value, shape) for value, shape in zip(tensors, shapes, strict=True)]
        if not self.settings.get("triton.cudagraphs"):
            return tuple(self._run(*placed))
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(t.clone() for t in self._run(*placed))  # the next replay writes into the same memory

    def _placed(self, value: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
        """The tensor on the program's device, with the sizes that vary marked, so that they are compiled once."""
        value = value.detach().to(self.device)
        for axis, size in enumerate(shape):
            if size is None:
                torch._dynamo.maybe_mark_dynamic(value, axis)
        return value

    def prove(self, about: Metadata) -> None:
        """Keep what lowering found."""
        self._about, self.proof = about, about.proof

    @own_modes()
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph with its packed weights (`.pt2`); `load` reads it on any machine, with or without a GPU."""
        graph = _moved(self.graph, torch.device("cpu"))
        exported = export_again(graph, _example(graph, torch.device("cpu")))

        def write(part: Path) -> None:
            plain = part.with_suffix(".plain.pt2")
            torch.export.save(exported, plain)
            archive.compress(plain, part)
            plain.unlink()
            write_metadata(part, TARGET, self._about)

        return write_whole(path, write)

    @own_modes()
    def package(self, path: str | os.PathLike[str]) -> Path:
        """Compile ahead of time into an AOTInductor package (`.pt2`) for this device.

        It takes the tensors of the inputs by position and returns those of the outputs as a tuple; states, if the model
        has any, stand behind both. The package is code, a shared library that torch loads: run none whose writer you do
        not trust.

        `torch._inductor.aoti_load_package` runs it in Python once `torchquant.backends.inductor_cuda` is imported: the
        packed ops are called through torch's dispatcher, where that import puts them. A C++ process has to register ops
        of the same names and schemas (`torchquant::weight_only_linear`, `torchquant::scaled_linear`,
        `torchquant::scaled_conv2d`) itself, with `TORCH_LIBRARY`; Triton's kernels are not inside the package.

        Raises:
            LoweringError: Inductor cannot compile the graph.
        """
        exported = export_again(self.graph, _example(self.graph, self.device))
        settings = {k: v for k, v in self.settings.items() if k != "triton.cudagraphs"}

        def write(part: Path) -> None:
            with torch.no_grad(), OwnFolder("torchquant-cuda-") as folder:
                made = str(folder / "model.pt2")
                try:
                    torch._inductor.aoti_compile_and_package(exported, package_path=made, inductor_configs=settings)
                except Exception as error:
                    raise LoweringError(f"Inductor cannot compile the lowered graph: {str(error)[:2000]}") from error
                shutil.copyfile(made, part)

        return write_whole(path, write)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights, packed ones and float ones."""
        return passes.weight_bytes(self.graph)


@own_modes()
def transform(quantized: GraphModule, *, allow_float: Sequence[str] = ()) -> GraphModule:
    """The converted graph with each quantized linear and convolution as one op on packed weights; a new graph.

    It may be exported, compiled or run as it is, on any device. Linears that read the same values in the same way
    become one op; an addend and an activation behind a product are computed in its kernel. Codes that are multiplied by
    codes are stored in 8 bits, also where the Quantizer asked for fewer; codes that are multiplied by floats in 4 or 8.
    Where no kernel takes the grid of the activations (groups of weights behind int8 activations, 16 bits), they are
    rounded to it by ops in front.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        allow_float: patterns of annotated ops that shall run in float.

    Raises:
        InputError: the graph is not converted.
        LoweringError: an annotated op has no kernel: it names the op, its module, and what to do.
    """
    sites, allowed = accountable_sites(quantized, allow_float, CAPABILITIES)
    graph = passes.copy_graph(quantized)
    passes.make_float(graph, allowed)
    return _transform(graph, sites, allowed).graph


@dataclass(frozen=True)
class _Transformed:
    """`wanted`: sites that run in ops of ours, of which the graph has `count`; `allowed`: nodes that run in float."""

    graph: GraphModule
    sites: tuple[Site, ...]
    wanted: tuple[Site, ...]
    allowed: set[str]
    count: int


def _transform(graph: GraphModule, sites: tuple[Site, ...], allowed: set[str]) -> _Transformed:
    """`graph` itself, rewritten."""
    wanted = tuple(s for s in sites if s.status == "quantized" and s.compute and s.node not in allowed)
    passes.fill_expanded_numbers(graph)
    count = rewrite(graph, {s.node for s in wanted})
    left = [n.name for n in graph.graph.nodes if ops.is_dequantize(n) and _is_matrix(graph, n)]
    if left:
        raise LoweringError(f"dequantize ops of weights are left in the lowered graph: {', '.join(left)}")
    return _Transformed(graph, sites, wanted, allowed, count)


def _is_matrix(graph: GraphModule, node: Node) -> bool:
    return ops.is_constant(node) and ops.constant_value(graph, node).ndim > 1


@unchanged()
def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    device: str | torch.device | None = None,
    cuda_graphs: bool = False,
    freezing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> CudaProgram:
    """Pack the weights of a converted graph, compile it, run it, and prove that it calls our kernels.

    Sizes that were dynamic at export stay dynamic. No global setting of Inductor is changed.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.proof.hold_against` says.
        device: where it runs; the current GPU if None. "cpu" runs the kernels' references, as a check.
        cuda_graphs: record a call once and replay it: for few rows, where launches take longer than kernels.
        freezing: let Inductor fold and rearrange the float weights that are left.
        options: more settings of Inductor for this program, e.g. `{"max_autotune": True}`.

    Raises:
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: an annotated op has no kernel, there is no GPU, the program cannot be compiled or run, it does
            not call our kernels, or its output is off.
    """
    place = _device(device)
    sites, allowed = accountable_sites(quantized, allow_float, CAPABILITIES)
    floats = passes.copy_graph(quantized)
    passes.make_float(floats, allowed)
    reference = flat(floats)
    made = _transform(passes.copy_graph(reference.graph), sites, allowed)
    _check_device(place, made)
    cases = cases_of(reference, data.example_of(quantized) if example_inputs is None else example_inputs)
    cases = [tuple(t.to(place) for t in case) for case in cases]
    settings = _settings(place, cuda_graphs, freezing, options)
    about = Metadata(reference.signature, made.sites, _UNPROVEN, False, reference.initial, reference.overwritten)
    program = CudaProgram(made.graph, about, place, settings)
    kernels = _kernels(program.run, cases[0], made.count)
    verdict = hold_against(
        _moved(reference.graph, place),
        program.run,
        cases,
        min_sqnr_db=min_sqnr_db,
        op_error=_op_error(quantized),
        target=TARGET,
        build=lambda graph: _built(graph, made, place, settings),
    )
    proof = Proof.of(verdict, kernels, len(made.wanted), len(made.wanted), left_float(made.sites, made.allowed))
    program.prove(replace(about, proof=proof))
    return program


def _built(
    graph: GraphModule, made: _Transformed, place: torch.device, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """A program of a graph with further outputs, which is changed."""
    twin = _transform(_moved(graph, torch.device("cpu")), made.sites, made.allowed)
    return torch.compile(_moved(twin.graph, place), options=dict(settings))


@own_modes()
def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    cuda_graphs: bool = False,
    freezing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> CudaProgram:
    """Read what `CudaProgram.save` wrote; it is compiled again at the first call. The options are those of `lower`.

    Nothing that the file says is run: see `torchquant.exported`. What `CudaProgram.package` wrote is another matter:
    that is a shared library.

    Raises:
        ArtifactError: no such file, truncated, damaged, foreign, for another target or of another format.
        LoweringError: there is no GPU, and `device` names no other place.
    """
    place, (stored, members) = _device(device), archive.contents(path, TARGET)
    about, graph = metadata_from(path, stored, members), graph_in(path, members)
    return CudaProgram(graph, about, place, _settings(place, cuda_graphs, freezing, options))


def _device(device: str | torch.device | None) -> torch.device:
    if device is None and not torch.cuda.is_available():
        raise LoweringError('torch sees no NVIDIA GPU; pass device="cpu" to check the program with reference kernels')
    return torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)


def _check_device(place: torch.device, made: _Transformed) -> None:
    """Refuse what the GPU has no instructions for, and warn of what has a slow reference only."""
    if place.type != "cuda":
        return
    needs = (8, 9) if any(s.weight is not None and s.weight.dtype in FLOAT_RANGE for s in made.wanted) else (8, 0)
    has = torch.cuda.get_device_capability(place)
    if has < needs:
        name = torch.cuda.get_device_name(place)
        raise LoweringError(f"{name} has compute capability {has}, and the kernels of this scheme need {needs}")
    target = torch.ops.torchquant.weight_only_linear.default
    if any(n.target is target and n.args[2].meta["val"].dtype == torch.float32 for n in made.graph.graph.nodes):
        text = "weight-only kernels compute in bfloat16 and float16; a float32 model unpacks its weights in each call"
        warnings.warn(f"{text}; export it in bfloat16", TorchquantWarning, stacklevel=3)


def _settings(
    place: torch.device, cuda_graphs: bool, freezing: bool, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {"freezing": freezing, "triton.cudagraphs": cuda_graphs and place.type == "cuda", **(options or {})}


def _moved(graph: GraphModule, device: torch.device) -> GraphModule:
    """A copy on `device`, with what the graph makes there too; tensors that lie there already are shared."""
    twin = passes.copy_graph(graph)
    for name in {str(n.target) for n in twin.graph.nodes if n.op == "get_attr"}:
        owner, _, leaf = name.rpartition(".")
        module, value = twin.get_submodule(owner), operator.attrgetter(name)(twin)
        if isinstance(value, torch.Tensor):
            delattr(module, leaf)
            module.register_buffer(leaf, value.detach().to(device))
    for node in twin.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda v: device if isinstance(v, torch.device) else v
        )
    twin.recompile()
    return twin


def _example(graph: GraphModule, device: torch.device) -> Any:
    """A batch to export with."""
    batch = data.example_of(graph)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch)


def _op_error(graph: GraphModule) -> float:
    """One unit in the last place of the coarsest floats of the model."""
    values = [n.meta.get("val") for n in graph.graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in _FLOATS}
    return max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float32).eps)


def _kernels(run: Callable[..., Any], tensors: Sequence[torch.Tensor], count: int) -> dict[str, int]:
    """How often one call of the compiled program calls each of our ops.

    Raises:
        LoweringError: it cannot be compiled or run, or calls fewer than the `count` ops of its graph.
    """
    try:
        run(*tensors)  # compiles, in which the ops are called on shapes
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            run(*tensors)
    except Exception as error:
        raise LoweringError(f"{TARGET}: the lowered graph cannot be compiled and run: {str(error)[:2000]}") from error
    calls = Counter({event.key: event.count for event in profile.key_averages() if event.key in _CALLS})
    if sum(calls.values()) < count:
        raise LoweringError(f"{TARGET}: {count} ops are lowered, and the compiled program calls {dict(calls)} of them")
    return {key.removeprefix("torchquant::"): n for key, n in calls.items()}


def dynamo_backend(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`torch.compile(quantized, backend="torchquant_cuda")`: the same lowering, reached through Dynamo.

    Lowers at the first call, and again for each new set of input sizes.

    Args:
        options: `allow_float`, `min_sqnr_db`, `device`, `cuda_graphs` and `freezing`, as for `lower`.

    Raises:
        LoweringError: as `lower`; or an unknown option.
    """
    return dynamo.backend(lower, _DYNAMO_OPTIONS, graph, options)
