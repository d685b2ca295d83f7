"""Files are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torchquant.errors import ArtifactError
from torchquant.owned import OwnFolder


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    Raises:
        ArtifactError: the folder does not exist or cannot be written. Nothing is left behind;
            what a process left that was killed meanwhile goes at the next write into the same folder.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise ArtifactError(f"cannot write {target}: it is a folder")
        with OwnFolder(f".{target.name}.", target.parent) as folder:
            part = folder / target.name
            write(part)
            os.replace(part, target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}. Choose another folder.") from error
    return target
