"""What torchquant writes about itself inside a `.pt2` archive: format, versions, and a payload."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torchquant.errors import ArtifactError

__all__ = ["FORMAT", "NAME", "compress", "read", "read_any", "text_of", "versions"]

FORMAT = 2  # raised when an older reader could not make sense of what is written
NAME = "torchquant.json"


def versions() -> dict[str, str]:
    """The versions of torchquant, torch and torchao that are running."""
    return {name: _version(name) for name in ("torchquant", "torch", "torchao")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def text_of(kind: str, payload: dict[str, Any]) -> str:
    """The JSON to store: `payload` with what it is and who wrote it."""
    return json.dumps({"format": FORMAT, "kind": kind, "versions": versions(), **payload})


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The JSON that an archive of `kind` carries.

    Raises:
        ArtifactError: no such file, truncated, not written by torchquant, of another kind or format.
    """
    found = read_any(path)
    if found.get("kind") != kind:
        raise ArtifactError(f"{path} holds a {found.get('kind')!r}, not a {kind!r}")
    return found


def read_any(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON that an archive carries, of whatever `kind`; raises as `read`."""
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")
    try:
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if n.endswith(f"extra/{NAME}")]
            if not names:
                raise ArtifactError(f"{file} was not written by torchquant: it has no {NAME}; save it again")
            damaged = archive.testzip()
            found: Any = json.loads(archive.read(names[0]))
    except (zipfile.BadZipFile, EOFError, json.JSONDecodeError, zlib.error) as error:
        raise ArtifactError(f"{file} is truncated or not a .pt2 archive: {error}") from error
    if damaged:
        raise ArtifactError(f"{file} is damaged: {damaged} does not match its checksum")
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is damaged: its {NAME} holds no object")
    if found.get("format") != FORMAT:
        writer = found.get("versions", {}).get("torchquant", "an unknown version")
        raise ArtifactError(
            f"{file} has format {found.get('format')} (torchquant {writer}); this one reads {FORMAT}. Save it again."
        )
    return dict(found)


def compress(plain: Path, out: Path, keep: Callable[[str, bytes], bytes | None] | None = None) -> None:
    """Write a copy of a zip archive with every entry deflated; torch writes them uncompressed.

    Args:
        keep: called with (name, content); what to store instead, or None to leave the entry out.
    """
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            stored = content if keep is None else keep(entry.filename, content)
            if stored is not None:
                target.writestr(entry.filename, stored)
