"""The optional libraries of language models, imported when they are first needed: the extra `torchquant[llm]`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torchquant.errors import MissingDependencyError

__all__ = ["gguf", "transformers"]


@cache
def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise MissingDependencyError(
            f"language models need {library}, which is not installed: pip install 'torchquant[llm]'"
        ) from error


def transformers(part: str = "") -> Any:
    """The package `transformers`, or the module `part` of it; raises MissingDependencyError."""
    return _imported(f"transformers.{part}" if part else "transformers")


def gguf() -> Any:
    """The package `gguf`; raises MissingDependencyError."""
    return _imported("gguf")
