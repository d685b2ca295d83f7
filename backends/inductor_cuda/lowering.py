"""Converted graphs rewritten on packed ops, compiled by Inductor, counted and proven."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant.artifacts.program import Metadata
from torchquant.backends.inductor_cuda.capabilities import CAPABILITIES, FLOATS, TARGET
from torchquant.backends.inductor_cuda.program import CudaProgram, device_of, moved, settings_of
from torchquant.errors import LoweringError, TorchquantWarning
from torchquant.fx import ops, passes
from torchquant.fx.flat import Flat
from torchquant.lowering import dynamo, skeleton
from torchquant.lowering.accounts import accountable_sites
from torchquant.lowering.skeleton import Artefact, Cases, Lowering, Run, Stage
from torchquant.ops.gpu.rewriting import OPS, rewrite
from torchquant.surroundings import own_modes
from torchquant.types import FLOAT_RANGE, Site

__all__ = ["dynamo_backend", "lower", "transform"]

_CALLS = {f"torchquant::{name}" for name in OPS}  # as the profiler names them
_DYNAMO_OPTIONS = {"allow_float", "min_sqnr_db", "device", "cuda_graphs", "freezing"}


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
    return _transform(graph, [s for s in sites if _is_wanted(s, allowed)]).graph


def _is_wanted(site: Site, allowed: set[str]) -> bool:
    return site.status == "quantized" and site.compute and site.node not in allowed


@dataclass(frozen=True)
class _Transformed:
    """A graph with `count` calls of ops of ours."""

    graph: GraphModule
    count: int


def _transform(graph: GraphModule, wanted: Sequence[Site]) -> _Transformed:
    """`graph` itself, rewritten so that ops of ours run the sites in `wanted`."""
    passes.fill_expanded_numbers(graph)
    count = rewrite(graph, {s.node for s in wanted})
    left = [n.name for n in graph.graph.nodes if ops.is_dequantize(n) and _is_matrix(graph, n)]
    if left:
        raise LoweringError(f"dequantize ops of weights are left in the lowered graph: {', '.join(left)}")
    return _Transformed(graph, count)


def _is_matrix(graph: GraphModule, node: Node) -> bool:
    return ops.is_constant(node) and ops.constant_value(graph, node).ndim > 1


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
    progress: bool = True,
) -> CudaProgram:
    """Pack the weights of a converted graph, compile it, run it, and prove that it calls our kernels.

    Sizes that were dynamic at export stay dynamic. No global setting of Inductor is changed, nor is the graph.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.lowering.proof.hold_against` says.
        device: where it runs; the current GPU if None. "cpu" runs the kernels' references, as a check.
        cuda_graphs: record a call once and replay it: for few rows, where launches take longer than kernels.
        freezing: let Inductor fold and rearrange the float weights that are left.
        options: more settings of Inductor for this program, e.g. `{"max_autotune": True}`.
        progress: show on stderr what is being done.

    Raises:
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: an annotated op has no kernel, there is no GPU, the program cannot be compiled or run, it does
            not call our kernels, or its output is off.
    """
    place = device_of(device)
    return skeleton.lower(
        _CudaLowering(place, settings_of(place, cuda_graphs, freezing, options)),
        quantized,
        example_inputs,
        allow_float=allow_float,
        min_sqnr_db=min_sqnr_db,
        progress=progress,
    )


class _CudaLowering(Lowering[CudaProgram]):
    """A graph of packed ops, compiled as it is run."""

    target = TARGET

    def __init__(self, place: torch.device, settings: Mapping[str, Any]) -> None:
        self.device, self._settings = place, settings

    def refuse(self, quantized: GraphModule) -> None:
        """What no kernel takes is refused where it is packed."""

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self.op_error = _op_error(reference.graph)
        stage("packing weights")
        transformed = _transform(passes.copy_graph(reference.graph), self.compute)
        self._check_device(transformed.graph)
        states, returns = reference.initial, reference.overwritten
        about = Metadata(reference.signature, self.sites, None, states=states, returns=returns)
        self._program = CudaProgram(transformed.graph, about, self.device, self._settings)
        stage("compiling")
        kernels = _kernels(self._program.run, cases[0], transformed.count)
        return Artefact(self._program.run, kernels, len(self.compute), moved(reference.graph, self.device))

    def _check_device(self, graph: GraphModule) -> None:
        """Refuse what the GPU has no instructions for, and warn of what has a slow reference only."""
        if self.device.type != "cuda":
            return
        needs = (8, 9) if any(s.weight is not None and s.weight.dtype in FLOAT_RANGE for s in self.compute) else (8, 0)
        has = torch.cuda.get_device_capability(self.device)
        if has < needs:
            name = torch.cuda.get_device_name(self.device)
            raise LoweringError(f"{name} has compute capability {has}, and the kernels of this scheme need {needs}")
        target = torch.ops.torchquant.weight_only_linear.default
        if any(n.target is target and n.args[2].meta["val"].dtype == torch.float32 for n in graph.graph.nodes):
            text = "weight-only kernels compute in bfloat16 and float16; a float32 model unpacks its weights each call"
            warnings.warn(f"{text}; export it in bfloat16", TorchquantWarning, stacklevel=5)

    def build_again(self, graph: GraphModule) -> Run:
        twin = _transform(moved(graph, torch.device("cpu")), self.compute)
        return torch.compile(moved(twin.graph, self.device), options=dict(self._settings))

    def finish(self, about: Metadata) -> CudaProgram:
        self._program.prove(about)
        return self._program


def _op_error(graph: GraphModule) -> float:
    """One unit in the last place of the coarsest floats of the model."""
    values = [n.meta.get("val") for n in graph.graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in FLOATS}
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
        graph, example_inputs: what Dynamo hands over.
        options: `allow_float`, `min_sqnr_db`, `device`, `cuda_graphs` and `freezing`, as for `lower`.

    Raises:
        LoweringError: as `lower`; or an unknown option.
    """
    return dynamo.backend(lower, _DYNAMO_OPTIONS, graph, options)
