"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torchquant.errors import ArtifactError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    Raises:
        ArtifactError: the folder does not exist or cannot be written. Nothing is left behind.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise ArtifactError(f"cannot write {target}: it is a folder")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            part = Path(folder) / target.name
            write(part)
            os.replace(part, target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}. Choose another folder.") from error
    return target
