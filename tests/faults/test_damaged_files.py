"""Damaged files: refused with an error of ours or read as they were, never a crash, another result, or a raw error."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import crafted
import fuzz
import numpy as np
import pytest
import torch

import torchquant as tq
from torchquant.backends import executorch_xnnpack, inductor_cuda
from torchquant.calibration.store import Store
from torchquant.cli import sources
from torchquant.files import archive, tensors
from torchquant.files.whole import reading, warn_ignored, write_whole
from torchquant.ops.gpu import configs
from torchquant.ops.x86 import tuning

CHEAP = ("safetensors", "panels", "cuts", "npz")
GOOD = {"refused", "same", "forged"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, x86_pixels, pte_mobile):
    path = tmp_path_factory.mktemp("fuzz")
    x86_pixels.program.save(path / fuzz.KINDS["x86"].name)
    pte_mobile.program.save(path / fuzz.KINDS["pte"].name)
    return path


@pytest.mark.parametrize(("kinds", "count"), [(CHEAP, 250), (sorted(set(fuzz.KINDS) - set(CHEAP)), 10)])
def test_damaged_and_forged_files_are_refused_or_read_as_they_were(folder, kinds, count):
    for kind, result in fuzz.run(folder, kinds, count, seed=1).items():
        assert set(result.counts) <= GOOD, (kind, result.details)
        assert result.counts.total() == count
        assert result.counts["refused"] or kind in ("panels", "cuts"), kind


# what each digest is for ----------------------------------------------------------------------------------------------


def test_each_byte_of_a_member_and_of_the_archive_s_own_notes_is_held(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as out:
        out.writestr("model/data", b"content")
    archive.seal(tmp_path / "a.pt2", "thing", {"number": 1})
    assert archive.read(tmp_path / "a.pt2", "thing")["number"] == 1
    about, members = crafted.about(tmp_path / "a.pt2"), crafted.members(tmp_path / "a.pt2")
    cases = {
        "content": ({"data": b"other"}, about),
        "another member": ({**members, "more": b""}, about),
        "a member less": ({}, about),
        "a note": (members, {**about, "number": 2}),
        "a digest": (members, {**about, "digest": "0"}),
        "no digest": (members, {k: v for k, v in about.items() if k != "digest"}),
    }
    for name, (contents, notes) in cases.items():
        path = crafted.write(tmp_path / "b.pt2", contents)
        with zipfile.ZipFile(path, "a") as out:
            out.writestr(f"model/extra/{archive.NAME}", json.dumps(notes))
        with pytest.raises(tq.ArtifactError, match=r"damaged.*not as it was written"):
            pytest.fail(f"{name}: {archive.read(path, 'thing')}")


def _with_a_comment_over_the_next_entry(content: bytearray) -> None:
    content[content.index(b"PK\x01\x02") + 33] = 1  # 256 bytes of comment, which swallow it


def _with_a_longer_member(content: bytearray) -> None:
    content[content.index(b"PK\x01\x02") + 26] = 1  # 65,536 bytes more; numpy reads as many as its header says


@pytest.mark.parametrize("damage", [_with_a_comment_over_the_next_entry, _with_a_longer_member])
def test_members_that_zipfile_loses_or_leaves_unchecked_are_missed(tmp_path, damage):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), y=np.ones((2, 3)))
    assert [sorted(batch) for batch in sources.load_batches(str(tmp_path / "a.npz"))] == [["x", "y"]] * 2
    content = bytearray((tmp_path / "a.npz").read_bytes())
    damage(content)
    (tmp_path / "b.npz").write_bytes(content)
    assert zipfile.ZipFile(tmp_path / "b.npz").namelist()[0] == "x.npy"  # nothing wrong with it for zipfile
    with pytest.raises(tq.ArtifactError, match=r"b.npz is damaged: (it lists 1 members .* 2|x.npy has)"):
        sources.load_batches(str(tmp_path / "b.npz"))


def test_an_archive_in_the_place_of_an_array_is_no_array(tmp_path):
    np.savez(tmp_path / "inner.npz", x=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        out.writestr("x.npy", (tmp_path / "inner.npz").read_bytes())
    with pytest.raises(tq.ArtifactError, match=r"a.npz .*x.npy is no array"):
        sources.load_batches(str(tmp_path / "a.npz"))


def test_what_stands_before_an_archive_is_held(tmp_path):
    path = tmp_path / "a.pte"
    path.write_bytes(b"a program")
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("model/data", b"content")
    archive.seal(path, "thing", {})
    archive.read(path, "thing")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a program", b"A program"))
    with pytest.raises(tq.ArtifactError, match="its start is not as it was written"):
        archive.read(path, "thing")


@pytest.mark.parametrize("versions", [None, 3, {}, {"torchquant": ["x"]}])
def test_odd_notes_of_another_format_are_refused(tmp_path, versions):
    path = crafted.write(tmp_path / "a.pt2", {"data": b""})
    with zipfile.ZipFile(path, "a") as out:
        out.writestr(f"model/extra/{archive.NAME}", json.dumps({"format": 2, "versions": versions}))
    with pytest.raises(tq.ArtifactError, match=r"Save it again"):
        archive.read_any(path)


ODD_NOTES = {
    "proof of text": lambda a: a["proof"].update(annotated="many"),
    "comparison of text": lambda a: a["proof"]["comparison"].update(sqnr_db="good"),
    "no proof": lambda a: a.pop("proof"),
    "a field more": lambda a: a["proof"].update(more=1),
    "kernels": lambda a: a["proof"].update(kernels=[1]),
    "site": lambda a: a["sites"][0].update(status="great"),
    "dtype": lambda a: a["signature"]["inputs"][0].update(dtype="torch.nn"),
    "shape": lambda a: a["signature"]["inputs"][0].update(shape=["4", -1]),
    "negative shape": lambda a: a["signature"]["inputs"][0].update(shape=[-4, 16]),
    "tree": lambda a: a["signature"].update(in_spec={"exact": "[9]", "plain": "{}"}),
    "no tree": lambda a: a["signature"].update(in_spec=3),
    "state": lambda a: a.update(states=["none"]),
    "returns": lambda a: a.update(returns=[7]),
    "no list": lambda a: a.update(sites=None),
}


@pytest.mark.parametrize("name", ODD_NOTES)
def test_odd_notes_of_a_program_are_refused(folder, tmp_path, name):
    source = fuzz.make(folder, "cuda")
    about = crafted.about(source)
    ODD_NOTES[name](about)
    path = crafted.write(tmp_path / "odd.pt2", crafted.members(source), about)
    with pytest.raises(tq.ArtifactError, match=r"odd\.pt2"):
        inductor_cuda.load(path, "cpu")


def test_tensors_are_held_against_their_digest_wherever_they_have_one(tmp_path):
    values = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.int8)}
    content = tensors.stored(values)
    assert all(torch.equal(v, values[n]) for n, v in tensors.read("a", content).items())
    for wrong in (content[:-1] + b"\x02", content.replace(b'"I8"', b'"U8"')):
        (tmp_path / "a.safetensors").write_bytes(wrong)
        with pytest.raises(tq.ArtifactError, match="not as they were written"):
            sources.load_batches(str(tmp_path / "a.safetensors"))
    from safetensors.torch import save

    assert tensors.read("a", save(values)).keys() == values.keys()
    with pytest.raises(tq.ArtifactError, match="not as they were written"):
        tensors.read("a", save(values), sealed=True)


def test_a_program_of_executorch_is_held_from_its_first_byte_to_its_last(pte_mobile, tmp_path):
    path = pte_mobile.program.save(tmp_path / "model.pte")
    content = path.read_bytes()
    end = executorch_xnnpack.program._end_of(content)
    cases = [content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :] for i in (9, 17, 30, end // 3, end - 20)]
    cases += [content[: end + 200], content[: end - 1], content[:end] + b"\0\0rubbish", content + b"rubbish"]
    for case in cases[:-1]:
        path.write_bytes(case)
        with pytest.raises(tq.ArtifactError, match=r"model\.pte"):
            executorch_xnnpack.load(path)
    path.write_bytes(content[:end] + bytes(64))  # padding, of another writer
    assert executorch_xnnpack.load(path).proof is None


def test_errors_of_executorch_are_ours(pte_mobile):
    method = executorch_xnnpack.program.Method(pte_mobile.program._buffer)
    with pytest.raises(tq.LoweringError, match="ExecuTorch cannot run"):
        method(torch.randn(1))


# tables of measurements -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ['{"a": -1}', '{"a": 5}', '{"a": true}', '{"a": "2"}', "[2]", "null", "{", "\udcff"]
)
def test_a_damaged_table_of_panels_is_ignored_with_a_warning(tmp_path, monkeypatch, content):
    file = tmp_path / "panels.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(tuning, "_file", lambda: file)
    warn_ignored.cache_clear()
    with pytest.warns(tq.TorchquantWarning, match=r"panels\.json"):
        assert tuning._read() == {}
    assert tuning._read() == {}  # and no second warning


def test_a_table_of_panels_keeps_what_is_right(tmp_path, monkeypatch):
    (tmp_path / "panels.json").write_text('{"a": 3, "b": 7, "c": 0}')
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "panels.json")
    warn_ignored.cache_clear()
    with pytest.warns(tq.TorchquantWarning, match="other values than panels"):
        assert tuning._read() == {"a": 3, "c": 0}


GOOD_CUT = vars(configs.candidates("int8", 16)[0])
BAD_CUTS = {
    "no cut": None,
    "a field less": {k: v for k, v in GOOD_CUT.items() if k != "warps"},
    "a field more": {**GOOD_CUT, "more": 1},
    "negative": {**GOOD_CUT, "n": -16},
    "not searched": {**GOOD_CUT, "stages": 7},
    "a bool": {**GOOD_CUT, "quantizes": 1 if GOOD_CUT["quantizes"] else 0},
    "a kernel": {**GOOD_CUT, "kernel": "os.system"},
}


@pytest.mark.parametrize("name", BAD_CUTS)
def test_a_cut_that_no_search_could_have_found_is_ignored(tmp_path, name):
    table = {"int8": {"64x64": {"16": GOOD_CUT, "32": BAD_CUTS[name]}}}
    (tmp_path / "gpu.json").write_text(json.dumps(table))
    warn_ignored.cache_clear()
    with pytest.warns(tq.TorchquantWarning, match=r"gpu\.json"):
        assert configs._measured(tmp_path / "gpu.json") == {"int8": {"64x64": {"16": GOOD_CUT}}}


NO_PRODUCTS = "int9 64x64 16", "int8 64 16", "int8 0x64 16", "int8 64x64 17", "int8 64x64 x"


@pytest.mark.parametrize("text", NO_PRODUCTS)
def test_a_cut_for_no_product_is_ignored(tmp_path, text):
    format, size, rows = text.split()
    (tmp_path / "gpu.json").write_text(json.dumps({format: {size: {rows: GOOD_CUT}}}))
    warn_ignored.cache_clear()
    with pytest.warns(tq.TorchquantWarning, match="no kernel is cut"):
        assert configs._measured(tmp_path / "gpu.json") == {}


def test_every_candidate_is_known():
    for format in configs.FORMATS:
        for m in configs._BUCKETS:
            for config in configs.candidates(format, int(m)):
                assert configs._is_known(format, "64x64", m, json.loads(json.dumps(vars(config))))


def test_a_cache_that_takes_no_folder_costs_only_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path))
    (tmp_path / "gpu").write_text("in the way")
    assert configs._own_folder().is_dir()


# files that cannot be read or written ---------------------------------------------------------------------------------


RAISED = (
    *(zipfile.BadZipFile("x"), EOFError(), KeyError("x"), TypeError("x"), ValueError("x"), RuntimeError("x")),
    *(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), RecursionError(), MemoryError(), OverflowError()),
    *(IndexError(), AttributeError("x"), AssertionError(), NotImplementedError(), SyntaxError("x")),
)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_parser_raises_names_the_file_and_what_to_do(error):
    with (
        pytest.raises(tq.ArtifactError, match=r"a\.bin is truncated, damaged or not a thing .*; do this"),
        reading("a.bin", "a thing", "do this"),
    ):
        raise error


@pytest.mark.parametrize("error", [tq.InputError("x"), KeyboardInterrupt()])
def test_our_own_errors_and_the_user_s_pass(error):
    with pytest.raises(type(error)), reading("a.bin", "a thing"):
        raise error


def test_arrays_that_are_none_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    content = (tmp_path / "a.npz").read_bytes()
    method = content.rindex(b"PK\x01\x02") + 10
    (tmp_path / "method.npz").write_bytes(content[:method] + b"\x63" + content[method + 1 :])
    encrypted = method - 2
    (tmp_path / "encrypted.npz").write_bytes(content[:encrypted] + b"\x01" + content[encrypted + 1 :])
    for name in ("method.npz", "encrypted.npz"):
        with pytest.raises(tq.ArtifactError, match=name):
            sources.load_batches(str(tmp_path / name))


FULL = """
import resource, signal, sys, torch
from torchquant.errors import ArtifactError
from torchquant.files.whole import write_whole
from torchquant.calibration.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
values = torch.zeros(100_000)
store = Store(budget_bytes=10)
for write in (lambda: write_whole(sys.argv[1], lambda part: torch.save(values, part)), lambda: store.put(0, values)):
    try:
        write()
    except ArtifactError as error:
        print(error)
"""


def test_a_full_disk_is_an_error_of_ours(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=None)
    written, spilled = done.stdout.splitlines()
    assert "cannot write" in written
    assert "a.pt" in written
    assert "TMPDIR" in spilled
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EMFILE])
def test_a_folder_that_takes_no_file_is_an_error_of_ours(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, "no")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(tq.ArtifactError, match=r"a\.bin"):
        write_whole(tmp_path / "a.bin", lambda part: part.write_bytes(b""))
    store = Store(budget_bytes=10)
    with pytest.raises(tq.ArtifactError, match="TMPDIR"):
        store.put(0, torch.zeros(100))


def test_what_was_spilled_and_is_gone_or_damaged_is_an_error_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(budget_bytes=10)
    for key in range(2):
        store.put(key, torch.zeros(100))
    first, second = sorted(store._spilled.values())
    first.write_bytes(b"rubbish")
    second.unlink()
    for key in (0, 1):
        with pytest.raises(tq.ArtifactError, match=r"\.pt"):
            store.get(key)


def written(path):
    return write_whole(path, lambda part: part.write_bytes(b"new"))


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path):
    for name in ("a" * 251 + ".pt2", "\N{SNOWMAN}" * 83 + ".pt2", "a." + "b" * 253, "a\nb"):
        assert written(tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["a\udcff.pt2", "a\0b.pt2", "\udcff/a.pt2"])  # at which torch would end the process
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(tq.ArtifactError, match="no UTF-8 text"):
        written(tmp_path / name)


def test_nothing_takes_the_place_of_a_device_or_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link", "/dev/null"):
        with pytest.raises(tq.ArtifactError, match="a device or a pipe"):
            written(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def larger(source, target, name, size):
    """A copy of an archive with one more member, of zeros, in few bytes."""
    target.write_bytes(source.read_bytes())
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as opened, opened.open(name, "w") as member:
        member.write(bytes(size))
    return target


def test_a_member_that_does_not_belong_to_an_archive_is_not_unpacked(tmp_path, monkeypatch):
    source = fuzz.make(tmp_path, "graph")
    path = larger(source, tmp_path / "larger.pt2", "graph/data/more", 1 << 20)
    unpacked, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda z, name, *a: unpacked.append(name) or read(z, name, *a))
    with pytest.raises(tq.ArtifactError, match="graph/data/more is not as it was written"):
        tq.load(path)
    assert len(unpacked) == 1  # what torchquant wrote about the rest


def test_an_archive_that_memory_does_not_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros((4, 1 << 18)))
    exported_file = fuzz.make(tmp_path, "exported")
    larger(exported_file, tmp_path / "larger.pt2", "exported/more", 8 << 20)
    monkeypatch.setattr(archive, "_memory_bytes", lambda: 12 << 20)
    for name, read in (("zeros.npz", sources.load_batches), ("larger.pt2", sources.load_model)):
        assert (tmp_path / name).stat().st_size < 100_000
        with pytest.raises(tq.ArtifactError, match=f"{name} unpacks to .* bytes, more than half"):
            read(str(tmp_path / name))
    sources.load_model(str(exported_file))
