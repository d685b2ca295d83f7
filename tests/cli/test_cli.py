"""The command line: targets, report, quantize, run; errors are one line and exit code 1."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import torchquant as tq
from torchquant import backends
from torchquant.backends import executorch_xnnpack, inductor_cuda, inductor_x86
from torchquant.cli import commands, sources
from torchquant.cli import main as cli
from torchquant.quantizers import CudaQuantizer

MODULE = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

instance = model()
number = 3
tensor = torch.zeros(2)

def batches():
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]

def nothing():
    return []

def broken():
    return 1 / 0

def breaks():
    yield from batches()
    raise KeyError("gone")

def nested():
    return [([b, b], torch.tensor(2.0)) for b in batches()]

class InLists(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, xs, factor):
        return self.linear(xs[0] + xs[1] * factor)

def labelled():
    return [(b, torch.zeros(4)) for b in batches()]

def arrays():
    return [b.numpy() for b in batches()]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a user's module and data files."""
    path = tmp_path_factory.mktemp("cli")
    (path / "users_net.py").write_text(MODULE)
    data = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    np.savez(path / "data.npz", input=data.numpy())
    save_file({"input": data}, path / "data.safetensors")
    np.savez(path / "other_names.npz", pixels=data.numpy())
    (path / "cut.npz").write_bytes((path / "data.npz").read_bytes()[:200])
    (path / "empty.npz").write_bytes(b"")
    np.savez(path / "words.npz", input=np.array(["a", "b"]))
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


def main(*arguments, capsys, monkeypatch):
    """The command as the shell runs it: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["torchquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """One lowering for two backends, shared by the tests."""
    out = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(
            "quantize", "users_net:model", "--calibration", "users_net:batches", "--backend", "inductor_x86",
            "--backend", "executorch_xnnpack", "--algorithm", "range-search", "--algorithm", "adaround", "--out", out,
            "--report", out.with_suffix(".html"),
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_program_for_gpus_is_recognized_by_what_it_holds(tmp_path):
    x = torch.randn(4, 32)
    quantized = tq.quantize(
        torch.nn.Linear(32, 8), x, [x], quantizer=CudaQuantizer("w8a16"), algorithms=(), progress=False
    )
    path = inductor_cuda.lower(quantized, x, device="cpu").save(tmp_path / "program.pt2")
    result = run("report", path)
    assert result.exit_code == 0, result.output
    assert "inductor_cuda" in result.output
    assert "annotated compute ops run quantized: 1/1" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is proven there")
def test_a_program_for_gpus_is_built_where_there_is_none(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = tmp_path / "program.pt2"
    result = run(
        "quantize", "users_net:model", "--calibration", "users_net:batches", "--backend", "inductor_cuda", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "torch sees no GPU here" in result.output
    assert inductor_cuda.load(out, device="cpu").proof.annotated > 0


@pytest.mark.filterwarnings("ignore:openvino. 2 ops have codes:torchquant.errors.TorchquantWarning")  # one kernel
def test_one_calibration_gives_files_for_onnx_and_openvino_that_are_reported_and_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    data = ("users_net:model", "--calibration", "users_net:batches")
    result = run("quantize", *data, "--backend", "onnx_qdq", "--backend", "openvino", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name in ("onnx_qdq.onnx", "openvino.xml"):
        result = run("report", tmp_path / "out" / name)
        assert result.exit_code == 0, result.output
        assert "quantized" in result.output


def test_targets_lists_every_op_with_its_schemes_or_reason():
    text = run("targets").output
    for name in backends.names():
        assert name in text
        for row in backends.target(name).capabilities:
            assert row.op in text


@pytest.mark.parametrize("calibration", ["users_net:batches", "data.npz", "data.safetensors"])
@pytest.mark.parametrize("backend", ["inductor_x86", "executorch_xnnpack"])
def test_report_accounts_for_a_float_model(calibration, backend):
    result = run("report", "--model", "users_net:model", "--calibration", calibration, "--backend", backend)
    assert result.exit_code == 0
    assert "compute ops quantized: 2/2" in result.output


def test_report_takes_exclusions_and_a_scheme():
    result = run(
        "report", "--model", "users_net:instance", "--calibration", "data.npz", "--exclude", "op:relu",
        "--exclude", "2", "--scheme", "dynamic_int8",
    )  # fmt: skip
    assert "compute ops quantized: 1/2 (1 excluded, 1 quantized)" in result.output
    assert "uint8[0,255] dynamic" in result.output


def test_an_exported_program_is_a_model_too(folder):
    x = torch.randn(4, 8)
    path = folder / "float.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(8, 4), (x,)), path)
    assert "1/1" in run("report", "--model", path, "--calibration", "users_net:batches").output


def test_quantize_writes_a_proven_artefact_for_each_backend_into_a_folder(written):
    out, text = written
    assert sorted(p.name for p in out.iterdir()) == ["executorch_xnnpack.pte", "inductor_x86.pt2"]
    for name in ("inductor_x86", "executorch_xnnpack"):
        assert f"{name}: " in text
    assert text.count("annotated compute ops run quantized: 2/2") == 2
    x = torch.randn(4, 8)
    x86, pte = inductor_x86.load(out / "inductor_x86.pt2"), executorch_xnnpack.load(out / "executorch_xnnpack.pte")
    assert tq.sqnr_db(x86(x), pte(x)) > 20


def test_analyze_says_where_the_error_comes_from(folder, tmp_path):
    out = tmp_path / "analysis.json"
    arguments = ["analyze", "users_net:model", "--calibration", "users_net:batches", "--report", str(out)]
    result = CliRunner().invoke(cli.app, [*arguments, "--min-sqnr", "20"])
    assert result.exit_code == 0, result.output
    assert "measured on the calibration data" in result.output
    read = json.loads(out.read_text())["analysis"]
    assert {site["site"]["op"] for site in read["sites"]} >= {"linear"}
    assert read["output_db"] > 20
    result = CliRunner().invoke(cli.app, [*arguments, "--min-sqnr", "200", "--validation", "users_net:batches"])
    assert result.exit_code == 2
    assert "measured on users_net:batches" in result.output


def test_quantize_writes_a_report_of_all_its_artefacts(written):
    page = written[0].with_suffix(".html").read_text()
    assert "inductor_x86" in page
    assert "executorch_xnnpack" in page


def test_run_prints_shape_and_range_of_each_output(written):
    out, _ = written
    for artefact in out.iterdir():
        result = run("run", artefact, "--inputs", "users_net:batches", "--trust")
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert len(lines) == 4
        assert all(f"batch {i} output 0: shape (4, 4) from -" in line for i, line in enumerate(lines))


def test_report_reads_a_program_and_a_saved_graph(written, tmp_path):
    out, _ = written
    assert "annotated compute ops run quantized: 2/2" in run("report", out / "inductor_x86.pt2").output
    x = torch.randn(4, 8)
    model = torch.nn.Linear(8, 4)
    quantizer = backends.target("inductor_x86").quantizer_class()()
    graph = tq.quantize(model, x, [x], quantizer=quantizer, algorithms=(), progress=False)
    assert "1/1" in run("report", tq.save(graph, tmp_path / "graph.pt2")).output


def test_report_reads_a_pte(written):
    out, _ = written
    assert "executorch_xnnpack" in run("report", out / "executorch_xnnpack.pte").output


REPORT = ("report", "--model", "users_net:model", "--calibration")
QUANTIZE = ("quantize", "users_net:model", "--calibration")
ERRORS = {
    "no colon": (["report", "--model", "users_net", "--calibration", "data.npz"], "package.module:name"),
    "no module": (["report", "--model", "no_such:f", "--calibration", "data.npz"], "cannot import 'no_such'"),
    "no name": (["report", "--model", "users_net:f", "--calibration", "data.npz"], "has no 'f'"),
    "no model": (["report", "--model", "users_net:nothing", "--calibration", "data.npz"], "not a torch.nn.Module"),
    "no batches": ([*REPORT, "users_net:tensor"], "not an iterable"),
    "no package": (["report", "--model", ".x:y", "--calibration", "data.npz"], "cannot be imported"),
    "other names": ([*REPORT, "other_names.npz"], "the forward of users_net:model takes input"),
    "cut file": ([*REPORT, "cut.npz"], "truncated, damaged or not a .npz file"),
    "empty file": ([*REPORT, "empty.npz"], "truncated, damaged or not a .npz file"),
    "words": ([*REPORT, "words.npz"], "'input' is an array of <U1"),
    "a file of another kind": ([*REPORT, "data.pt"], "files are read as models (.pt2"),
    "none to report on": ([*REPORT, "users_net:nothing"], "gave no batches"),
    "error between batches": ([*REPORT, "users_net:breaks"], "'users_net:breaks' raised KeyError: 'gone'"),
    "no file": ([*REPORT, "none.npz"], "is not a file"),
    "no input": (["report"], "give a saved file"),
    "no artefact": (["report", "none.pt2"], "is not a file"),
    "no algorithm": ([*QUANTIZE, "data.npz", "--out", "x", "--algorithm", "adarund"], "'adarund'"),
    "no backend": ([*QUANTIZE, "data.npz", "--out", "x", "--backend", "tpu"], "'tpu'"),
    "no folder": (
        [*QUANTIZE, "data.npz", "--out", "data.npz/out", "--backend", "inductor_x86",
         "--backend", "executorch_xnnpack"],
        "cannot be made a folder",
    ),
    "user's error": (["report", "--model", "users_net:broken", "--calibration", "data.npz"], "ZeroDivisionError"),
    "labels": ([*QUANTIZE, "users_net:labelled", "--out", "x.pt2"], "for x, _ in loader"),
    "numpy": ([*QUANTIZE, "users_net:arrays", "--out", "x.pt2"], "torch.from_numpy"),
    "empty": ([*QUANTIZE, "users_net:nothing", "--out", "x.pt2"], "gave no batches"),
    "scheme": ([*REPORT, "data.npz", "--scheme", "int3"], "int3"),
    "pattern": ([*REPORT, "data.npz", "--exclude", "op:linaer"], "linear"),
    "no source": (["run", "none.pte", "--inputs", "data.npz"], "is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_ours_is_said_on_stderr_with_exit_code_1(name, capsys, monkeypatch):
    arguments, words = ERRORS[name]
    code, out, err = main(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert words in " ".join(err.split())
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not out


def test_an_error_is_one_line_however_long(capsys, monkeypatch):
    code, _, err = main("report", "no/" * 60 + "x.pt2", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    ["data[1].npz", "[b]x.npz", "x[/red].npz"],
)
def test_an_error_shows_brackets_as_they_are(name, capsys, monkeypatch):
    code, _, err = main(
        "report", "--model", "users_net:model", "--calibration", name, capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 1
    assert f"error: {name} is not a file" in err


def test_batches_of_different_count_in_a_file_are_refused(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "odd.npz", a=np.zeros((2, 4, 8), "float32"), b=np.zeros((3, 4), "float32"))
    (tmp_path / "broken.npz").write_bytes(b"PK hello")
    (tmp_path / "broken.safetensors").write_bytes(b"hello")
    for file, words in (
        ("odd.npz", "first dimension"),
        ("broken.npz", "truncated"),
        ("broken.safetensors", "truncated"),
    ):
        arguments = ("report", "--model", "users_net:model", "--calibration", tmp_path / file)
        code, _, err = main(*arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 1
        assert words in " ".join(err.split())


def test_arrays_of_another_order_of_bytes_are_read(tmp_path):
    values = np.arange(128.0, dtype=">f4").reshape(2, 8, 8)
    np.savez(tmp_path / "big.npz", input=values)
    first, second = sources.load_batches(str(tmp_path / "big.npz"))
    assert torch.equal(torch.stack([first["input"], second["input"]]), torch.arange(128.0).reshape(2, 8, 8))


def test_a_batch_that_varies_does_so_in_lists_too_and_numbers_do_not(tmp_path):
    model, path = ("users_net:InLists", "--calibration", "users_net:nested"), tmp_path / "m.pte"
    result = run("quantize", *model, "--max-batch", "9", "--backend", "executorch_xnnpack", "--out", path)
    assert result.exit_code == 0, result.output
    program = executorch_xnnpack.load(path)
    for size in (1, 9):
        assert program([torch.randn(size, 8), torch.randn(size, 8)], torch.tensor(2.0)).shape == (size, 4)


def test_a_file_of_pickles_is_not_unpickled(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "objects.npz", input=np.array([{"a": 1}], dtype=object))
    arguments = ("report", "--model", "users_net:model", "--calibration", tmp_path / "objects.npz")
    code, _, err = main(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert "not a .npz file" in " ".join(err.split())


def test_the_installed_command_reports_errors_in_one_line(folder):
    """The console script of pyproject.toml, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _ENTRY, "report", "none.pt2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: none.pt2 is not a file" in done.stderr


_ENTRY = (
    "import re, sys, pathlib, importlib, torchquant\n"
    "text = (pathlib.Path(torchquant.__file__).parents[1] / 'pyproject.toml').read_text()\n"
    "module, name = re.search(r'^torchquant = \"([\\w.]+):(\\w+)\"$', text, re.M).groups()\n"
    "sys.exit(getattr(importlib.import_module(module), name)())\n"
)


def test_the_command_lists_the_targets_and_algorithms_that_there_are():
    assert set(cli.TARGETS) == {"inductor_x86", "executorch_xnnpack", "inductor_cuda", "onnx_qdq", "openvino"}
    assert set(cli.ALGORITHMS) == set(commands.ALGORITHMS)


def test_help_needs_no_torch():
    code = "import sys, torchquant.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_that_is_none_of_ours_is_two_lines_with_its_place(monkeypatch, capsys):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(commands, "targets", fail)
    code, _, err = main("targets", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert "OSError: the disk is gone" in err
    assert "test_cli.py" in err
    assert len(err.strip().splitlines()) == 2


def test_missing_folders_are_made_and_a_positional_export_is_calibrated_by_names_in_a_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(4, 8),)), tmp_path / "float.pt2")
    out = tmp_path / "some" / "where" / "model.pte"
    result = run(
        "quantize", tmp_path / "float.pt2", "--calibration", "data.npz", "--backend", "executorch_xnnpack", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert out.is_file()
    assert "the calibration data" in result.output


# see and decide -------------------------------------------------------------------------------------------------------

METRICS = """
import torch
import users_net

def closeness(model):
    held_out = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i + 50)) for i in range(2)]
    wanted, got = (torch.cat([m(x) for x in held_out]) for m in (users_net.model(), model))
    return -float((wanted - got).abs().max())

def nan(model):
    return float("nan")
"""


@pytest.fixture
def metrics(folder):
    (folder / "users_metrics.py").write_text(METRICS)


def test_compare_holds_an_artefact_against_its_model(written, metrics):
    out, _ = written
    arguments = ["compare", "users_net:model", str(out / "executorch_xnnpack.pte"), "--inputs", "users_net:batches"]
    result = run(*arguments, "--json", "--metric", "users_metrics:closeness")
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert read["sqnr_db"] > 20
    assert read["first_metric"] == 0 > read["second_metric"]
    assert run(*arguments, "--min-sqnr", "200").exit_code == 2
    assert run(*arguments, "--metric", "users_metrics:closeness", "--max-drop", "0.0000001").exit_code == 2
    assert run(*arguments, "--metric", "users_metrics:closeness", "--max-drop", "10").exit_code == 0
    with pytest.raises(tq.InputError, match="give --metric"):
        run(*arguments, "--max-drop", "1")


def test_compare_does_not_run_code_that_nobody_vouched_for(written):
    out, _ = written
    arguments = ["compare", "users_net:model", str(out / "inductor_x86.pt2"), "--inputs", "users_net:batches"]
    with pytest.raises(tq.InputError, match="--trust"):
        run(*arguments)
    assert "sqnr_db" in run(*arguments, "--trust").output


def test_profile_prints_text_or_json(written):
    out, _ = written
    arguments = ["profile", str(out / "inductor_x86.pt2"), "--inputs", "users_net:batches", "--trust", "--rounds", "5"]
    text = run(*arguments, "--reference", "users_net:model", "--callers", "1").output
    assert "inductor_x86" in text
    assert "reference" in text
    read = json.loads(run(*arguments, "--json").stdout)
    assert read["latency"]["median_ms"] > 0
    assert read["int_operations"] == 2 * 4 * (8 * 16 + 16 * 4)


def test_search_writes_a_plan_that_quantize_takes(folder, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "model.pt2"
    common = ["users_net:model", "--calibration", "users_net:batches"]
    result = run(
        "search", *common, "--budget", "11bpw", "--scheme", "w8", "--scheme", "w4", "--out", plan, "--json",
        "--validation", "data.npz",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert read["measured_db"] >= read.get("uniform_db", read["measured_db"])
    assert read["measured_on"].startswith("4 batches, 1 of them calibrated on")  # data.npz begins like users_net's
    result = run("quantize", *common, "--plan", plan, "--out", out, "--algorithm", "none", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["programs"]
    assert row["sqnr_db"] == pytest.approx(read["measured_db"], abs=6)
    with pytest.raises(tq.InputError, match="leave --scheme out"):
        run("quantize", *common, "--plan", plan, "--scheme", "w8", "--out", out)
    with pytest.raises(tq.InputError, match="is no size"):
        run("search", *common, "--budget", "much", "--scheme", "w8", "--out", plan)
    for budgets in ([], ["--budget", "8bpw", "--max-drop", "1"]):
        with pytest.raises(tq.InputError, match="one of them"):
            run("search", *common, *budgets, "--scheme", "w8", "--out", plan)


def test_search_finds_the_fewest_bytes_that_a_metric_allows(metrics, tmp_path):
    plan, schemes = tmp_path / "plan.json", ["--scheme", "w8", "--scheme", "w4", "--scheme", "w2"]
    common = ["search", "users_net:model", "--calibration", "users_net:batches", *schemes, "--out", plan, "--json"]
    result = run(*common, "--metric", "users_metrics:closeness", "--max-drop", "15")
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert about["float_metric"] - about["metric"] <= 15
    assert plan.is_file()
    with pytest.raises(tq.InputError, match="give --metric"):
        run(*common, "--max-drop", "15")


def test_quantize_within_a_drop(metrics, tmp_path):
    common = ["quantize", "users_net:model", "--calibration", "users_net:batches", "--algorithm", "none", "--out"]
    result = run(*common, tmp_path / "a.pt2", "--metric", "users_metrics:closeness", "--max-drop", "5", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["programs"][0]["metric"] >= -5
    assert run(*common, tmp_path / "b.pt2", "--min-sqnr", "200").exit_code == 2
    with pytest.raises(tq.InputError, match="NaN for the float model"):
        run(*common, tmp_path / "c.pt2", "--metric", "users_metrics:nan", "--max-drop", "5")
    assert not (tmp_path / "c.pt2").exists()


def test_analyze_fails_where_the_metric_loses_too_much(metrics):
    arguments = ["analyze", "users_net:model", "--calibration", "users_net:batches"]
    arguments += ["--metric", "users_metrics:closeness"]
    assert run(*arguments, "--max-drop", "10").exit_code == 0
    result = run(*arguments, "--max-drop", "0.0000001", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["metric"] < 0


def test_a_saved_artefact_gives_its_whole_report_again(written, tmp_path):
    out, _ = written
    for artefact in out.iterdir():
        read = json.loads(run("report", artefact, "--json").stdout)
        assert read["coverage"] == "2/2"
        assert read["graph"]["edges"]
        assert [s["op"] for s in read["sites"] if s["compute"]] == ["linear", "linear"]
        assert read["weight_bytes"] > 0
        page = tmp_path / f"{artefact.stem}.html"
        assert run("report", artefact, "--out", page).exit_code == 0
        assert read["programs"][0]["target"] in page.read_text()
        kept = tmp_path / f"{artefact.stem}.json"
        assert run("report", artefact, "--out", kept).exit_code == 0
        assert json.loads(run("report", kept, "--json").stdout) == read
        assert run("report", kept, "--out", tmp_path / "again.html").exit_code == 0
        assert (tmp_path / "again.html").read_text() == page.read_text()


def test_version_and_quiet(capsys, monkeypatch):
    result = run("--version")
    assert result.output.startswith("torchquant ")
    code, out, err = main(
        "--quiet", "report", "--model", "users_net:model", "--calibration", "data.npz", capsys=capsys,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2/2" in out


# what a program reads -------------------------------------------------------------------------------------------------

TALKATIVE = """
import torch

print("imported")

def model():
    print("made")
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)

def batches():
    print("read")
    return [torch.ones(2, 8)]

def metric(model):
    print("asked")
    return 1.0
"""


@pytest.mark.parametrize("command", ["analyze", "compare", "report"])
def test_json_is_alone_on_stdout_whatever_a_users_code_prints(folder, monkeypatch, command: str) -> None:
    (folder / "talkative.py").write_text(TALKATIVE)
    monkeypatch.delitem(sys.modules, "talkative", raising=False)
    model, batches, metric = (f"talkative:{name}" for name in ("model", "batches", "metric"))
    arguments = {
        "analyze": [model, "--calibration", batches, "--metric", metric, "--algorithm", "none"],
        "compare": [model, model, "--inputs", batches, "--metric", metric],
        "report": ["--model", model, "--calibration", batches, "--out", folder / "a report.html"],
    }[command]
    result = run(command, *arguments, "--json")
    assert isinstance(json.loads(result.stdout), dict)
    assert "made" in result.stderr


@pytest.mark.parametrize("place", ["nowhere/file.json", "."])
@pytest.mark.parametrize("command", ["analyze", "search"])
def test_places_that_cannot_be_written_are_refused_before_the_work(command: str, place: str) -> None:
    """The model is not even looked for."""
    option = {"analyze": ["--report"], "search": ["--scheme", "w8", "--budget", "8bpw", "--out"]}[command]
    with pytest.raises(tq.InputError, match="cannot write"):
        run(command, "no_module:model", "--calibration", "no_module:data", *option, place)


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_a_drop_below_nothing_is_refused(command: str) -> None:
    data = ["--calibration"] if command == "analyze" else ["users_net:model", "--inputs"]
    with pytest.raises(tq.InputError, match="--max-drop"):
        run(command, "users_net:model", *data, "users_net:batches", "--metric", "users_net:model", "--max-drop", "-1")
