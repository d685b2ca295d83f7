"""ExecuTorch programs for the XNNPACK delegate: delegated int8 ops, counted, run and held against their reference."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchquant import batches as data
from torchquant.errors import ArtifactError, LoweringError, MissingDependencyError
from torchquant.files import write_whole
from torchquant.formats import INT8, INT8_NARROW
from torchquant.fx import ops, passes
from torchquant.fx.decompose import decompose
from torchquant.lowering import accountable_sites, left_float, names
from torchquant.program import Program, Proof
from torchquant.proof import hold_against
from torchquant.serialize import export_again
from torchquant.signature import InputSpec, Signature
from torchquant.types import Capability, Scheme, Site, TensorSpec

__all__ = ["CAPABILITIES", "SCHEMES", "XnnpackProgram", "load", "lower"]

TARGET = "executorch_xnnpack"
_OP_ERROR = 1e-5  # XNNPACK approximates exp, erf and rsqrt
_WEIGHT = TensorSpec(INT8_NARROW, symmetric=True, granularity="channel")
SCHEMES = {
    "static_int8": Scheme("static_int8", TensorSpec(INT8, symmetric=False), _WEIGHT),
    "dynamic_int8": Scheme(
        "dynamic_int8", TensorSpec(INT8, symmetric=False, granularity="token", dynamic=True), _WEIGHT
    ),
}

_EMBEDDING = "embedding tables stay float: the delegate has no embedding, and the portable kernel would run outside it"
_FLOAT = {
    "conv3d": "XNNPACK has no 3-D convolution",
    "conv_transpose1d": "XNNPACK has no 1-D transposed convolution",
    "conv_transpose3d": "XNNPACK has no 3-D transposed convolution",
    "matmul": "the delegate multiplies two activations in float",
    "addmm": "the delegate multiplies two activations in float",
    "einsum": "the delegate multiplies two activations in float",
    "attention": "the delegate multiplies two activations in float",
    "embedding": _EMBEDDING,
    "recurrent": "XNNPACK has no recurrent layers",
    "div": "the delegate divides in float",
    **dict.fromkeys(
        ("softmax", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "elu"),
        "the delegate computes this function in float",
    ),
    **dict.fromkeys(
        ("prelu", "layer_norm", "group_norm", "batch_norm", "interpolate", "avg_pool"),
        "the delegate computes this in float",
    ),
}


def _weighted(node: Node, scheme: str) -> str | None:
    if ops.op_name(node) == "linear":
        return None
    groups = _argument(node, "groups", 1)
    if scheme == "dynamic_int8":
        if ops.op_name(node) != "conv2d":
            return "XNNPACK quantizes dynamically only linear and conv2d"
        return "XNNPACK runs no depthwise convolution with dynamic activations" if groups != 1 else None
    if ops.op_name(node) == "conv_transpose2d" and groups != 1:
        return "XNNPACK takes no per-channel weights in a grouped transposed convolution"
    return None


def _unscaled(node: Node, scheme: str) -> str | None:
    return "XNNPACK adds and subtracts only with alpha = 1" if node.kwargs.get("alpha", 1) != 1 else None


def _spatial_mean(node: Node, scheme: str) -> str | None:
    shape, dims = ops.shape_of(node.args[0]), node.args[1] if len(node.args) > 1 else None  # type: ignore[arg-type]
    keep = len(node.args) > 2 and node.args[2]
    if shape is None or len(shape) != 4 or not keep or sorted(d % 4 for d in dims or ()) != [2, 3]:  # type: ignore
        return "XNNPACK averages only 4-D tensors over their last two axes, kept"
    return None


def _global_pool(node: Node, scheme: str) -> str | None:
    return None if list(node.args[1]) == [1, 1] else "XNNPACK pools only to 1 x 1"  # type: ignore[arg-type]


def _plain_max_pool(node: Node, scheme: str) -> str | None:
    ceil_mode = node.args[5] if len(node.args) > 5 else False
    return "XNNPACK's max pooling has no ceil_mode" if ceil_mode else None


def _zero_pad(node: Node, scheme: str) -> str | None:
    value = node.args[3] if len(node.args) > 3 else 0
    mode = node.args[2] if len(node.args) > 2 else "constant"
    return None if mode == "constant" and not value else "XNNPACK pads only with a constant zero in int8"


def _argument(node: Node, name: str, default: Any) -> Any:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(name, default)


_STATIC, _BOTH = ("static_int8",), ("static_int8", "dynamic_int8")
_CLAMPS = ("relu", "hardtanh")
CAPABILITIES: tuple[Capability, ...] = (
    Capability("conv1d", _STATIC, "weighted", _CLAMPS, True),
    Capability("conv2d", _BOTH, "weighted", _CLAMPS, True, _weighted, "dynamic: not depthwise or grouped"),
    Capability("conv_transpose2d", _STATIC, "weighted", _CLAMPS, True, _weighted, "not grouped"),
    Capability("linear", _BOTH, "weighted", _CLAMPS, True),
    Capability("add", _STATIC, "activations", _CLAMPS, True, _unscaled, "between int8 ops; alpha = 1"),
    Capability("sub", _STATIC, "activations", _CLAMPS, True, _unscaled, "between int8 ops; alpha = 1"),
    Capability("mul", _STATIC, "activations", _CLAMPS, True, reason="between int8 ops"),
    Capability("mean", _STATIC, "activations", (), True, _spatial_mean, "4-D, last two axes, kept"),
    Capability("adaptive_avg_pool2d", _STATIC, "activations", (), True, _global_pool, "to 1 x 1"),
    Capability("relu", _STATIC, "activations", (), True, reason="between int8 ops"),
    Capability("hardtanh", _STATIC, "activations", (), True, reason="between int8 ops"),
    Capability("max_pool2d", _STATIC, "shared", (), True, _plain_max_pool, "between int8 ops; no ceil_mode"),
    Capability("cat", _STATIC, "shared", (), True, reason="between int8 ops"),
    Capability("pad", _STATIC, "shared", (), True, _zero_pad, "between int8 ops; constant zero"),
    Capability("reshape", _STATIC, "shared", (), True, reason="between int8 ops"),
    Capability("slice", _STATIC, "shared", (), True, reason="between int8 ops"),
    *(Capability(op, reason=why) for op, why in _FLOAT.items()),
)


def _executorch() -> SimpleNamespace:
    """ExecuTorch's modules, imported when first needed.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime, Verification
    except ImportError as error:
        raise MissingDependencyError(
            f"ExecuTorch is not installed ({error}): pip install 'torchquant[executorch]'"
        ) from error
    return SimpleNamespace(
        partitioner=XnnpackPartitioner,
        lower=to_edge_transform_and_lower,
        runtime=Runtime,
        verification=Verification,
    )


class XnnpackProgram(Program):
    """A `.pte` for the XNNPACK delegate, run through ExecuTorch's Python runtime."""

    target = TARGET

    def __init__(self, buffer: bytes, signature: Signature | None = None) -> None:
        executorch = _executorch()
        try:
            self._program = executorch.runtime.get().load_program(
                buffer, verification=executorch.verification.InternalConsistency
            )
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise LoweringError(f"ExecuTorch cannot load the program: {error}") from error
        self._buffer = buffer
        self.signature = signature or _signature_of(self)
        self.inputs = self.signature.tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._method.execute([t.contiguous() for t in self.signature.tensors_of(args, kwargs)])
        return self.signature.outputs(found)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the `.pte`; any ExecuTorch runtime with the XNNPACK delegate runs it."""
        return write_whole(path, lambda part: part.write_bytes(self._buffer))

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
) -> XnnpackProgram:
    """Build a `.pte` from a converted graph, load and run it, and prove that its int8 ops are delegated.

    Attention, LayerNorm and RMSNorm are first rewritten so that the delegate takes them too.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer. Its dead float weights are removed.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.proof.hold_against` says.

    Raises:
        MissingDependencyError: ExecuTorch is not installed.
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: XNNPACK would drop or change something that is annotated, an annotated op is not
            delegated, or the program cannot be built, loaded or run, or its output is off.
    """
    executorch = _executorch()
    sites, allowed = accountable_sites(quantized, allow_float, CAPABILITIES)
    wanted = [s for s in sites if s.status == "quantized" and s.compute and s.node not in allowed]
    _refuse_unrunnable(wanted)
    _refuse_unshared(quantized)
    _refuse_narrow(quantized, allowed)
    passes.remove_dead_weights(quantized)
    reference = passes.copy_graph(quantized)
    passes.make_float(reference, allowed)
    passes.per_token_linears(reference)  # what the delegate makes of a dynamic linear, whatever the graph says
    batch = data.contiguous(data.example_of(quantized) if example_inputs is None else example_inputs)
    signature = Signature.of(quantized)
    data.leaves_of(signature, batch, "example_inputs")
    edge = _delegate(executorch, reference, batch)
    kernels, fused = _prove_delegated(edge, wanted)
    try:
        buffer = bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise LoweringError(f"ExecuTorch cannot build the program: {str(error)[:2000]}") from error
    program = XnnpackProgram(buffer, signature)
    program.sites = sites
    verdict = hold_against(reference, program, [batch], min_sqnr_db=min_sqnr_db, op_error=_OP_ERROR, target=TARGET)
    program.proof = Proof.of(verdict, kernels, len(wanted), fused, left_float(sites, allowed))
    return program


def lower_float(exported: GraphModule, example_inputs: Any) -> tuple[Callable[..., Any], int]:
    """The float graph through the same rewrites and delegate, and its bytes: what to compare with.

    Raises:
        MissingDependencyError, LoweringError: as `lower`.
    """
    buffer = bytes(_delegate(_executorch(), exported, example_inputs).to_executorch().buffer)
    program = XnnpackProgram(buffer, Signature.of(exported))
    program.sites, program.proof = (), None
    return program, len(buffer)


def load(path: str | os.PathLike[str]) -> XnnpackProgram:
    """Read a saved `.pte`. It carries no report: `sites` is empty and `proof` is not set.

    Raises:
        ArtifactError: no such file, or not a program that this ExecuTorch loads.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    content = file.read_bytes()
    if content[4:6] != b"ET":
        raise ArtifactError(f"{file} is truncated or not an ExecuTorch program (.pte)")
    try:
        program = XnnpackProgram(content)
    except (LoweringError, RuntimeError) as error:
        raise ArtifactError(f"{file} is truncated or from another ExecuTorch: {error}") from error
    program.sites, program.proof = (), None
    return program


def _signature_of(program: XnnpackProgram) -> Signature:
    """What the runtime reports of the inputs: of a program with dynamic sizes, the largest ones."""
    about = program._method.metadata
    found = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
    return Signature.flat(
        InputSpec(f"input {i}", str(_DTYPES.get(m.dtype(), m.dtype())), tuple(m.sizes())) for i, m in enumerate(found)
    )


# ExecuTorch's scalar type numbers
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
}


def _refuse_unrunnable(sites: Sequence[Site]) -> None:
    """What the delegate would drop in silence, or fail on only when loaded."""
    for site in sites:
        if problem := _problem(site):
            raise LoweringError(
                f"{site.op} {site.node} ({site.module or 'root'}) is annotated, but {problem}. Change the Quantizer's "
                f"spec, exclude the op, or pass allow_float=['node:{site.node}']."
            )


def _problem(site: Site) -> str:
    row = next((r for r in CAPABILITIES if r.op == site.op), None)
    if row is None or not row.schemes:
        return row.reason if row else f"{TARGET} has no entry for {site.op}"
    return _weight_problem(site) or _activation_problem(site)


def _weight_problem(site: Site) -> str:
    weight = site.weight
    if weight is None:
        return "its weight is float, and XNNPACK's int8 ops take int8 weights"
    if weight.dtype != torch.int8:
        return f"its weight is {weight.dtype}, and XNNPACK takes int8"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "its weight has zero points, which XNNPACK drops without a word"
    if site.op != "linear" and (weight.quant_min, weight.quant_max) == (-8, 7):
        return "its weight has the range -8..7, which XNNPACK packs as 4 bits for linear only"
    return ""


def _activation_problem(site: Site) -> str:
    activation, weight = site.activation, site.weight
    if activation is None:
        return "only its weight is quantized, and XNNPACK runs no weight-only int8"
    if activation.dynamic:
        if weight is not None and weight.axis is None and weight.scale is not None and weight.scale.numel() == 1:
            return "its weight is per tensor, and XNNPACK's dynamic linear takes per-channel weights"
        return ""
    if activation.dtype != torch.int8:
        return f"its activation is {activation.dtype}, and XNNPACK's static ops take int8"
    if (activation.quant_min, activation.quant_max) != (-128, 127):
        return (
            f"its activation is limited to {activation.quant_min}..{activation.quant_max}, and XNNPACK clamps to "
            "-128..127 whatever the graph says"
        )
    return ""


def _refuse_unshared(graph: GraphModule) -> None:
    """cat, max_pool2d and slice with other qparams behind than before load nowhere."""
    for node in graph.graph.nodes:
        if ops.op_name(node) not in ("cat", "max_pool2d", "slice") or ops.kind_of(node) is None:
            continue
        behind = [u for u in node.users if ops.is_quantize(u)]
        before = [n for n in node.all_input_nodes if ops.is_dequantize(n)]
        for quantize in behind:
            for dequantize in before:
                if quantize.args[1:3] != dequantize.args[1:3]:
                    raise LoweringError(
                        f"{ops.op_name(node)} {node.name} changes scale or zero point from {dequantize.args[1:3]} to "
                        f"{quantize.args[1:3]}, and XNNPACK's programs with that fail to load. Give its inputs and "
                        "output one SharedQuantizationSpec."
                    )


def _refuse_narrow(graph: GraphModule, allowed: set[str]) -> None:
    """Static activations on another grid than int8 -128..127: the delegate does not know the declared range."""
    for node in graph.graph.nodes:
        if not ops.is_quantize(node) or ops.is_constant(node) or isinstance(node.args[1], Node):
            continue
        given = ops.arguments(node)
        grid = (given.get("dtype"), given.get("quant_min"), given.get("quant_max"))
        around = {str(node.args[0]), *(str(user) for dequantize in node.users for user in dequantize.users)}
        if grid != (torch.int8, -128, 127) and not around & allowed:
            raise LoweringError(
                f"the tensor between {node.args[0]} and {', '.join(sorted(around - {str(node.args[0])}))} is quantized "
                f"to {grid[0]} {grid[1]}..{grid[2]}, and XNNPACK's static ops compute in int8 -128..127 whatever the "
                "graph says. Change the Quantizer's spec."
            )


def _delegate(executorch: SimpleNamespace, quantized: GraphModule, batch: Any) -> Any:
    try:
        graph = passes.copy_graph(quantized)
        decompose(graph)
        passes.duplicate_dynamic_chains(graph)
        passes.unshare_weights(graph)
        return executorch.lower(export_again(graph, batch), partitioner=[executorch.partitioner()])
    except Exception as error:
        raise LoweringError(f"ExecuTorch cannot lower the converted graph: {str(error)[:2000]}") from error


def _prove_delegated(edge: Any, wanted: Sequence[Site]) -> tuple[dict[str, int], int]:
    """What lies inside delegate calls and what outside; LoweringError if an annotated op is outside."""
    graph: GraphModule = edge.exported_program().graph_module
    outside = Counter(_edge_name(n) for n in graph.graph.nodes if n.op == "call_function")
    lowered: list[Any] = [m for m in graph.children() if hasattr(m, "original_module")]
    bodies: list[GraphModule] = [m.original_module.graph_module for m in lowered]
    fused = sum(_is_integer_op(n) for body in bodies for n in body.graph.nodes)
    left = {name: n for name, n in outside.items() if "quantize" in name or "qparams" in name}
    if fused < len(wanted) or left:
        raise LoweringError(
            f"{len(wanted)} compute ops are annotated, and the XNNPACK delegate took {fused} of them"
            + (f"; outside it are {left}" if left else "")
            + f". Annotated: {names(wanted)}. Exclude what is not delegated, or pass allow_float."
        )
    inside = Counter(_edge_name(n) for body in bodies for n in body.graph.nodes if _is_integer_op(n))
    kernels = {"delegate calls": outside.pop("executorch_call_delegate", 0)}
    kernels |= {f"delegated int8 {name}": n for name, n in inside.items()}
    kernels |= {f"portable {name}": n for name, n in outside.items() if name not in ("getitem", "alloc")}
    return kernels, fused


def _edge_name(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    parts = str(getattr(node.target, "__name__", node.target)).split(".")  # namespace, op, overload
    return parts[1] if len(parts) == 3 else parts[0]


def _is_integer_op(node: Node) -> bool:
    """Whether a conv or linear of the edge dialect reads a dequantized weight."""
    if node.op != "call_function" or _edge_name(node) not in (
        "linear",
        "convolution",
        "conv1d",
        "conv2d",
        "addmm",
        "mm",
    ):
        return False
    sources = [_behind_views(n) for n in node.all_input_nodes]
    return sum("dequantize" in _edge_name(n) for n in sources) >= 2


def _behind_views(node: Node) -> Node:
    while _edge_name(node) in (
        "permute_copy",
        "view_copy",
        "t_copy",
        "unsqueeze_copy",
        "squeeze_copy",
        "constant_pad_nd",
    ):
        node = node.all_input_nodes[0]
    return node
