"""A model that runs with weights which are decoded one module at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from torchquant.files.shelf import give_back_between

__all__ = ["Loan", "lent"]


class Decoded(Protocol):
    """What can be decoded."""

    def values(self) -> Tensor:
        """In the shape of the parameter."""


class Loan:
    """A module that has other weights while it runs.

    Args:
        path: its name. weights: by the names of its own parameters.
    """

    def __init__(self, path: str, module: nn.Module, weights: Mapping[str, Decoded]) -> None:
        self.path, self.was_used = path, False
        self._module, self._weights = module, weights
        self._own: dict[str, Any] = {}

    def give(self, *_: Any) -> None:
        """Put the weights in, if they are not there."""
        self.was_used = True
        for name, weight in self._weights.items() if not self._own else ():
            own = self._own[name] = self._module._parameters[name]
            device = None if own is None else own.device
            self._module._parameters[name] = nn.Parameter(weight.values().to(device), requires_grad=False)

    def take(self, *_: Any) -> None:
        """Give the module its own back."""
        self._module._parameters.update(self._own)
        self._own.clear()
        give_back_between()

    def hooks(self) -> list[Any]:
        """Let it have the weights whenever it runs."""
        before = self._module.register_forward_pre_hook(self.give)
        return [before, self._module.register_forward_hook(self.take, always_call=True)]


@contextmanager
def lent(model: nn.Module, weights: Mapping[str, Decoded], throughout: Sequence[str] = ()) -> Iterator[list[Loan]]:
    """Inside the block, modules have these weights while they run.

    Args:
        weights: by the names of the model's parameters.
        throughout: names of modules that have theirs all the time.
    """
    by_module: dict[str, dict[str, Decoded]] = {}
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = weight
    loans = [Loan(path, model.get_submodule(path), leaves) for path, leaves in by_module.items()]
    hooks: list[Any] = []
    try:
        for loan in loans:
            if loan.path in throughout:
                loan.give()
            else:
                hooks += loan.hooks()
        yield loans
    finally:
        for hook in hooks:
            hook.remove()
        for loan in loans:
            loan.take()
