"""JSON of a checkpoint: objects of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchquant.files.whole import reading

__all__ = ["json_in"]

_LARGEST = 64 << 20  # bytes


def json_in(file: Path) -> dict[str, Any]:
    """The object in a file; raises ArtifactError if there is none."""
    with reading(file, "a .json file", "download it again"):
        if (size := file.stat().st_size) > _LARGEST:
            raise ValueError(f"{size:,} bytes")
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
