"""A program of packed ops: compiled at its first call, saved, read again."""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

import torchquant.ops.gpu.convolutions  # noqa: F401 - registers the ops, as does linears.py that it imports
from torchquant.artifacts.program import Metadata, Program, State, metadata_from, write_metadata
from torchquant.artifacts.serialize import export_again, graph_in
from torchquant.backends.inductor_cuda.capabilities import TARGET
from torchquant.calibration import batches as data
from torchquant.errors import LoweringError
from torchquant.files import archive
from torchquant.files.owned import OwnFolder
from torchquant.files.whole import write_whole
from torchquant.fx import passes
from torchquant.surroundings import own_modes, unchanged

__all__ = ["CudaProgram", "device_of", "load", "moved", "settings_of"]


class CudaProgram(Program):
    """A graph of packed ops that `torch.compile` compiles at the first call, and again for sizes of another kind.

    Args:
        graph: from `transform`.
        about: its inputs, sites and proof.
        device: where it runs; inputs are moved there.
        settings: of Inductor, for this program alone.
    """

    target = TARGET.name

    def __init__(self, graph: GraphModule, about: Metadata, device: torch.device, settings: Mapping[str, Any]) -> None:
        self.graph, self.device, self.settings = moved(graph, device), device, dict(settings)
        self._about = about
        self.inputs, self.sites, self.proof = about.signature.tensors, about.sites, about.proof
        self._state = State({name: value.to(device) for name, value in about.states.items()})
        self._run: Callable[..., Any] = torch.compile(self.graph, options=self.settings)
        self._compiled = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs)
        with own_modes() if self._compiled else unchanged(), torch.no_grad():
            values = self.run(*tensors, *self._state.values.values())
        self._compiled = True
        return self._finish(self._about, tensors, values)

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
        self._about, self.sites, self.proof = about, about.sites, about.proof

    @own_modes()
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph with its packed weights (`.pt2`); `load` reads it on any machine, with or without a GPU."""
        graph = moved(self.graph, torch.device("cpu"))
        exported = export_again(graph, _example(graph, torch.device("cpu")))

        def write(part: Path) -> None:
            plain = part.with_suffix(".plain.pt2")
            torch.export.save(exported, plain)
            archive.compress(plain, part)
            plain.unlink()
            write_metadata(part, TARGET.name, self._about)

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
                package = str(folder / "model.pt2")
                try:
                    torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=settings)
                except Exception as error:
                    raise LoweringError(f"Inductor cannot compile the lowered graph: {str(error)[:2000]}") from error
                shutil.copyfile(package, part)

        return write_whole(path, write)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights, packed ones and float ones."""
        return passes.weight_bytes(self.graph)


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

    Nothing that the file says is run: see `torchquant.artifacts.exported`. What `CudaProgram.package` wrote is another
    matter: that is a shared library.

    Args:
        path: of what `CudaProgram.save` wrote.
        device, cuda_graphs, freezing, options: as for `lower`.

    Raises:
        ArtifactError: no such file, truncated, damaged, foreign, for another target or of another format.
        LoweringError: there is no GPU, and `device` names no other place.
    """
    stored, members = archive.contents(path, TARGET.name)
    about, graph = metadata_from(path, stored, members), graph_in(path, members)
    place = device_of(device)
    return CudaProgram(graph, about, place, settings_of(place, cuda_graphs, freezing, options))


def device_of(device: str | torch.device | None) -> torch.device:
    if device is None and not torch.cuda.is_available():
        raise LoweringError('torch sees no NVIDIA GPU; pass device="cpu" to check the program with reference kernels')
    return torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)


def settings_of(
    place: torch.device, cuda_graphs: bool, freezing: bool, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {"freezing": freezing, "triton.cudagraphs": cuda_graphs and place.type == "cuda", **(options or {})}


def moved(graph: GraphModule, device: torch.device) -> GraphModule:
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
