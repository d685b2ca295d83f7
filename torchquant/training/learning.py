"""Which method trains which grid, and the groups of parameters that an optimizer takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase, FixedQParamsObserver

from torchquant.calibration.calibrate import calibrate
from torchquant.errors import InputError
from torchquant.fx import ops
from torchquant.fx.patterns import match
from torchquant.fx.reading import observers
from torchquant.observers.ranges import ActivationMSE
from torchquant.solving.solved import put_observer
from torchquant.surroundings import unchanged
from torchquant.training.converting import check_trained
from torchquant.training.fakes import Fake, fakes, named_fakes
from torchquant.training.lsq import LSQ

__all__ = ["Method", "learn_steps", "parameters"]


class Method(Protocol):
    """How a grid is trained: `LSQ`, `LSQPlus`, `PACT`, `DoReFa`, `EWGS`, or one of your own."""

    def weight(self, fake: Fake, weight: torch.Tensor) -> Fake:
        """What takes the place of a weight's fake quantizer."""

    def activation(self, fake: Fake) -> Fake:
        """What takes the place of a static activation's fake quantizer, which is calibrated."""


@unchanged()
def learn_steps(
    prepared: GraphModule,
    weights: Method | None = LSQ(),  # noqa: B008 - a frozen value
    activations: Method | None = LSQ(),  # noqa: B008
    *,
    batches: Iterable[Any] | None = None,
    exclude: Sequence[str] = (),
) -> int:
    """Let grids of a calibrated graph be trained by a method; make the optimizer afterwards: there are new parameters.

    Dynamic grids, and formats that are no affine grid, have no step to learn and stay as they are.

    Args:
        prepared: what `torchquant.qat.prepare` returned.
        weights, activations: a method for each; None leaves them to their observers.
        batches: if given, activations start at the range of least squared error on these instead of the calibrated one.
        exclude: patterns (see `torchquant.fx.patterns.match`) of ops whose weight and inputs stay as they are.

    Returns:
        How many grids are learned.

    Raises:
        InputError: not such a graph, no method, or nothing to learn.
        CalibrationError: a range was never seen.
        SchemeError: a method cannot honour how a tensor is quantized.
        PatternError: a pattern matches nothing.
    """
    check_trained(prepared)
    if weights is None and activations is None:
        raise InputError("learn_steps was given no method, e.g. weights=torchquant.qat.LSQ()")
    chosen = _chosen(prepared, weights, activations, exclude)
    if batches is not None:
        _search_ranges(prepared, [fake for _, fake, method in chosen if not fake.is_weight], batches)
    for _, fake, _ in chosen:
        fake.require_data()
    learned = [_learned(prepared, node, fake, method) for node, fake, method in chosen]
    for (node, fake, _), new in zip(chosen, learned, strict=True):  # only now, when no method has refused
        put_observer(prepared, str(node.target), fake, new)
    return len(chosen)


def _learned(prepared: GraphModule, node: Node, fake: Fake, method: Method) -> Fake:
    value = ops.constant_value(prepared, node.args[0]) if fake.is_weight else None  # type: ignore[arg-type]
    new = method.activation(fake) if value is None else method.weight(fake, value)
    new.train(fake.training)
    new.site = fake.site
    new.keep_for_training()
    return new


def _chosen(
    prepared: GraphModule, weights: Method | None, activations: Method | None, exclude: Sequence[str]
) -> list[tuple[Node, Fake, Method]]:
    kept = {node for pattern in exclude for node in match(prepared, pattern)}
    readers: dict[Fake, set[Node]] = {}
    for node, module in observers(prepared):
        if isinstance(module, Fake):
            readers.setdefault(module, set()).update(node.users)
    chosen = []
    for node, fake in named_fakes(prepared):
        method = weights if fake.is_weight else activations
        if method is not None and fake.has_grid and not readers[fake] & kept and not _is_fixed(fake):
            chosen.append((node, fake, method))
    if not chosen:
        raise InputError("there is no step to learn: no static integer grid is left, or all are excluded")
    return chosen


def _is_fixed(fake: Fake) -> bool:
    """Whether a grid is the Quantizer's to choose: fixed qparams, and activations that torchao cuts into blocks."""
    inner = fake.activation_post_process
    blocks = isinstance(inner, AffineQuantizedObserverBase) and not fake.is_weight
    return blocks or isinstance(inner, FixedQParamsObserver)


def _search_ranges(prepared: GraphModule, chosen: Sequence[Fake], batches: Iterable[Any]) -> None:
    """Give per-tensor activations the range of least squared error over some batches of the float function."""
    standing = {}
    for fake in chosen:
        if fake.scale.numel() == 1 and fake.dtype in (torch.int8, torch.uint8):
            inner: Any = fake.activation_post_process
            limits = {"quant_min": int(fake.quant_min), "quant_max": int(fake.quant_max)}
            search = ActivationMSE(dtype=fake.dtype, qscheme=fake.qscheme, **limits)
            search.floors = getattr(inner, "floors", ())
            standing[fake] = inner
            fake.activation_post_process = search
    try:
        calibrate(prepared, batches, progress=False)
    finally:
        for fake, inner in standing.items():
            search, fake.activation_post_process = fake.activation_post_process, inner
            if bool(search.min_val.isfinite().all()):
                fake.take_qparams(*search.calculate_qparams())


def parameters(
    prepared: GraphModule, lr: float, *, step_lr: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups of parameters for Adam and its like: weights with weight decay, biases, norms and learned steps without.

    An update of such an optimizer has about the size of its learning rate, and steps are of very different sizes: each
    gets one in proportion to itself. For SGD, whose updates are in proportion to gradients, make groups of your own.

    Args:
        prepared: a graph of `torchquant.qat.prepare`.
        lr: of weights, biases and norms.
        step_lr: of learned steps, clips and offsets: the part of itself by which an update moves a step.
        weight_decay: of weights of two axes and more.
    """
    check_trained(prepared)
    sized: dict[float, list[torch.nn.Parameter]] = {}
    for fake in fakes(prepared):
        size = float(fake.calculate_qparams()[0].mean()) if fake.learned else 1.0
        for parameter in fake.parameters(recurse=False):
            whole = float(parameter.detach().mean()) if parameter in set(fake.learned.values()) else size
            sized.setdefault(2.0 ** round(math.log2(max(whole, 2.0**-60))), []).append(parameter)
    known = {id(p) for found in sized.values() for p in found}
    rest = [p for p in prepared.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        *({"params": found, "lr": step_lr * size, "weight_decay": 0.0} for size, found in sorted(sized.items())),
    ]
    return [group for group in groups if group["params"]]
