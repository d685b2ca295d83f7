"""From an exported or a prepared graph to one that is trained: fake quantizers, BatchNorm and dropout that switch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from torchquant.errors import InputError, PrepareError, SchemeError, TorchquantError
from torchquant.flow import check_quantizer
from torchquant.fx import ops, passes
from torchquant.fx.grids import Grid
from torchquant.fx.reading import is_converted, is_prepared, observers
from torchquant.fx.signature import Signature
from torchquant.fx.states import hidden_states
from torchquant.solving.solved import SolvedActivation, SolvedWeight, put_observer
from torchquant.surroundings import unchanged
from torchquant.training.bits import narrow
from torchquant.training.copies import own_tensors
from torchquant.training.fakes import DerivedFake, Fake, fakes, named_fakes
from torchquant.training.switching import insert_dropouts, insert_norms, lift_dropouts, remove_attention_dropouts

__all__ = ["notes", "prepare"]

_NOTES = "torchquant_training"  # in a graph's meta


@unchanged()
def prepare(
    graph: GraphModule,
    quantizer: Quantizer | None = None,
    *,
    weights: int | None = None,
    activations: int | None = None,
    exclude: Sequence[str] = (),
) -> GraphModule:
    """A copy of a graph to be trained, whose forward rounds as convert will; the caller's model is not changed.

    The copy has parameters of its own, and `train()` and `eval()` switch its dropout and BatchNorm, with the p,
    momentum and eps of the model, whichever mode it was exported in.

    Args:
        graph: a float graph (`torchquant.export`, `torch.export.export(...).module()`), with a Quantizer; or what
            `prepare_pt2e` or `prepare_qat_pt2e` made of one, calibrated or not, with answers of `tq.optimize` or not:
            training starts from these. `prepare_pt2e` has folded BatchNorm into the weights, which are then trained so.
        quantizer: any Quantizer, made for training: `X86Quantizer(is_qat=True)`.
        weights, activations, exclude: fewer bits, see `narrow`; only with a Quantizer.

    Raises:
        InputError: no such graph, a batch that is always 1, or no parameter that can be trained.
        PrepareError: the Quantizer fails, is not made for training, or annotates nothing.
        SchemeError: two formats for one weight, or bits that a format does not have.
    """
    _check(graph, quantizer)
    remarks: list[str] = []
    model = passes.copy_graph(graph)
    own_tensors(model)
    if quantizer is not None:
        trainable = {id(p) for p in model.parameters()}
        dropouts, lost = lift_dropouts(model), remove_attention_dropouts(model)
        model = _annotated(model, quantizer)
        for parameter in model.parameters():  # a weight that the Quantizer transposed
            parameter.requires_grad_(parameter.requires_grad or id(parameter) not in trainable)
        remarks += insert_dropouts(model, dropouts) + lost
        if weights is not None or activations is not None or exclude:
            narrow(model, weights=weights, activations=activations, exclude=exclude)
    elif weights is not None or activations is not None or exclude:
        raise InputError("a prepared graph has its bits: call torchquant.qat.narrow(prepared, ...) before calibration")
    else:
        remarks += remove_attention_dropouts(model) + insert_dropouts(model, [])
    remarks += _swap(model)
    named_fakes(model)
    _see_weights(model)
    _refuse_two_formats(model)
    remarks += insert_norms(model)
    _see_weights(model)  # again: norms are folded
    _check_trainable(model, graph)
    for fake in fakes(model):
        fake.keep_for_training()
    _unlock(model)
    model.meta[_NOTES] = remarks
    return model


def notes(prepared: GraphModule) -> list[str]:
    """What `prepare` did that the user should know: fake quantizers replaced, BatchNorm folded.

    Args:
        prepared: a graph of `torchquant.qat.prepare`.
    """
    return list(prepared.meta.get(_NOTES, []))


# checks -----------------------------------------------------------------------------------------------------------


def _check(graph: object, quantizer: object) -> None:
    if not isinstance(graph, GraphModule):
        raise InputError(f"prepare takes an exported graph, e.g. of torchquant.export, not {type(graph).__name__}")
    if is_converted(graph):
        raise InputError("the graph is converted: its weights are codes, which cannot be trained; take the float graph")
    if _NOTES in graph.meta:
        raise InputError("the graph is prepared for training already; go on with it, or take the float graph")
    prepared = is_prepared(graph)
    if prepared and quantizer is not None:
        raise InputError("the graph is prepared: leave the Quantizer out, or give the exported float graph")
    if not prepared:
        if quantizer is None:
            raise InputError("a float graph needs a Quantizer: prepare(exported, X86Quantizer(is_qat=True))")
        check_quantizer(quantizer)
        _refuse_fixed_modes(graph)
    if prepared and hidden_states(graph):
        raise InputError(
            "prepare_qat_pt2e has written this graph's BatchNorm as arithmetic, and lost its momentum and eps; give "
            "torchquant.qat.prepare the exported graph and the Quantizer"
        )
    sizes = [spec.shape[0] for spec in Signature.of(graph).tensors if spec.shape]
    if sizes and all(size == 1 for size in sizes):
        raise InputError(
            "the graph was exported with a batch of 1, which is a constant of it, so that it cannot be trained on "
            "batches: export with two samples or more and dynamic_shapes={'x': {0: torch.export.Dim('batch')}}"
        )


_FIXED_MODES = (
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "instance_norm",
    "native_batch_norm",
)


def _refuse_fixed_modes(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        name, arguments = ops.overload_of(node).partition(".")[0], ops.arguments(node)
        training = arguments.get("training", arguments.get("use_input_stats", "with_update" in name))
        if name in _FIXED_MODES and training and arguments.get("running_mean") is not None:
            raise InputError(
                f"{node.name} ({name}) is a normalization in training mode that no evaluation switches, so that what "
                "is converted would depend on the batch: export the model in evaluation, without run_decompositions"
            )


def _check_trainable(model: GraphModule, graph: GraphModule) -> None:
    if not fakes(model):
        raise PrepareError(
            "the Quantizer annotated nothing, so there is nothing to train in few bits: torchquant.report("
            f"torchquant.prepare(exported, quantizer)) says why for each op of {type(graph).__name__}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("every parameter of the graph is frozen (requires_grad is False); nothing can be trained")


def _refuse_two_formats(model: GraphModule) -> None:
    formats: dict[int, tuple[Fake, str]] = {}
    for node, fake in _fake_nodes(model):
        source = node.args[0]
        if not fake.is_weight or not isinstance(source, Node) or source.op != "get_attr":
            continue
        readers = ", ".join(ops.module_path(user) or user.name for user in node.users)
        known, others = formats.setdefault(id(_value(model, source)), (fake, readers))
        if known is not fake and known.in_words() != fake.in_words():
            raise SchemeError(
                f"weight {source.target} is shared, and has two formats: {known.in_words()} in {others}, "
                f"{fake.in_words()} in {readers}. It cannot be trained to both: give both one scheme, or exclude one"
            )


# the copy ---------------------------------------------------------------------------------------------------------


class _WithNorms(Quantizer):
    """A Quantizer behind which torchao finds no BatchNorm to write as arithmetic: `insert_norms` does better."""

    def __init__(self, inner: Quantizer) -> None:
        super().__init__()
        self.inner = inner

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        transformed: GraphModule = self.inner.transform_for_annotation(model)
        return transformed

    def annotate(self, model: GraphModule) -> GraphModule:
        annotated: GraphModule = self.inner.annotate(model)
        return annotated

    def validate(self, model: GraphModule) -> None:
        self.inner.validate(model)
        passes.hide_batch_norms(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        self.inner.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)


def _annotated(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    name = f"{type(quantizer).__module__}.{type(quantizer).__name__}"
    try:
        prepared: GraphModule = prepare_qat_pt2e(model, _WithNorms(quantizer))
    except (TorchquantError, Warning):
        raise
    except Exception as error:
        raise PrepareError(
            f"{name} cannot annotate this model for training: {type(error).__name__}: {error}"
        ) from error
    passes.show_batch_norms(prepared)
    inserted = [observer for _, observer in observers(prepared)]
    static = [o for o in inserted if not getattr(o, "is_dynamic", False)]
    if static and not any(isinstance(o, FakeQuantizeBase) for o in inserted):
        raise PrepareError(
            f"{name} inserted observers, which round nothing, so that training would be in float: make it for training "
            f"({type(quantizer).__name__}(is_qat=True), or its configuration with is_qat=True), or calibrate what "
            "prepare_pt2e makes and give that"
        )
    return prepared


def _unlock(model: GraphModule) -> None:
    """Let `train()` and `eval()` be those of any module; torchao forbids them, since aten ops have no mode."""
    for name in ("train", "eval"):
        vars(model).pop(name, None)
    model.recompile()
    model.train()


# fake quantizers --------------------------------------------------------------------------------------------------


def _swap(model: GraphModule) -> list[str]:
    """Put a `Fake` in the place of each observer and fake quantizer, those under several names once."""
    replaced: dict[str, int] = {}
    places: dict[int, tuple[str, Any, bool]] = {}
    for node, observer in observers(model):
        weight = ops.is_constant(node.args[0]) and not hasattr(observer, "obs_or_fqs")  # type: ignore[arg-type]
        target, _, known = places.get(id(observer), (str(node.target), observer, False))
        places[id(observer)] = target, observer, known or weight
        if isinstance(observer, (SolvedWeight, SolvedActivation)):
            _start_from(model, node, observer)
    for target, observer, weight in places.values():
        fake = observer if isinstance(observer, Fake) else _fake_for(observer)
        fake.is_weight = fake.is_weight or weight
        if fake.is_weight and not _is_solved(fake):
            _follow_the_weight(fake.activation_post_process)
        if fake is not observer:
            put_observer(model, target, observer, fake)
            if isinstance(observer, FakeQuantizeBase):
                replaced[type(observer).__name__] = replaced.get(type(observer).__name__, 0) + 1
    return [f"{count} {name} replaced: its training arithmetic is not convert's" for name, count in replaced.items()]


def _fake_for(observer: Any) -> Fake:
    inner = getattr(observer, "activation_post_process", observer)
    if hasattr(inner, "obs_or_fqs"):
        return DerivedFake(inner)
    fake = Fake(inner)
    if fake.has_grid and not fake.is_waiting and not fake.is_weight:
        scale, zero_point = inner.calculate_qparams()
        fake.take_qparams(scale, zero_point)
        fake.observes = isinstance(observer, FakeQuantizeBase)  # a calibrated observer keeps its range
    return fake


def _is_solved(fake: Fake) -> bool:
    return isinstance(getattr(fake.activation_post_process, "grid", None), Grid)


def _follow_the_weight(observer: Any) -> None:
    """Moving averages of a weight's range lag behind the weight."""
    if hasattr(observer, "averaging_constant"):
        observer.averaging_constant = 1.0


def _start_from(model: GraphModule, node: Node, observer: SolvedWeight | SolvedActivation) -> None:
    """Move a weight next to the codes that an algorithm chose, so that training starts from these."""
    source = node.args[0]
    if not isinstance(observer, SolvedWeight) or not isinstance(source, Node) or source.op != "get_attr":
        return
    weight: Any = _value(model, source)
    chosen, steps = observer.codes.float(), observer.grid.encode(weight.detach().float())
    scale, zero_point = observer.grid.expand(weight.shape)
    exact = weight.detach().float() / scale + zero_point
    near = torch.where(steps == chosen, exact, chosen + (exact - chosen).clamp(-_NEAR, _NEAR))
    with torch.no_grad():
        weight.copy_((near - zero_point) * scale)


_NEAR = 0.45  # steps from a code chosen before, within which training starts


def _see_weights(model: GraphModule) -> None:
    """Let each weight's fake quantizer take its grid: weights need no data."""
    for node, fake in _fake_nodes(model):
        if fake.is_weight and isinstance(node.args[0], Node):
            fake.observe(ops.constant_value(model, node.args[0]))
            fake.observes = fake.observes and not _is_solved(fake)


def _fake_nodes(model: GraphModule) -> list[tuple[Node, Fake]]:
    return [(node, module) for node, module in observers(model) if isinstance(module, Fake)]


def _value(model: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(model)
