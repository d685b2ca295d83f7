"""Archives rewritten by hand, sealed again, so that no digest stands in the way of what is in them."""

import io
import json
import os
import pickle
import zipfile

import torch

from torchquant.files import archive

SEAL = ("format", "kind", "versions", "members", "before", "digest")


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def pickled(command):
    """As torch.save writes it."""
    out = io.BytesIO()
    torch.save(Payload(command), out)
    return out.getvalue()


def plainly_pickled(command):
    return pickle.dumps(Payload(command))


def members(path):
    """name without the root -> content, of what torchquant did not write itself."""
    with zipfile.ZipFile(path) as source:
        contents = {n.partition("/")[2]: source.read(n) for n in source.namelist()}
    return {n: c for n, c in contents.items() if not n.endswith(archive.NAME)}


def about(path):
    """What torchquant wrote about an archive, or None."""
    with zipfile.ZipFile(path) as source:
        names = [n for n in source.namelist() if n.endswith(archive.NAME)]
        return json.loads(source.read(names[0])) if names else None


def write(path, contents, sealed=None, root="model/"):
    """An archive of the members, sealed with what `about` gave."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in contents.items():
            out.writestr(f"{root}{name}", content)
    if sealed is not None:
        archive.seal(path, sealed["kind"], {k: v for k, v in sealed.items() if k not in SEAL})
    return path


def changed(source, target, change):
    """A copy of an archive, `change`d as a dict of its members, with JSON read and written."""
    contents = members(source)
    parsed = {n: json.loads(c) if n.endswith(".json") else c for n, c in contents.items()}
    change(parsed)
    stored = {n: json.dumps(c).encode() if n.endswith(".json") else c for n, c in parsed.items()}
    return write(target, stored, about(source))
