"""From a trained graph to a prepared one with answers, and to the converted one; evaluation in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase, FixedQParamsObserver

from torchquant import flow
from torchquant.errors import InputError, TrainingError
from torchquant.fx import ops, passes
from torchquant.fx.grids import Grid
from torchquant.fx.reading import observer_of, observers
from torchquant.solving.solved import SolvedActivation, SolvedWeight, put_observer
from torchquant.training.copies import own_tensors
from torchquant.training.fakes import Fake, fakes
from torchquant.training.norms import TrainedNorm, norms, scale_channels
from torchquant.training.switching import fold_now, remove_transparent

__all__ = ["check_steps", "check_trained", "convert", "evaluate", "finish"]


@contextmanager
def evaluate(prepared: GraphModule) -> Iterator[GraphModule]:
    """The graph in evaluation, as it will be converted: no range moves, no dropout, BatchNorm by running statistics.

    Args:
        prepared: a graph of `torchquant.qat.prepare`.

    Raises:
        CalibrationError: a range was never seen.
        TrainingError: a learned step is no longer a positive number, or BatchNorm's statistics hold NaN.
    """
    check_trained(prepared)
    check_steps(prepared)
    for fake in fakes(prepared):
        fake.require_data()
    modes = {module: module.training for module in prepared.modules()}
    rounds = {fake: fake.rounds for fake in fakes(prepared)}
    try:
        for module in modes:
            module.training = False
        for fake in rounds:
            fake.rounds = True
        yield prepared
    finally:
        for module, training in modes.items():
            module.training = training
        for fake, on in rounds.items():
            fake.rounds = on


def convert(prepared: GraphModule) -> GraphModule:
    """What training left as a converted graph, as `torchquant.convert` gives it. The trained graph stays as it is.

    Raises:
        InputError: a graph that is not prepared for training.
        CalibrationError: a range was never seen.
        TrainingError: a learned step is no longer a positive number, or BatchNorm's statistics hold NaN.
    """
    return flow.convert(finish(prepared))


def finish(prepared: GraphModule) -> GraphModule:
    """What training left as a calibrated prepared graph with answers in it, for `optimize`, `analyze` and reports.

    BatchNorm is folded, the codes of the weights are those of the last forward, learned ranges are fixed. The trained
    graph stays as it is.

    Raises:
        As `convert`.
    """
    check_trained(prepared)
    check_steps(prepared)
    model = passes.copy_graph(prepared)
    own_tensors(model)
    solved = _solve_weights(model)
    _fold_norms(model, solved)
    for node in list(model.graph.nodes):
        fake = observer_of(model, node)
        if isinstance(fake, Fake):
            answer = solved.get(fake)
            inner = fake.activation_post_process
            put_observer(model, str(node.target), fake, SolvedWeight(*answer, inner) if answer else _range_of(fake))
    remove_transparent(model)
    model.graph.lint()
    model.recompile()
    for module in model.modules():
        module.training = False
    return model


Answers = dict[Fake, tuple[torch.Tensor, Grid]]


def _solve_weights(model: GraphModule) -> Answers:
    """Codes and grid of each weight that has one."""
    answers: Answers = {}
    for node, fake in observers(model):
        if isinstance(fake, Fake) and fake.is_weight and fake.has_grid and fake not in answers:
            answers[fake] = fake.solved(ops.constant_value(model, node.args[0]))  # type: ignore[arg-type]
    return answers


def _range_of(fake: Fake) -> torch.nn.Module:
    """What stands for an activation, or for a weight without an affine grid, in a calibrated graph."""
    inner: Any = fake.activation_post_process
    if not fake.has_grid or fake.is_waiting or isinstance(inner, (FixedQParamsObserver, AffineQuantizedObserverBase)):
        return inner
    scale, zero_point = fake.calculate_qparams()
    if scale.numel() > 1:
        del fake.convert  # torchao's own, by scale and zero point
        return fake
    return SolvedActivation(float(scale), int(zero_point), inner)


def _fold_norms(model: GraphModule, answers: Answers) -> None:
    """Multiply BatchNorm into weights, biases and scales; what stands alone becomes aten's op again."""
    for node, norm in norms(model):
        conv = node.args[0]
        assert isinstance(conv, Node)
        if norm.folded:
            fake = observer_of(model, conv.args[1])  # type: ignore[arg-type]
            assert isinstance(fake, Fake)
            assert fake.folding is not None
            factor = fold_now(model, conv, norm)
            answers[fake] = scale_channels(*answers[fake], factor, fake.folding.axis)
            node.replace_all_uses_with(conv)
        else:
            node.replace_all_uses_with(_as_op(model, node, norm))
        model.graph.erase_node(node)
        model.delete_submodule(str(node.target))


def _as_op(model: GraphModule, node: Node, norm: TrainedNorm) -> Node:
    tensors = {"weight": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
    with model.graph.inserting_before(node):
        read = [
            None if value is None else passes.add_buffer(model, f"{node.name}_{name}", value.detach())
            for name, value in tensors.items()
        ]
        args = (node.args[0], *read, False, norm.momentum, norm.eps, False)
        call = model.graph.call_function(torch.ops.aten.batch_norm.default, args)
    call.meta = dict(node.meta)
    return call


# checks -----------------------------------------------------------------------------------------------------------


def check_trained(prepared: object) -> None:
    """Raise InputError unless it is what `torchquant.qat.prepare` returned."""
    if not isinstance(prepared, GraphModule) or not fakes(prepared):
        what = type(prepared).__name__
        raise InputError(
            f"this takes the graph that torchquant.qat.prepare returned; {what} has no fake quantizer of it"
        )


def check_steps(prepared: GraphModule, when: str = "") -> None:
    """Raise TrainingError if a learned step is not a positive number, or a statistic of BatchNorm is no number."""
    for fake in fakes(prepared):
        for name, value in fake.learned.items():
            if not bool((value > 0).all() & value.isfinite().all()):
                worst = float(value.detach().nan_to_num(-torch.inf).min())
                raise TrainingError(
                    f"the learned {name} of {fake.site} is {worst:.3g}{when}, and it must be "
                    "positive: take a lower learning rate for it (step_lr of torchquant.qat.parameters), no weight "
                    "decay, and an earlier checkpoint"
                )
    for node, norm in norms(prepared):
        if not bool((norm.running_mean + norm.running_var).isfinite().all()):
            raise TrainingError(
                f"the running statistics of BatchNorm {node.target} hold NaN or infinity{when}, as a batch did: "
                "load an earlier checkpoint"
            )
