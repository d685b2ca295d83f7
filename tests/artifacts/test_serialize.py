"""save and load: bit-equal in a fresh process, small, and nothing but errors from anything else."""

import json
import subprocess
import sys
import zipfile

import nets
import pytest
import torch

import torchquant as tq
from torchquant.files import archive
from torchquant.quantizers.x86 import X86Quantizer
from torchquant.quantizers.xnnpack import XnnpackQuantizer


@pytest.fixture(scope="module")
def batch():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized(batch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
    shapes = ({0: torch.export.Dim("batch")},)
    return tq.quantize(
        model, batch, [batch], quantizer=X86Quantizer(), dynamic_shapes=shapes, algorithms=(), progress=False
    )


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    return tq.save(quantized, tmp_path_factory.mktemp("saved") / "model.pt2")


def test_a_saved_graph_is_bit_equal_in_a_fresh_process(quantized, saved, batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    script = (
        "import sys, torch, torchquant as tq\n"
        "graph, x = tq.load(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.save([graph(x), graph(x[:1]), str(tq.report(graph))], sys.argv[3])\n"
    )
    paths = [str(saved), str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, *paths], check=True, capture_output=True)
    whole, first, report = torch.load(tmp_path / "out.pt")
    assert torch.equal(whole, quantized(batch))
    assert torch.equal(first, quantized(batch[:1]))
    assert report == str(tq.report(quantized))


def test_a_saved_graph_is_little_larger_than_its_integer_weights(saved, quantized):
    weights = 2 * 64 * 512
    assert weights <= tq.report(quantized).weight_bytes < 1.25 * weights
    assert saved.stat().st_size < 1.5 * weights + 30_000


def test_notes_survive_saving(tmp_path):
    batch = nets.token_batch()
    graph = tq.quantize(
        nets.MaskedTokens(), batch, [batch], quantizer=XnnpackQuantizer(exclude=["out"]), algorithms=(), progress=False
    )
    loaded = tq.load(tq.save(graph, tmp_path / "m.pt2"))
    assert [(s.op, s.module, s.status, s.reason) for s in tq.report(loaded).sites] == [
        (s.op, s.module, s.status, s.reason) for s in tq.report(graph).sites
    ]
    assert torch.equal(loaded(*batch), graph(*batch))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, tmp_path, keep):
    content = saved.read_bytes()
    part = tmp_path / "part.pt2"
    part.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(tq.ArtifactError, match="truncated"):
        tq.load(part)


def test_a_flipped_byte_is_refused(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part = tmp_path / "flipped.pt2"
    part.write_bytes(bytes(content))
    with pytest.raises(tq.ArtifactError, match=r"damaged|truncated"):
        tq.load(part)


def test_a_foreign_zip_and_torchs_own_archive_are_refused(tmp_path, batch):
    foreign = tmp_path / "foreign.pt2"
    with zipfile.ZipFile(foreign, "w") as out:
        out.writestr("hello.txt", "hello")
    theirs = tmp_path / "theirs.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(64, 2), (batch,)), theirs)
    for path in (foreign, theirs):
        with pytest.raises(tq.ArtifactError, match="not written by torchquant"):
            tq.load(path)


def test_a_missing_file_and_a_text_file_are_refused(tmp_path):
    with pytest.raises(tq.ArtifactError, match="is not a file"):
        tq.load(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(tq.ArtifactError, match=r"not a \.pt2 archive"):
        tq.load(tmp_path / "text.pt2")


def sealed(about):
    return archive.text_of({k: v for k, v in about.items() if k != "digest"})


def rewritten(source, target, change):
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w") as out:
        for entry in read.infolist():
            content = read.read(entry)
            if entry.filename.endswith(archive.NAME):
                content = change(json.loads(content))
            out.writestr(entry.filename, content)
    return target


def test_another_format_version_is_refused_with_its_writer(saved, tmp_path):
    def newer(metadata):
        return json.dumps({**metadata, "format": archive.FORMAT + 1, "versions": {"torchquant": "9.9"}})

    with pytest.raises(
        tq.ArtifactError, match=rf"format {archive.FORMAT + 1} \(torchquant 9\.9\).*reads {archive.FORMAT}"
    ):
        tq.load(rewritten(saved, tmp_path / "newer.pt2", newer))


def test_another_kind_of_artefact_is_refused(saved, tmp_path):
    def other(metadata):
        return sealed({**metadata, "kind": "inductor_x86"})

    with pytest.raises(tq.ArtifactError, match="holds a 'inductor_x86', not a 'converted graph'"):
        tq.load(rewritten(saved, tmp_path / "other.pt2", other))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
    ],
)
def test_broken_metadata_is_refused(saved, tmp_path, text):
    with pytest.raises(tq.ArtifactError):
        tq.load(rewritten(saved, tmp_path / "broken.pt2", lambda metadata: text))


def test_what_cannot_be_written_leaves_nothing_behind(quantized, tmp_path):
    for path in (tmp_path / "none" / "model.pt2", tmp_path):
        with pytest.raises(tq.ArtifactError, match="cannot write"):
            tq.save(quantized, path)
    assert not list(tmp_path.iterdir())


def test_only_a_converted_graph_is_saved(batch, tmp_path):
    exported = tq.export(torch.nn.Linear(64, 2), batch)
    for graph in (exported, tq.prepare(exported, X86Quantizer()), torch.nn.Linear(2, 2)):
        with pytest.raises(tq.InputError, match="converted graph"):
            tq.save(graph, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
