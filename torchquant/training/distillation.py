"""Distillation: the float graph teaches the one in few bits, by its outputs and by values at the graph's cut points.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    L = T^2 KL(softmax(teacher / T) || softmax(student / T))                     (section 2)

Values inside, where one tensor crosses the graph (`fx/blocks.py`), are held by their squared error over the teacher's
mean square, so that no layer is named and none outweighs another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from torchquant.calibration import batches as data
from torchquant.errors import InputError
from torchquant.fx import ops, passes
from torchquant.fx.blocks import SOLVABLE, data_order
from torchquant.fx.states import hidden_states
from torchquant.training.converting import check_trained
from torchquant.training.copies import own_tensors
from torchquant.training.fakes import Fake
from torchquant.training.norms import TrainedDropout, TrainedNorm

__all__ = ["Distillation", "kl_divergence", "relative_error"]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL over the last axis, mean over all others."""
    wanted = nn.functional.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    logits = nn.functional.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    return nn.functional.kl_div(logits, wanted, reduction="batchmean", log_target=True) * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's mean square."""
    return (student.float() - teacher.float()).square().mean() / teacher.float().square().mean().clamp(min=1e-12)


class _Tap(nn.Module):
    """Keeps the value that passes."""

    is_transparent = True  # in evaluation and at convert

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        return x

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds no value, which belongs to one forward and its gradients."""
        return {**vars(self), "value": None}


class Distillation:
    """A loss for any loop: `loss = distillation(outputs, inputs)`, beside a loss on labels or alone.

    Args:
        prepared: the student; where features are compared, taps are put into it.
        teacher: the float exported graph that it was prepared from, or any module with the same outputs.
        outputs: "kl" for logits along the last axis, "mse" for anything else, None: not compared.
        temperature: T.
        output_weight: of the outputs' loss.
        feature_weight: of the mean over the cut points; 0: outputs alone. At most `max_cuts` of them, evenly spread.

    Raises:
        InputError: options out of range, a teacher in training mode, or one without the student's cut points.
    """

    def __init__(
        self,
        prepared: GraphModule,
        teacher: nn.Module,
        *,
        outputs: Literal["kl", "mse"] | None = "kl",
        temperature: float = 1.0,
        output_weight: float = 1.0,
        feature_weight: float = 0.0,
        max_cuts: int = 4,
    ) -> None:
        check_trained(prepared)
        if outputs not in ("kl", "mse", None) or (outputs is None and not feature_weight):
            raise InputError(f'outputs is "kl", "mse", or None with a feature_weight over 0; not {outputs!r}')
        if not temperature > 0 or output_weight < 0 or feature_weight < 0:
            raise InputError("temperature is over 0, weights are 0 or more")
        _check_teacher(teacher)
        self.outputs, self.temperature = outputs, temperature
        self.output_weight, self.feature_weight = output_weight, feature_weight
        self.names: list[str] = []
        self._taps: list[tuple[_Tap, _Tap]] = []
        self.teacher = teacher
        if feature_weight:
            self._tap(prepared, max_cuts)

    def _tap(self, prepared: GraphModule, max_cuts: int) -> None:
        if not isinstance(self.teacher, GraphModule):
            raise InputError("features are compared by the nodes of a graph: give the exported float graph as teacher")
        self.teacher = passes.copy_graph(self.teacher)
        own_tensors(self.teacher)
        nodes = {node.name: node for node in self.teacher.graph.nodes}
        self.names = _spread([n.name for n in cut_points(prepared) if n.name in nodes], max_cuts)
        if not self.names:
            raise InputError("the student has no cut point that the teacher has too; set feature_weight=0")
        by_name = {node.name: node for node in prepared.graph.nodes}
        for name in self.names:
            self._taps.append((_insert(prepared, by_name[name]), _insert(self.teacher, nodes[name])))
        prepared.recompile()
        self.teacher.recompile()

    def __call__(self, outputs: Any, inputs: Any) -> Tensor:
        """The loss of the student's `outputs` for `inputs`, a batch as for `calibrate`."""
        with torch.no_grad():
            wanted = data.call(self.teacher, inputs)
        pairs = _pairs(outputs, wanted)
        loss = outputs_loss = torch.zeros((), device=pairs[0][0].device)
        if self.outputs is not None:
            terms = [
                kl_divergence(s, t, self.temperature) if self.outputs == "kl" else relative_error(s, t)
                for s, t in pairs
            ]
            outputs_loss = torch.stack(terms).mean()
            loss = loss + self.output_weight * outputs_loss
        if self._taps:
            loss = loss + self.feature_weight * torch.stack(self._features()).mean()
        return loss

    def _features(self) -> list[Tensor]:
        errors = []
        for name, (student, teacher) in zip(self.names, self._taps, strict=True):
            if student.value is None or teacher.value is None:
                raise InputError(f"the student was not run on this batch before its loss was asked for ({name})")
            errors.append(relative_error(student.value, teacher.value))
            student.value = teacher.value = None
        return errors


def _pairs(outputs: Any, wanted: Any) -> list[tuple[Tensor, Tensor]]:
    """The float outputs of the student, each with the teacher's."""
    student, teacher = (_floats(values) for values in (outputs, wanted))
    shapes = [[tuple(value.shape) for value in values] for values in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise InputError(f"student and teacher have other outputs: float tensors of {shapes[0]} and of {shapes[1]}")
    return list(zip(student, teacher, strict=True))


def _floats(values: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _check_teacher(teacher: nn.Module) -> None:
    if isinstance(teacher, GraphModule):
        switched = any(m.training for m in teacher.modules() if isinstance(m, (Fake, TrainedNorm, TrainedDropout)))
        draws = any(ops.draws_numbers(node) for node in teacher.graph.nodes)
        moves = switched or draws or bool(hidden_states(teacher))
    else:
        moves = any(module.training for module in teacher.modules())
    if moves:
        raise InputError(
            "the teacher is in training mode: its dropout and BatchNorm would make other targets each time; give it in "
            "evaluation (torchquant.export, or teacher.eval())"
        )


_UNKNOWN = torch.zeros(())  # of nodes that carry no value, such as observers


def cut_points(prepared: GraphModule) -> list[Node]:
    """Nodes behind which one value of the data alone goes on to all that follows, in graph order.

    Observers, norms and taps belong to the node in front of them; reshapes are no points of their own, and sizes are no
    values.
    """
    order = [n for n in data_order(prepared) if isinstance(n.meta.get("val", _UNKNOWN), Tensor)]
    place = {node: i for i, node in enumerate(order)}
    last = [max((place.get(user, len(order)) for user in node.users), default=-1) for node in order]
    points, reach, computed = [], -1, False
    for i, node in enumerate(order):
        if ops.op_name(node) in SOLVABLE:
            computed = True
        others = reach > i
        if node.op == "call_function" and computed and not others and ops.is_float(node) and not _moves(node):
            points.append(node)
        reach = max(reach, last[i])
    return [n for n in points if not _is_followed_by_norm(prepared, n)]


def _moves(node: Node) -> bool:
    kind = ops.kind_of(node)
    return kind is None or kind.moves


def _is_followed_by_norm(prepared: GraphModule, node: Node) -> bool:
    modules = [prepared.get_submodule(str(u.target)) for u in node.users if u.op == "call_module"]
    return any(isinstance(module, TrainedNorm) for module in modules)


def _spread(names: Sequence[str], count: int) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[round((i + 1) * len(names) / count) - 1] for i in range(count)]


def _insert(model: GraphModule, node: Node) -> _Tap:
    """A tap behind a node, in front of what observes it."""
    name, tap = passes.fresh_name(model, f"{node.name}_tap"), _Tap()
    model.add_submodule(name, tap)
    with model.graph.inserting_after(node):
        call = model.graph.call_module(name, (node,))
    call.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return tap
