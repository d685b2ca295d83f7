"""What changes in the course of a training, and what must not happen in it."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from torchquant.errors import InputError, TrainingError
from torchquant.training.converting import check_steps, check_trained
from torchquant.training.fakes import fakes
from torchquant.training.norms import norms

__all__ = ["Schedule", "schedule"]


class Schedule:
    """Counts the steps of a training; see `schedule`.

    Args:
        prepared, steps, observers_off, norms_frozen: as for `schedule`.
    """

    def __init__(self, prepared: GraphModule, steps: int, observers_off: float, norms_frozen: float) -> None:
        self.prepared, self.steps, self.done = prepared, steps, 0
        self._observers_off, self._norms_frozen = round(observers_off * steps), round(norms_frozen * steps)
        self._apply()

    def step(self, loss: torch.Tensor | None = None) -> None:
        """Call it between `loss.backward()` and `optimizer.step()`.

        Raises:
            TrainingError: the loss or a gradient is not finite, or a learned step is not positive: which layer, and in
                which step (counted from 1). The parameters are still those from before the step.
        """
        when = f" in step {self.done + 1}"
        if loss is not None and not bool(loss.detach().isfinite().all()):
            raise TrainingError(f"the loss is {float(loss.detach().float().mean())}{when}{self._culprit()}")
        check_steps(self.prepared, when)
        _check_gradients(self.prepared, when)
        self.done += 1
        self._apply()

    def _apply(self) -> None:
        if self.done >= self._observers_off:
            for fake in fakes(self.prepared):
                if not fake.is_weight and fake.observes:
                    fake.require_data()
                    fake.disable_observer()
        if self.done >= self._norms_frozen:
            for _, norm in norms(self.prepared):
                norm.frozen = True

    def _culprit(self) -> str:
        broken = [n for n, p in self.prepared.named_parameters() if not bool(p.detach().isfinite().all())]
        return (
            f": {broken[0]} holds NaN or infinity already"
            if broken
            else ": look at the batch, or lower the learning rate"
        )

    def state_dict(self) -> dict[str, int]:
        """How far the training is."""
        return {"done": self.done, "steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where another schedule of as many steps was."""
        if not isinstance(state, dict) or state.get("steps") != self.steps:
            raise InputError(f"the state is not one of a schedule of {self.steps} steps: {state!r:.80}")
        self.done = int(state["done"])
        self._apply()


def schedule(prepared: GraphModule, steps: int, *, observers_off: float = 0.5, norms_frozen: float = 0.75) -> Schedule:
    """A schedule for a training of so many steps: `schedule.step(loss)` before each `optimizer.step()`.

    Ranges of activations that no method learns follow moving averages, and BatchNorm's statistics those of the batches;
    the last part of a training is for what the converted graph has: fixed ones.

    Args:
        prepared: a graph of `torchquant.qat.prepare`.
        steps: of the whole training; epochs times batches.
        observers_off, norms_frozen: parts of the training after which ranges and statistics stay; 1 for never.

    Raises:
        InputError: not a graph of `torchquant.qat.prepare`, or numbers out of range.
        CalibrationError: ranges would stay from the start on, and one was never seen.
    """
    check_trained(prepared)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is the whole number of steps of the training, not {steps!r}")
    for name, part in (("observers_off", observers_off), ("norms_frozen", norms_frozen)):
        if not 0 <= part <= 1:
            raise InputError(f"{name} is a part of the training, 0 to 1, not {part}")
    return Schedule(prepared, steps, observers_off, norms_frozen)


def _check_gradients(prepared: nn.Module, when: str) -> None:
    gradients = [(name, p.grad) for name, p in prepared.named_parameters() if p.grad is not None]
    named = [(name, g.coalesce().values() if g.is_sparse else g) for name, g in gradients]
    if not named:
        raise TrainingError(f"no parameter has a gradient{when}: call schedule.step after loss.backward()")
    norms_of = torch._foreach_norm([gradient for _, gradient in named], torch.inf)
    finite = torch.stack([n.float() for n in norms_of]).isfinite()
    if not bool(finite.all()):
        name = named[int((~finite).nonzero()[0])][0]
        raise TrainingError(
            f"the gradient of {name} holds NaN or infinity{when}: lower the learning rate, clip gradients, or look at "
            "the loss; the parameters are those from before this step"
        )
