"""A target of one's own, in one file: linears in eager int8 with `torch._int_mm`, on any CPU, without a compiler."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import torchquant as tq
from torchquant.artifacts.program import Metadata, Program, State, metadata_from, write_metadata
from torchquant.artifacts.serialize import export_again, graph_in
from torchquant.errors import LoweringError
from torchquant.files import archive
from torchquant.files.whole import write_whole
from torchquant.formats import INT8, INT8_NARROW
from torchquant.fx import ops, passes
from torchquant.fx.flat import Flat
from torchquant.fx.reading import GraphReading
from torchquant.lowering import skeleton
from torchquant.lowering.skeleton import Artefact, Cases, Lowering, Run, Stage
from torchquant.lowering.target import Target
from torchquant.quantizers.engine import CapabilityQuantizer
from torchquant.types import Capability, Scheme, TensorSpec

STATIC = Scheme("static_int8", TensorSpec(INT8, False), TensorSpec(INT8_NARROW, True, "channel"))
CAPABILITIES = (
    Capability("linear", ("static_int8",), "weighted"),
    *(Capability(k.name, reason="eager torch computes it in float") for k in ops.KINDS if k.name != "linear"),
)
TARGET = Target("eager_int8", __name__, f"{__name__}:EagerQuantizer", ".pt2", {"static_int8": STATIC}, CAPABILITIES)


class EagerQuantizer(CapabilityQuantizer):
    """Annotates linears for this target."""

    target = TARGET


Bias = torch.Tensor | None


def int8_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Bias, input_scale: float, zero_point: int
) -> torch.Tensor:
    """x (..., in) rounded to int8, times codes (out, in): the zero point is taken off by the sums of the codes."""
    rows = (x.flatten(0, -2) * (1.0 / input_scale)).round().add(zero_point).clamp(-128, 127).to(torch.int8)
    sums = torch._int_mm(rows, codes.t()) - zero_point * codes.sum(1, dtype=torch.int32)
    y = sums * (scale * input_scale)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


LIBRARY = torch.library.Library("eager_int8", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, float input_scale, int zero_point) -> Tensor"
)
LIBRARY.impl("linear", int8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("eager_int8::linear", lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]))


def rewrite(graph: GraphModule, names: set[str]) -> int:
    """Put `eager_int8::linear` in the place of the linears named; returns how many."""
    reading, count = GraphReading(graph), 0
    for node in [n for n in graph.graph.nodes if n.name in names]:
        x, weight = (reading.tensor(ops.argument(node, i)) for i in (0, 1))
        if x is None or weight is None or x.source is None or x.qparams.scale is None or weight.qparams.scale is None:
            raise LoweringError(f"linear {node.name}: its activation or weight is in no grid of {TARGET}")
        with graph.graph.inserting_before(node):
            scale = passes.add_buffer(graph, f"{node.name}_scale", weight.qparams.scale)
            grid = (float(x.qparams.scale), int(x.qparams.zero_point))
            args = (x.source, weight.codes, scale, ops.argument(node, 2), *grid)
            new = graph.graph.call_function(torch.ops.eager_int8.linear.default, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        count += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    passes.remove_dead_weights(graph)
    return count


class EagerProgram(Program):
    """The rewritten graph, run as it is."""

    target = TARGET.name

    def __init__(self, graph: GraphModule, about: Metadata) -> None:
        self.graph, self._about, self._state = graph, about, State(about.states)
        self.inputs, self.sites, self.proof = about.signature.tensors, about.sites, about.proof

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self._about.signature.tensors_of(args, kwargs, "cpu")
        with torch.no_grad():
            return self._finish(self._about, tensors, self.graph(*tensors, *self._state.values.values()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        def write(part: Path) -> None:
            torch.export.save(export_again(self.graph), part)
            write_metadata(part, TARGET.name, self._about)

        return write_whole(path, write)

    @property
    def size_bytes(self) -> int:
        return passes.weight_bytes(self.graph)


class EagerLowering(Lowering[EagerProgram]):
    """Static int8 linears; everything else stays as it is."""

    target = TARGET

    def refuse(self, quantized: GraphModule) -> None:
        pass  # `rewrite` refuses what it cannot read

    def build(self, reference: Flat, cases: Cases, stage: Stage) -> Artefact:
        self._graph = passes.copy_graph(reference.graph)
        count = rewrite(self._graph, {s.node for s in self.compute})
        return Artefact(self._graph, {"_int_mm": count}, count, reference.graph)

    def build_again(self, graph: GraphModule) -> Run:
        twin = passes.copy_graph(graph)
        rewrite(twin, {s.node for s in self.compute})
        return twin

    def finish(self, about: Metadata) -> EagerProgram:
        return EagerProgram(self._graph, about)


def lower(quantized: GraphModule, example_inputs: Any = None, *, allow_float: Sequence[str] = ()) -> EagerProgram:
    return skeleton.lower(EagerLowering(), quantized, example_inputs, allow_float=allow_float)


def load(path: str | os.PathLike[str]) -> EagerProgram:
    stored, members = archive.contents(path, TARGET.name)
    return EagerProgram(graph_in(path, members), metadata_from(path, stored, members))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)).eval()
    x = torch.randn(40, 64)
    graph = tq.quantize(model, x, [x], quantizer=EagerQuantizer(), dynamic_shapes=({0: torch.export.Dim("n")},))
    program = lower(graph, x)
    print(tq.report(graph, program))
    print(f"{tq.compare(model, program, [x]).sqnr_db:.1f} dB against float")
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(load(program.save(Path(folder) / "model.pt2"))(x[:5]), program(x[:5]))
