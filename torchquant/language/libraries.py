"""The optional libraries of language models, imported when they are first needed: extras `llm` and `harness`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torchquant.errors import MissingDependencyError

__all__ = ["gguf", "lm_eval", "transformers"]

_EXTRAS = {"lm_eval": "harness"}


@cache
def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        extra = _EXTRAS.get(library, "llm")
        raise MissingDependencyError(
            f"language models need {library}, which is not installed: pip install 'torchquant[{extra}]'"
        ) from error


def transformers(part: str = "") -> Any:
    """The package `transformers`, or the module `part` of it; raises MissingDependencyError."""
    return _imported(f"transformers.{part}" if part else "transformers")


def lm_eval() -> Any:
    """The package `lm_eval`, with its `api.model` and `utils`; raises MissingDependencyError."""
    for part in ("api.model", "utils"):
        _imported(f"lm_eval.{part}")
    return _imported("lm_eval")


def gguf() -> Any:
    """The package `gguf`; raises MissingDependencyError."""
    return _imported("gguf")
