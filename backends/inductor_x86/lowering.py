"""x86 CPUs: our int8 kernels where they apply, oneDNN's through Inductor elsewhere, in one AOTInductor package.

The int8 convolutions and linears of the package are counted and proven.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch.fx import GraphModule, Node

from torchquant.artifacts.program import Metadata, write_metadata
from torchquant.artifacts.serialize import export_again
from torchquant.backends.inductor_x86.capabilities import TARGET, only_ours
from torchquant.backends.inductor_x86.packages import OnCopies, copies, pack, race, repack
from torchquant.backends.inductor_x86.passes import detach_activations, flatten_quantized_linears, rename_folded_weights
from torchquant.backends.inductor_x86.program import X86Program, run_package
from torchquant.backends.inductor_x86.states import InPlace, states_in_place, write_in_place
from torchquant.errors import LoweringError
from torchquant.files.owned import OwnFolder
from torchquant.fx import ops, passes
from torchquant.fx.flat import Flat, flat
from torchquant.fx.reading import GraphReading
from torchquant.fx.sites import marked
from torchquant.lowering import dynamo, skeleton
from torchquant.lowering.accounts import names
from torchquant.lowering.proof import Verdict, cases_of
from torchquant.lowering.skeleton import Artefact, Cases, Hold, Lowering, Run, Stage
from torchquant.ops.x86 import cpu, few_bits, native, recurrent, saturation, tuning
from torchquant.ops.x86.recurrent import Recurrent, replace_recurrent
from torchquant.ops.x86.row_products import Packed, replace_float_lookups, replace_row_products
from torchquant.ops.x86.translation import Built, replace_regions
from torchquant.surroundings import unchanged
from torchquant.types import Site

__all__ = ["dynamo_backend", "lower", "lower_float"]

# what the calls in the generated C++ are called
_KERNEL = re.compile(r"(?<!record_)aoti_torch_(?:cpu_)?_*(\w+?)\(")
_INTEGER = {
    ("conv1d", "conv2d"): re.compile(r"qconv|torchquant_conv\dd"),
    ("conv_transpose1d", "conv_transpose2d"): re.compile(r"torchquant_conv_transpose"),
    ("linear",): re.compile(r"qlinear|torchquant_linear"),
    ("embedding",): re.compile(r"torchquant_lookup"),
    ("recurrent",): re.compile(r"torchquant_recurrent"),
}
Part = Built | Packed | Recurrent  # of the graph, that our kernels compute
_MATRIX_KERNEL = re.compile(r"^q(conv|linear)|convolution|addmm|mkl_linear|linear_pointwise|^mm|bmm|attention|lstm|gru")
_OPTIONS = {"allow_float", "min_sqnr_db", "own_kernels", "tune", "compare_float"}  # of the Dynamo backend
_FASTER = 0.97  # of the int8 program's time, that a float one must not exceed to be preferred
_FEW_BITS_ERROR = 2.0**-14  # of a product whose activations have 16 bits, relative to the largest of a block
_CONFIG: Mapping[str, Any] = {"freezing": True, "cpp.dynamic_threads": True}


def lower(
    quantized: GraphModule,
    example_inputs: Any = None,
    *,
    allow_float: Sequence[str] = (),
    min_sqnr_db: float | None = None,
    own_kernels: bool = True,
    tune: bool = True,
    compare_float: bool = False,
    named_kernels: bool = False,
    progress: bool = True,
) -> X86Program:
    """Compile a converted graph ahead of time, run the package, and prove its int8 kernels.

    Sizes that were dynamic at export stay dynamic. No global Inductor or grad state is changed, nor is the graph.

    Args:
        quantized: what `convert_pt2e` returned, of any Quantizer.
        example_inputs: one batch to prove it with; made up from the input shapes if None.
        allow_float: patterns of annotated ops that may run in float.
        min_sqnr_db: how close each output must be to the converted graph's on `example_inputs`; None: as
            `torchquant.lowering.proof.hold_against` says.
        own_kernels: use torchquant's kernels where they apply; False leaves all to Inductor and oneDNN.
        tune: measure on this machine how our kernels should cut each product (some runs of the model; remembered
            by CPU and sizes in the cache folder); False chooses by the sizes alone.
        compare_float: also compile the graph in float32 and time both on `example_inputs`, with as many threads as
            torch has now. Where float is faster, that is what is returned, with a warning that names both times:
            its proof has `fused` 0 and says why. Takes twice as long. Both times are told, whichever wins.
        named_kernels: let profilers see Inductor's own kernels by name (see `torchquant.profile`); costs each of their
            calls some time.
        progress: show on stderr what is being done.

    Raises:
        InputError: the graph is not converted, or `example_inputs` does not fit it.
        LoweringError: an annotated op has no int8 kernel in the package, the package cannot be built or
            run, or its output is off; or oneDNN would run a product on which it saturates on this CPU.
    """
    return skeleton.lower(
        _X86Lowering(own_kernels, tune, compare_float, named_kernels),
        quantized,
        example_inputs,
        allow_float=allow_float,
        min_sqnr_db=min_sqnr_db,
        progress=progress,
    )


class _X86Lowering(Lowering[X86Program]):
    """A package of Inductor's, with what our kernels run put into the graph before."""

    target = TARGET

    def __init__(self, own_kernels: bool, tune: bool, compare_float: bool, named_kernels: bool) -> None:
        self._own_kernels, self._tune, self._compare_float = own_kernels, tune, compare_float
        self._config = {**_CONFIG, **({"cpp.enable_kernel_profile": True} if named_kernels else {})}
        self._folder = OwnFolder("torchquant-x86-")
        self._in_place: InPlace = ()
        self._parts: list[Part] = []
        self._race: dict[str, float] = {}

    def refuse(self, quantized: GraphModule) -> None:
        """Weights that Inductor would fold back to float, and ops without an int8 kernel, before minutes are spent."""
        few_bits, ours = _refuse_unrunnable(quantized, self.compute, self._own_kernels)
        self._needs_ours = bool(few_bits or ours)
        if few_bits:
            self.op_error = _FEW_BITS_ERROR

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self._case, graph, self._in_place = cases[0], reference.graph, states_in_place(reference)
        raw_file = self._folder.path / "raw.pt2"
        stage("compiling")
        built = _compile(graph, self._case, raw_file, self._own_kernels, self._tune, self._in_place, self._config)
        kernels = _kernels(built)
        try:
            fused = _prove_integer(self.compute, kernels)
        except LoweringError:
            if self._needs_ours or not built.parts or saturation.saturating(saturation.unsafe_products(graph)):
                raise
            # between our regions Inductor may lose a pattern that it finds in the whole graph
            built = _compile(
                graph, self._case, raw_file, own_kernels=False, in_place=self._in_place, config=self._config
            )
            kernels = _kernels(built)
            fused = _prove_integer(self.compute, kernels)
        self._package = self._folder.path / "model.pt2"
        pack(built.raw, self._package, with_kernels=built.calls_ours)
        self._calls_ours, self._parts = built.calls_ours, built.parts
        inside = {name for part in built.parts for name in part.sites}
        artefact = Artefact(self._runner(), kernels, fused, graph, inside=inside)
        return self._faster(reference, artefact) if self._compare_float else artefact

    def _faster(self, reference: Flat, artefact: Artefact) -> Artefact:
        """The artefact, or the float one if that takes less time."""
        floats = passes.copy_graph(reference.graph)
        passes.make_float(floats, _sites_in(floats, {s.node for s in self.sites if s.status == "quantized"}))
        raw_file = self._folder.path / "raw.pt2"
        built = _compile(floats, self._case, raw_file, own_kernels=False, in_place=self._in_place)
        kernels, package = _kernels(built), self._folder.path / "float.pt2"
        pack(built.raw, package, with_kernels=built.calls_ours)
        integer_ms, float_ms = race([self._package, package], self._case)
        self._race = {"int8": integer_ms, "float32": float_ms}
        if float_ms >= _FASTER * integer_ms:
            return artefact
        reason = f"float32 takes {float_ms:.3g} ms on this machine, int8 {integer_ms:.3g} ms"
        warnings.warn(f"{reason}: the float program is returned", stacklevel=4)
        self._package, self._calls_ours, self._parts = package, built.calls_ours, []
        left = {f"{len(self.compute)} annotated ops": reason}
        return Artefact(self._runner(), kernels, 0, floats, left, artefact.inside)

    def build_again(self, graph: GraphModule) -> Run:
        built = _compile(graph, self._case, self._folder.path / "deep.raw.pt2", self._calls_ours)
        package = self._folder.path / "deep.pt2"
        pack(built.raw, package, with_kernels=built.calls_ours)
        return OnCopies(run_package(package))

    def hold(self, hold: Hold, artefact: Artefact) -> Verdict:
        """With poisoned memory, so that no kernel that skips a write finds the right value there by chance."""
        with native.poisoned() if self._calls_ours else nullcontext():
            return super().hold(hold, artefact)

    def _runner(self) -> OnCopies:
        self._run = OnCopies(run_package(self._package), self._in_place)
        return self._run

    def finish(self, about: Metadata) -> X86Program:
        first = len(about.signature.tensors)
        names = tuple(list(about.states)[position - first] for position, _ in self._in_place)
        regions = [
            [part.memory.numel(), [s.node for s in self.sites if s.node in part.sites]]
            for part in self._parts
            if isinstance(part, Built)
        ]
        facts = {**about.facts, "regions": regions, "race_ms": self._race}
        about = replace(about, overwrites_inputs=self._run.overwrote, in_place=names, facts=facts)
        write_metadata(self._package, TARGET.name, about)
        return X86Program(self._package, self._folder, about.signature)


def _sites_in(graph: GraphModule, names: set[str]) -> set[str]:
    """Names of the nodes that had those names when the graph was marked."""
    return {n.name for n in graph.graph.nodes if marked(n) in names}


@unchanged()
def lower_float(exported: GraphModule, example_inputs: Any) -> tuple[Callable[..., Any], int]:
    """The float graph through the same compiler and the same packing, and its bytes: what to compare with.

    Args:
        exported: a float graph of `export`.
        example_inputs: one batch; the sizes to build for where they are fixed.

    Raises:
        LoweringError: Inductor cannot compile it.
    """
    pure = flat(exported)
    cases = cases_of(pure, example_inputs)
    with OwnFolder("torchquant-x86-") as folder:
        built = _compile(pure.graph, cases[0], folder / "raw.pt2", own_kernels=False)
        package = folder / "model.pt2"
        repack(built.raw, package)
        run = run_package(package)
        size_bytes = package.stat().st_size

    def call(*args: Any, **kwargs: Any) -> Any:
        values = run(*pure.signature.tensors_of(args, kwargs), *pure.initial.values())
        return pure.signature.outputs(values[: pure.count])

    return call, size_bytes


def _refuse_unrunnable(graph: GraphModule, sites: Sequence[Site], own_kernels: bool) -> tuple[int, int]:
    """Refuse weights that Inductor would fold back to float, and ops without a kernel, before minutes are spent.

    Returns: how many of the ops have weights of few bits, and how many others our kernels alone run.
    """
    nodes, reading, few, ours = {node.name: node for node in graph.graph.nodes}, GraphReading(graph), 0, 0
    for site in sites:
        node = nodes[site.node]
        product = few_bits.read(reading, node) or recurrent.read(reading, node)
        few += isinstance(product, (few_bits.Product, recurrent.Layers))
        ours += only_ours(node)
        if problem := _problem(site, product, own_kernels) or _kernel_problem(node, own_kernels):
            raise LoweringError(
                f"{site.op} {site.node} ({site.module or 'root'}) is annotated, but {problem}. Exclude it in the "
                f"Quantizer, or pass allow_float=['node:{site.node}'] to run it in float."
            )
    return few, ours


def _kernel_problem(node: Node, own_kernels: bool) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        name = str(value.dtype).removeprefix("torch.")
        return (
            f"it computes in {name}, and the kernels and Inductor's int8 patterns take float32: export a float32 model"
        )
    if not only_ours(node) or (own_kernels and native.supported()):
        return ""
    return "torchquant's own kernels alone run such a convolution in int8"


def _problem(site: Site, product: few_bits.Product | recurrent.Layers | str | None, own_kernels: bool) -> str:
    if isinstance(product, str):
        return product
    if product is not None:
        return "" if own_kernels and native.supported() else "torchquant's own kernels alone multiply such weights"
    if why := TARGET.why_float(site.op):
        return why
    weight, activation = site.weight, site.activation
    if activation is None:
        return "only its weight is quantized: Inductor folds such weights back to float"
    if weight is None or weight.dtype != torch.int8:
        return f"its weight is {weight.dtype if weight else 'float'}, and the kernels take int8"
    if weight.axis not in (None, ops.BY_NAME[site.op].axis) or weight.scale is None or weight.group_size:
        return "its weight has scales by group or on another axis, which Inductor folds back to float"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "its weight has zero points, and the kernels take symmetric weights"
    if activation.dtype not in (torch.uint8, torch.int8):
        return f"its activation is {activation.dtype}, and the kernels take 8 bits"
    return ""


@dataclass(frozen=True)
class _Compiled:
    """What Inductor wrote: the file, what our kernels compute in it, and whether it calls them at all."""

    raw: Path
    parts: list[Part]
    calls_ours: bool


def _compile(
    quantized: GraphModule,
    batch: Any,
    package: Path,
    own_kernels: bool,
    tune: bool = False,
    in_place: InPlace = (),
    config: Mapping[str, Any] = _CONFIG,
) -> _Compiled:
    parts: list[Part] = []
    try:
        graph = passes.copy_graph(quantized)
        if own_kernels and native.supported():
            graph = export_again(graph, batch).module()
            parts += replace_recurrent(graph)
            parts += replace_row_products(graph)
            regions = replace_regions(graph)
            replace_float_lookups(graph)
            _refuse_left(graph)
            parts += regions
            if regions and tune:
                _tune(graph, batch, regions)
        unsafe = saturation.unsafe_products(graph)
        saturation.refuse(unsafe, own_kernels)
        flatten_quantized_linears(graph)  # what is left to Inductor
        detach_activations(graph)  # likewise
        passes.unshare_weights(graph)
        passes.remove_dead_weights(graph)  # those that our plans hold
        rename_folded_weights(graph)
        passes.fill_expanded_numbers(graph)
        write_in_place(graph, in_place)
        exported = export_again(graph, batch)
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            torch._inductor.config.patch({"aot_inductor.metadata": {}}),
        ):
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # Inductor's own
            torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=dict(config))
        saturation.note(package, unsafe)
        cpu.note(package)
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(f"Inductor cannot compile the converted graph: {str(error)[:2000]}") from error
    return _Compiled(package, parts, native.calls_ours(graph))


def _refuse_left(graph: GraphModule) -> None:
    """Refuse quantized ops that our kernels alone run, and do not run as they are here."""
    for node in graph.graph.nodes:
        source = ops.argument(node, 0) if only_ours(node) else None
        if source is not None and ops.is_dequantize(source):
            raise LoweringError(
                f"{ops.op_name(node)} {node.name} ({ops.module_path(node) or 'root'}) is annotated, but torchquant's "
                "kernels, which alone run it in int8, take per-tensor activations, symmetric int8 weights per output "
                f"channel and sizes that are known: {ops.shape_of(node)}. Exclude it in the Quantizer, or pass "
                "allow_float for it."
            )


def _tune(graph: GraphModule, batch: Any, regions: Sequence[Built]) -> None:
    sizes = "x".join(str(s) for t in batch for s in t.shape)
    with torch.no_grad():
        tuning.tune(lambda: graph(*copies(batch)), regions, sizes)


def _kernels(built: _Compiled) -> dict[str, int]:
    """Calls to matrix kernels in the package's generated C++, by name, and the products that ours compute."""
    kernels: Counter[str] = Counter(f"torchquant_{kind}" for part in built.parts for kind in part.products)
    with zipfile.ZipFile(built.raw) as archive:
        for name in archive.namelist():
            if name.endswith(".wrapper.cpp"):
                source = archive.read(name).decode("utf-8", "replace")
                kernels.update(m for m in _KERNEL.findall(source) if _MATRIX_KERNEL.search(m))
    return dict(kernels)


def _prove_integer(wanted: Sequence[Site], kernels: dict[str, int]) -> int:
    """How many of the annotated compute ops have an int8 kernel; all of them, or LoweringError."""
    fused = 0
    for kinds, pattern in _INTEGER.items():
        sites = [s for s in wanted if s.op in kinds]
        have = sum(n for name, n in kernels.items() if pattern.search(name))
        if have < len(sites):
            raise LoweringError(
                f"{len(sites)} {' and '.join(kinds)} ops are annotated, and Inductor built {have} int8 kernels for "
                f"them; found: {kernels}. Annotated: {names(sites)}. Exclude what does not fuse, or pass allow_float."
            )
        fused += len(sites)
    return fused


def dynamo_backend(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`torch.compile(quantized, backend="torchquant")`: the same lowering, reached through Dynamo.

    Lowers at the first call, and again for each new set of input sizes.

    Args:
        graph, example_inputs: what Dynamo hands over.
        options: `allow_float`, `min_sqnr_db`, `own_kernels`, `tune` and `compare_float`, as for `lower`.

    Raises:
        LoweringError: as `lower`; or an unknown option.
    """
    return dynamo.backend(lower, _OPTIONS, graph, options)
