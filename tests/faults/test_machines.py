"""Other machines: no compiler, no home, folders that cannot run anything, files cut off, many processes at once."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import torchquant as tq
from torchquant.backends import inductor_x86
from torchquant.errors import ArtifactError
from torchquant.ops.x86 import cpu, native
from torchquant.quantizers.x86 import X86Quantizer

pytestmark = pytest.mark.skipif(not native.supported(), reason="kernels for x86")
SRC = str(Path(tq.__file__).parents[1])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder with builds that take no time: a build appends its process to `builds`, and waits."""
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path))
    return tmp_path


def stand_in(monkeypatch, builds):
    """Replaces the compiler by one that notes that it ran."""

    def build(place):
        builds.append(place)
        library = place / "kernels.so"
        library.write_bytes(b"library " * 1000)
        return library

    monkeypatch.setattr(native, "_build", build)


@pytest.mark.parametrize("damage", ["truncated", "empty", "rubbish", "no digest", "digest of another"])
def test_a_damaged_library_in_the_cache_is_built_again(folder, monkeypatch, damage):
    builds = []
    stand_in(monkeypatch, builds)
    library = native.library_file()
    content = library.read_bytes()
    assert native.library_file() == library
    assert len(builds) == 1
    digest = library.with_suffix(".sha256")
    if damage == "no digest":
        digest.unlink()
    elif damage == "digest of another":
        digest.write_text("0" * 64)
    else:
        library.write_bytes({"truncated": content[:100], "empty": b"", "rubbish": content[:-1] + b"x"}[damage])
    assert native.library_file().read_bytes() == content
    assert len(builds) == 2


def test_of_many_processes_one_builds_and_the_others_wait(folder):
    script = """
import os, time
from pathlib import Path
from torchquant.ops.x86 import native
def build(place):
    with open(native.cache_folder() / "builds", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(1.0)
    made = place / "kernels.so"
    made.write_bytes(b"library")
    return made
native._build = build
print(native.library_file().read_bytes())
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "PYTHONPATH": SRC}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [p.communicate()[0].strip() for p in running] == ["b'library'"] * 4
    assert len((folder / "builds").read_text().split()) == 1


def test_compilers_run_side_by_side_as_memory_allows(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    real = Path.read_text
    for free_kb, expected in ((500_000, 1), (3_100_000, 3), (900_000_000, 64)):
        text = f"MemTotal: 1 kB\nMemAvailable:   {free_kb} kB\n"
        monkeypatch.setattr(
            Path, "read_text", lambda p, *a, t=text, **k: t if str(p) == "/proc/meminfo" else real(p, *a, **k)
        )
        assert native._compilers_at_once() == expected


def test_a_user_without_a_home_gets_a_folder_of_the_process(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHQUANT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert native.cache_folder().is_dir()
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path / "named"))  # and is not asked for where there is a name
    assert native.cache_folder() == tmp_path / "named"


def test_a_folder_from_which_nothing_may_be_run_is_left(folder, monkeypatch):
    monkeypatch.setattr(native, "_loaded", {})
    stand_in(monkeypatch, [])
    tried = []

    def load_file(name, path):
        tried.append(path.parent)
        if path.parent == folder:
            raise tq.errors.LoweringError("failed to map segment from shared object")
        native._loaded[name] = "library"

    monkeypatch.setattr(native, "_load_file", load_file)
    assert native.load() == "library"
    assert tried == [folder, native.own_folder()]


def test_torchquant_is_imported_where_there_is_no_module_resource():
    script = (
        "import sys; sys.modules['resource'] = None; import torchquant as tq; tq.optimize; tq.calibrate; print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": SRC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "ok", done.stderr


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    graph = tq.quantize(model.eval(), (x,), [(x,)], quantizer=X86Quantizer(), algorithms=(), progress=False)
    return inductor_x86.lower(graph, (x,))


def test_a_program_for_instructions_that_this_cpu_lacks_is_refused(program, tmp_path, monkeypatch):
    path = program.save(tmp_path / "program.pt2")
    inductor_x86.load(path)
    with zipfile.ZipFile(path) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(cpu.NOTE)]
        assert set(json.loads(archive.read(name))) == cpu.instructions()
    older = cpu.instructions() - {"avx512f", "avx2"}
    monkeypatch.setattr(cpu, "instructions", lambda: older)
    with pytest.raises(ArtifactError, match=r"instructions that this one lacks \(.*avx2.*Lower the model on this CPU"):
        inductor_x86.load(path)
