"""What torchquant writes about itself inside a zip archive: format, versions, a payload, and digests of all the rest.

The digests notice damage to any byte that a reader would use. They are no signature: who writes a file writes them too.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torchquant.errors import ArtifactError
from torchquant.files.whole import digest, reading

__all__ = [
    *("FORMAT", "NAME", "compress", "contents", "entries", "members", "read", "read_any", "refuse_too_large", "seal"),
    "text_of",
    "versions",
]

FORMAT = 3  # raised when an older reader could not make sense of what is written
NAME = "torchquant.json"
_WHAT = "a .pt2 archive"
_LONGEST_END = 22 + 0xFFFF  # bytes of the record at the end of a zip file, with a comment
_COUNTED_ELSEWHERE = 0xFFFF  # the count that sends readers to a larger record


def versions() -> dict[str, str]:
    """The versions of torchquant, torch and torchao that are running."""
    return {name: _version(name) for name in ("torchquant", "torch", "torchao")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def seal(package: Path, kind: str, payload: dict[str, Any]) -> None:
    """Add `payload`, with what it is, who wrote it, and digests of each member and of what stands before the zip."""
    with zipfile.ZipFile(package) as source:
        root = source.namelist()[0].partition("/")[0]
        about = {"format": FORMAT, "kind": kind, "versions": versions(), **payload}
        about["members"] = {entry.filename: digest(source.read(entry)) for entry in source.infolist()}
        about["before"] = digest(_before(package, source))
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as out:
        out.writestr(f"{root}/extra/{NAME}", text_of(about))


def text_of(about: dict[str, Any]) -> str:
    """The JSON to store, with a digest of itself."""
    return json.dumps({**about, "digest": _digest_of(about)})


def _digest_of(about: dict[str, Any]) -> str:
    return digest(json.dumps(about, sort_keys=True).encode())


def _before(package: Path, source: zipfile.ZipFile) -> bytes:
    """The bytes of the file in front of its archive: the program of a `.pte`."""
    start = min((entry.header_offset for entry in source.infolist()), default=0)
    with package.open("rb") as file:
        return file.read(start)


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The JSON that an archive of `kind` carries, once all of it is known to be as it was written.

    Raises:
        ArtifactError: no such file, truncated, damaged, not written by torchquant, of another kind or format.
    """
    return _of_kind(read_any(path), path, kind)


def read_any(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON that an archive carries, of whatever `kind`; raises as `read`."""
    return _checked(path, None)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive that carries torchquant's JSON, undamaged or not."""
    try:
        with zipfile.ZipFile(path) as source:
            return any(name.endswith(f"extra/{NAME}") for name in source.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def contents(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON, and all members by their names without the archive's root, as they were checked; raises as `read`."""
    raw: dict[str, bytes] = {}
    return _of_kind(_checked(path, raw), path, kind), raw


def _of_kind(about: dict[str, Any], path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    if about.get("kind") != kind:
        raise ArtifactError(f"{path} holds a {about.get('kind')!r}, not a {kind!r}")
    return about


def _checked(path: str | os.PathLike[str], keep: dict[str, bytes] | None) -> dict[str, Any]:
    file = Path(path)
    _require(file)
    with reading(file, _WHAT), zipfile.ZipFile(file) as source:
        names = [entry.filename for entry in _entries_of(file, source)]
        notes = [name for name in names if name.endswith(f"extra/{NAME}")]
        if not notes:
            raise ArtifactError(f"{file} was not written by torchquant: it has no {NAME}; save it again")
        about = _parsed(file, source.read(notes[-1]))
        _refuse_changed(file, set(about["members"]) ^ {name for name in names if name not in notes})
        for name, content in entries(file, source):
            if name not in notes and digest(content) != about["members"][name]:
                _refuse_changed(file, {name})
            if keep is not None:
                keep[name.partition("/")[2]] = content
        if about["before"] != digest(_before(file, source)):
            _refuse_changed(file, {"its start"})
    return about


def _refuse_changed(file: Path, members: set[str]) -> None:
    if members:
        names = ", ".join(sorted(members)[:3])
        raise ArtifactError(f"{file} is damaged: {names} is not as it was written")


def _require(file: Path) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file")


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ArtifactError(f"{file} is damaged: its {NAME} holds no object")
    if about.get("format") != FORMAT:
        writers = about.get("versions")
        writer = writers.get("torchquant") if isinstance(writers, dict) else "of an unknown version"
        raise ArtifactError(
            f"{file} has format {about.get('format')} (torchquant {writer}); this one reads {FORMAT}. Save it again."
        )
    recorded = about.pop("digest", None)
    if recorded != _digest_of(about) or not isinstance(about.get("members"), dict) or "before" not in about:
        raise ArtifactError(f"{file} is damaged: its {NAME} is not as it was written")
    return about


def members(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """All members of any zip archive by their names without the archive's root, their checksums checked.

    Raises:
        ArtifactError: no such file, truncated, damaged, or two members of one name.
    """
    file = Path(path)
    _require(file)
    with reading(file, _WHAT), zipfile.ZipFile(file) as source:
        return {name.partition("/")[2]: content for name, content in entries(file, source)}


def refuse_too_large(path: str | os.PathLike[str]) -> None:
    """Raise ArtifactError where the members of a zip archive would not go into memory, however small the file is."""
    with zipfile.ZipFile(path) as source:
        _entries_of(Path(path), source)


def entries(file: Path, source: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all members, with their checksums checked, which is done where one is read to its end.

    Raises:
        ArtifactError: as `_entries_of`, or a member is shorter than its entry says.
    """
    for entry in _entries_of(file, source):
        content = source.read(entry)
        if len(content) != entry.file_size:  # then zipfile has not compared the checksum
            raise ArtifactError(f"{file} is damaged: {entry.filename} has {len(content)} bytes of {entry.file_size}")
        yield entry.filename, content


def _entries_of(file: Path, source: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members, each once, as many as the archive counts, if all of them go into half of the machine's memory."""
    seen: set[str] = set()
    listed, count = len(source.infolist()), _recorded_count(file)
    if count not in (listed, _COUNTED_ELSEWHERE):
        raise ArtifactError(f"{file} is damaged: it lists {listed} members and says that it has {count}")
    for entry in source.infolist():
        if entry.filename in seen:
            raise ArtifactError(f"{file} is damaged: it holds {entry.filename} twice")
        seen.add(entry.filename)
    size, room = sum(entry.file_size for entry in source.infolist()), _memory_bytes() // 2
    if size > room:
        raise ArtifactError(f"{file} unpacks to {size:,} bytes, more than half of this machine's memory")
    return source.infolist()


def _memory_bytes() -> int:
    """What the machine has; where the system does not say, more than any file."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 62


def _recorded_count(file: Path) -> int:
    """How many members an archive has by the record at its end, which zipfile does not look at."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _LONGEST_END))
        end = opened.read()
    start = end.rfind(b"PK\x05\x06")
    return int.from_bytes(end[start + 10 : start + 12], "little")


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
