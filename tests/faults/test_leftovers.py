"""What a killed process leaves on disk goes when the next one starts; what a living one has stays."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from foreign import SpecQuantizer, calibrated, per_channel, per_tensor
from torch import nn

import torchquant as tq
from torchquant.calibration.store import Store
from torchquant.files.owned import SUFFIX, OwnFolder, sweep
from torchquant.files.whole import write_whole
from torchquant.ops.x86 import native

ROOT = str(Path(tq.__file__).parents[1])
MAKERS = {
    "spilled values": """
from torchquant.calibration.store import Store
import torch
store = Store(100)
for i in range(4):
    store.put(i, torch.zeros(100))
""",
    "a file half written": """
from pathlib import Path
from torchquant.files.whole import write_whole
def write(part):
    part.write_bytes(b"half")
    wait()
write_whole(Path(FOLDER) / "model.pt2", write)
""",
    "a build": """
from torchquant.ops.x86 import native
def build(place):
    (place / "kernels.o").write_bytes(b"half")
    wait()
native._build = build
native.library_file()
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place for everything that is temporary."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path))
    return tmp_path


def started(folder, maker):
    """A process that has made something in a folder and waits."""
    script = f"""
import time
FOLDER = {str(folder)!r}
def wait():
    print("made", flush=True)
    time.sleep(100)
{MAKERS[maker]}
wait()
"""
    environment = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(folder), "TORCHQUANT_CACHE": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "made\n"
    return running


def start_again(folder, maker):
    """What the next process does in the same place."""
    if maker == "spilled values":
        store = Store(100)
        for i in range(2):
            store.put(i, torch.zeros(100))
        store.close()
    elif maker == "a file half written":
        write_whole(folder / "other.pt2", lambda part: part.write_bytes(b"whole"))
    else:
        sweep(folder)  # a build would wait for the lock of the first one while that lives


def owned(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(SUFFIX)]


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_killed_process_left_goes_at_the_next_start_and_not_before(folder, maker, death):
    running = started(folder, maker)
    try:
        present = owned(folder)
        assert len(present) == 1
        start_again(folder, maker)
        assert owned(folder) == present
    finally:
        running.send_signal(death)
        running.wait()
    assert owned(folder) == present
    start_again(folder, maker)
    assert owned(folder) == []


def test_the_next_build_deletes_what_a_killed_one_left(folder, monkeypatch):
    running = started(folder, "a build")
    running.kill()
    running.wait()

    def build(place):
        library = place / "kernels.so"
        library.write_bytes(b"library")
        return library

    monkeypatch.setattr(native, "_build", build)
    assert native.library_file().read_bytes() == b"library"
    assert owned(folder) == []


def test_only_folders_that_carry_the_mark_are_deleted(folder):
    for name in ("torchquant-abc", ".model.pt2.x", "tmpabc"):
        (folder / name).mkdir()
    (folder / f"file{SUFFIX}").write_bytes(b"")
    (folder / f"link{SUFFIX}").symlink_to(folder / "tmpabc")
    with OwnFolder("one-") as mine:
        sweep(folder)
        assert mine.is_dir()
    assert not mine.exists()
    assert len(list(folder.iterdir())) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_deletes_nothing_of_its_parents(folder):
    mine = OwnFolder("one-")
    child = os.fork()
    if not child:
        mine.cleanup()
        os._exit(0)
    os.waitpid(child, 0)
    assert mine.path.is_dir()
    sweep(folder)
    assert mine.path.is_dir()
    mine.cleanup()
    assert owned(folder) == []


def test_many_processes_in_one_folder_take_nothing_from_each_other(folder):
    script = f"""
from pathlib import Path
from torchquant.files.owned import OwnFolder
for i in range(300):
    with OwnFolder("x-", {str(folder)!r}) as mine:
        (mine / "a").write_bytes(b"a")
        assert (mine / "a").read_bytes() == b"a"
"""
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [p.wait() for p in running] == [0, 0, 0]
    assert owned(folder) == []


class Interrupted(tq.BiasCorrection):
    """Ctrl-C while it measures, after the first values went to disk."""

    def begin(self, stream, spans, seed):
        for i in range(4):
            stream.store.put(("sensitivity", i, 0), torch.zeros(1000))
        assert stream.store.spilled_bytes
        raise KeyboardInterrupt


def test_ctrl_c_while_an_algorithm_begins_leaves_nothing(folder):
    batches = [torch.randn(2, 8)]
    quantizer = SpecQuantizer(("linear",), per_tensor(), per_channel())
    prepared = calibrated(nn.Linear(8, 8), batches, quantizer)
    with pytest.raises(KeyboardInterrupt) as caught:
        tq.optimize(prepared, batches, [Interrupted()], memory_bytes=100, progress=False)
    assert owned(folder) == []
    assert caught.traceback  # which keeps the store alive
