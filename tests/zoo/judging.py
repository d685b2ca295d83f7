"""One case on one way: quantized, lowered, run on unseen inputs, and held against float output by output."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import nn
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.calibration import batches as data
from torchquant.fx import passes
from torchquant.fx.reading import is_prepared
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer
from zoo.case import RIGHT, Call, Case

WORSE_DB = 3.0  # that a program may be than the converted graph


def torchao_x86() -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def executorch_quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


WAYS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "x86/ours": (inductor_x86, X86Quantizer),
    "x86/foreign": (inductor_x86, torchao_x86),
    "xnnpack/ours": (executorch_xnnpack, XnnpackQuantizer),
    "xnnpack/foreign": (executorch_xnnpack, executorch_quantizer),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        kind: `right`; `refused` by a TorchquantError; `wrong` numbers; `error`: any other exception.
        text: of the refusal or fault.
        converted_db, program_db: the worst float output of each against the float model, NaN if there is none.
        integer_ops: annotated compute ops that the program runs in integers.
    """

    kind: str
    text: str = ""
    converted_db: float = float("nan")
    program_db: float = float("nan")
    integer_ops: int = 0

    def problem(self, expected: str) -> str:
        """What is not as expected; empty if all is."""
        if expected == RIGHT:
            return "" if self.kind == "right" else f"{self.kind}: {self.text}"
        if self.kind != "refused":
            return f"expected a refusal with {expected!r}, got {self.kind}: {self.text}"
        return "" if expected in self.text else f"the refusal does not say {expected!r}: {self.text}"


def ways_of(case: Case) -> list[str]:
    """`target/quantizer/shapes` of a case."""
    shapes = ["static"] + (["dynamic"] if case.dynamic_shapes is not None else [])
    return [f"{way}/{shape}" for way in WAYS for shape in shapes]


def outcome(case: Case, way: str) -> Outcome:
    """Run a case on a way; raises nothing."""
    name, _, shapes = way.rpartition("/")
    backend, quantizer = WAYS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _judge(Float.of(case, dynamic=shapes == "dynamic"), quantizer(), backend)
        except tq.TorchquantError as error:
            return Outcome("refused", str(error))
        except Exception:
            return Outcome("error", traceback.format_exc(limit=-3))


@dataclass
class Float:
    """A float model with its data: calibration batches, and streams of unseen inputs."""

    case: Case
    model: nn.Module
    exported: Any
    calibration: list[Any]
    unseen: list[list[Any]]

    @staticmethod
    def of(case: Case, *, dynamic: bool) -> Float:
        torch.manual_seed(0)
        model = case.model().eval()
        _lively_norms(model)
        sizes = [case.size] if not dynamic else [case.size, *case.sizes]
        calibration: list[Any] = [_batch(case, case.size) for _ in range(16)]
        if case.calls > 1:
            calibration = [tq.Steps(calibration)]
        unseen = [[_batch(case, size) for _ in range(case.calls)] for size in (*sizes, case.size)]
        shapes = case.dynamic_shapes() if dynamic and case.dynamic_shapes is not None else None
        if isinstance(model, Call) and isinstance(shapes, tuple):
            shapes = (shapes,)  # its forward takes *args
        exported = tq.export(model, _copied(case.batch(case.size)), dynamic_shapes=shapes)
        return Float(case, model, exported, calibration, unseen)

    def streams(self, run: Callable[[], Callable[..., Any]]) -> list[Any]:
        """Outputs of each stream, with the inputs as they are afterwards; `run` makes what starts a stream anew."""
        outputs = []
        for stream in self.unseen:
            called = run()
            for batch in stream:
                mine = _copied(batch)
                with torch.no_grad():
                    returned = data.call(called, mine)
                outputs.append((_copied(returned), mine))
        return outputs

    def expected(self) -> list[Any]:
        return self.streams(lambda: copy.deepcopy(self.model))


def converted(original: Float, quantizer: Any) -> Any:
    """The case through the whole flow, with its default algorithms."""
    example = original.case.batch(original.case.size)
    return tq.quantize(original.exported, example, original.calibration, quantizer=quantizer, progress=False)


def quantized_for_both(original: Float) -> list[Any]:
    """For each target whose Quantizer annotates something: the converted graph, from one pass over the data."""
    prepared = [tq.prepare(original.exported, quantizer()) for quantizer in (X86Quantizer, XnnpackQuantizer)]
    prepared = [graph for graph in prepared if is_prepared(graph)]
    if prepared:
        tq.calibrate(prepared, original.calibration, progress=False)
    return [tq.convert(graph) for graph in prepared]


def _judge(original: Float, quantizer: Any, backend: Any) -> Outcome:
    quantized = converted(original, quantizer)
    reference = passes.copy_graph(quantized)
    program = backend.lower(quantized, _copied(original.case.batch(original.case.size)))
    wanted = original.expected()
    of_graph = differences(wanted, original.streams(lambda: copy.deepcopy(reference)))

    def afresh() -> Any:
        program.reset()
        return program

    returned = original.streams(afresh)
    of_program = differences(wanted, returned)
    text = fault(of_graph, of_program, original.case.clear_db) or _lost_when_saved(program, backend, original, returned)
    worst = [min((d.db for d in each if d.is_float), default=float("nan")) for each in (of_graph, of_program)]
    return Outcome("wrong" if text else "right", text, *worst, 0 if program.proof is None else program.proof.fused)


def _lost_when_saved(program: Any, backend: Any, original: Float, returned: list[Any]) -> str:
    """What differs once the program was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = backend.load(program.save(Path(folder) / "model"))
        again = original.streams(lambda: (loaded.reset(), loaded)[1])
    same = all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(_tensors(returned), _tensors(again), strict=True)
    )
    return "" if same else "the program computes something else once it was saved and loaded"


# comparing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How one output, over all streams, differs from the float model's.

    Args:
        db: of floats: SQNR over finite elements; minus infinity where NaN or infinity stand elsewhere.
        unequal, count: of integers: elements that differ, and all.
    """

    is_float: bool
    db: float
    unequal: int
    count: int


def differences(wanted: Sequence[Any], got: Sequence[Any]) -> list[Difference]:
    """One difference for each leaf of the outputs and of the inputs after the call.

    Raises:
        AssertionError: the outputs differ in structure, type, dtype or shape.
    """
    pairs = [_leaves(a, b) for a, b in zip(wanted, got, strict=True)]
    return [_difference([stream[i] for stream in pairs]) for i in range(len(pairs[0]))]


def fault(of_graph: Sequence[Difference], of_program: Sequence[Difference], clear_db: float) -> str:
    """Where a program is further from float than its converted graph is."""
    for i, (graph, program) in enumerate(zip(of_graph, of_program, strict=True)):
        if program.is_float and program.db < min(graph.db, clear_db) - WORSE_DB:
            return f"output {i}: {program.db:.1f} dB, the converted graph {graph.db:.1f} dB"
        if not program.is_float and program.unequal > 2 * graph.unequal + 0.02 * graph.count:
            return f"output {i}: {program.unequal} of {program.count} differ, in the converted graph {graph.unequal}"
    return ""


def _leaves(wanted: Any, got: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first, second = pytree.tree_flatten(wanted), pytree.tree_flatten(got)
    assert first[1] == second[1], f"structure: {first[1]} became {second[1]}"
    for a, b in zip(first[0], second[0], strict=True):
        assert type(a) is type(b) or isinstance(a, nn.Parameter), f"{type(a)} became {type(b)}"
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{a.dtype} {a.shape} became {b.dtype} {b.shape}"
        else:
            assert a == b or isinstance(a, float), f"{a} became {b}"
    return list(zip(_tensors(wanted), _tensors(got), strict=True))


def _tensors(values: Any) -> list[torch.Tensor]:
    kinds = (torch.Tensor, bool, int, float)
    leaves = [torch.as_tensor(v).detach() for v in pytree.tree_leaves(values) if isinstance(v, kinds)]
    leaves = [torch.view_as_real(t) if t.is_complex() else t for t in leaves]
    return [t.double() if t.is_floating_point() else t for t in leaves]


def _difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Difference:
    wanted, got = (torch.cat([p[i].reshape(-1) for p in pairs]) for i in range(2))
    if not wanted.is_floating_point():
        return Difference(False, float("nan"), int((wanted != got).sum()), wanted.numel())
    finite = wanted.isfinite()
    if not torch.equal(wanted[~finite].nan_to_num(), got[~finite].nan_to_num()) or not bool(
        got[finite].isfinite().all()
    ):
        return Difference(True, -float("inf"), 0, wanted.numel())
    signal, noise = wanted[finite].square().sum(), (wanted - got)[finite].square().sum()
    db = float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))
    return Difference(True, db, 0, wanted.numel())


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)


def _batch(case: Case, size: int) -> Any:
    """A batch without outliers: what is unseen shall lie in the range of what was seen."""
    bounded = lambda t: t.clamp(-2.5, 2.5) if t.is_floating_point() else t  # noqa: E731
    return pytree.tree_map_only(torch.Tensor, bounded, case.batch(size))


def _lively_norms(model: nn.Module) -> None:
    """BatchNorm with statistics as a trained network has them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
