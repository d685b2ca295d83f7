"""Files that were written to run something: nothing in them runs, whatever reads them."""

import contextlib
import hashlib
import json
import sys

import crafted
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import torchquant as tq
from torchquant.artifacts import exported
from torchquant.backends import executorch_xnnpack, inductor_cuda
from torchquant.cli import main as cli
from torchquant.cli import sources
from torchquant.files import archive
from torchquant.ops.x86 import native
from torchquant.quantizers import CudaQuantizer
from torchquant.quantizers.x86 import X86Quantizer

GRAPH, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.register_buffer("shift", torch.ones(32))

    def forward(self, x, *, mode="plain"):
        return self.last((self.first(x) + self.shift).relu()).reshape(x.shape[0] * 2, 8)


def batch():
    return torch.randn(4, 16)


SHAPES = {"x": {0: torch.export.Dim("batch", min=2, max=64)}, "mode": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind of archive that holds a graph, and how it is read."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    theirs = folder / "theirs.pt2"
    plain = {"x": batch(), "mode": "plain"}
    torch.export.save(torch.export.export(Net(), (), plain, dynamic_shapes=SHAPES), theirs)
    options = {"algorithms": (), "progress": False, "dynamic_shapes": SHAPES}
    graph = tq.quantize(Net(), plain, [plain], quantizer=X86Quantizer(), **options)
    packed = tq.quantize(Net(), plain, [plain], quantizer=CudaQuantizer("w8a16"), **options)
    return {
        "theirs": (theirs, lambda path: sources.load_model(str(path))),
        "graph": (tq.save(graph, folder / "graph.pt2", plain), tq.load),
        "cuda": (
            inductor_cuda.lower(packed, plain, device="cpu").save(folder / "cuda.pt2"),
            lambda path: inductor_cuda.load(path, "cpu").graph,
        ),
    }


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that every payload makes; a module of that name does so when it is imported."""
    path = tmp_path / "ran"
    (tmp_path / "hostile_module.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Kind: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("hostile_module", None)


def command(marker):
    return f"touch {marker}"


def expression(marker):
    return f"__import__('os').system('touch {marker}')"


# what is changed in an archive: a function of its members and of the file that the payload makes ----------------------


def example_inputs(members, marker):
    members[INPUTS] = crafted.pickled(command(marker))


def example_inputs_without_zip(members, marker):
    members[INPUTS] = crafted.plainly_pickled(command(marker))


def pickled_member(config, content):
    def change(members, marker):
        name, payload = next(iter(members[config]["config"].items())) if members[config]["config"] else ("x", None)
        folder = config.rpartition("/")[0]
        payload = payload or {"path_name": "tensor_0", "is_param": False, "tensor_meta": None}
        members[config]["config"][name] = {**payload, "use_pickle": True}
        members[f"{folder}/{payload['path_name']}"] = content(command(marker))

    return change


def member_of_two_forms(members, marker):
    config = members[WEIGHTS]["config"]
    name = next(iter(config))
    pickled_member(WEIGHTS, lambda code: crafted.plainly_pickled(code))(members, marker)
    member = f"data/weights/{config[name]['path_name']}"
    members[member] += bytes(-len(members[member]) % 8)
    config["another"] = {**config[name], "use_pickle": False}


def object_member(prefix, content):
    def change(members, marker):
        entry = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        members[CONSTANTS]["config"]["thing"] = entry
        members[f"data/constants/{prefix}0"] = content(command(marker))

    return change


def legacy_member(folder):
    def change(members, marker):
        members[f"data/{folder}/model.pt"] = crafted.pickled(command(marker))

    return change


def size(members, marker):
    values = members[GRAPH]["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0] = {"as_expr": {"expr_str": expression(marker), "hint": {"as_int": 4}}}


def size_behind_a_name(members, marker):
    members[GRAPH] = _renamed(members[GRAPH], "x", "opset_version")
    values = members[GRAPH]["graph_module"]["graph"]["tensor_values"]
    values["opset_version"]["sizes"][0] = {"as_expr": {"expr_str": expression(marker), "hint": {"as_int": 4}}}


def hidden_size(members, marker):
    values = members[GRAPH]["graph_module"]["graph"]["tensor_values"]
    code = f"(lambda: {expression(marker)})() or 4"
    values["x"]["sizes"][0] = {"as_expr": {"expr_str": f"Max(4, Symbol('s0'), {code})", "hint": {"as_int": 4}}}


def guard(members, marker):
    members[GRAPH]["guards_code"] = [f"L['x'].size()[0] < 0 or {expression(marker)} == 0"]


def guard_by_attributes(members, marker):
    code = "torch.os.system"
    members[GRAPH]["guards_code"] = [f"{code}('touch {marker}') == 0"]


def function(target):
    def change(members, marker):
        graph = members[GRAPH]["graph_module"]["graph"]
        argument = {"name": "", "arg": {"as_string": command(marker)}, "kind": 1}
        node = {**graph["nodes"][0], "target": target, "inputs": [argument], "name": "extra"}
        node["outputs"] = [{"as_none": True}]
        graph["nodes"].insert(0, node)

    return change


def operator_argument(members, marker):
    graph = members[GRAPH]["graph_module"]["graph"]
    argument = {"name": "", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    graph["nodes"][0]["inputs"].append(argument)


def code_in(marker):
    return f"x); {expression(marker)}; f("


def _renamed(value, old, new):
    """The JSON with a name exchanged wherever it is one."""
    if isinstance(value, dict):
        return {new if k == old else k: _renamed(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, old, new) for v in value]
    return new if value == old else value


def node_name(members, marker):
    name = members[GRAPH]["graph_module"]["graph"]["nodes"][0]["name"]
    members[GRAPH] = _renamed(members[GRAPH], name, f"y = {expression(marker)}; z")


def placeholder_name(members, marker):
    members[GRAPH] = _renamed(members[GRAPH], "x", f"x={expression(marker)}")


def argument_name(members, marker):
    signature = members[GRAPH]["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = ["x", f"mode={expression(marker)}"]


def keyword_name(members, marker):
    signature = members[GRAPH]["graph_module"]["module_call_graph"][0]["signature"]
    tree = json.loads(signature["in_spec"])
    named = tree[1]["children_spec"][1]
    names = json.loads(named["context"] or "null") or ["y"]
    code = f"z': {expression(marker)}, '{names[-1]}"
    tree[1]["children_spec"][1] = {**named, "type": "builtins.dict", "context": json.dumps([*names[:-1], code])}
    signature["in_spec"] = json.dumps(tree)


def parameter_name(members, marker):
    config = members[WEIGHTS]["config"]
    name = next(iter(config))
    evil = f'a"), {expression(marker)}, getattr(self, "b'.replace(".", "\\x2e")
    config[evil] = config.pop(name)
    members[GRAPH] = _renamed(members[GRAPH], name, evil)


def attribute_name(members, marker):
    config = members[WEIGHTS]["config"]
    name = next(iter(config))
    evil = "first or exec(bytes([112]))"
    config[evil] = config.pop(name)
    members[GRAPH] = _renamed(members[GRAPH], name, evil)


def number(members, marker):
    values = members[GRAPH]["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0] = {"as_expr": {"expr_str": "Symbol('s0')", "hint": {"as_int": expression(marker)}}}


def tower(members, marker):
    values = members[GRAPH]["graph_module"]["graph"]["tensor_values"]
    values["x"]["sizes"][0] = {"as_expr": {"expr_str": "Pow(9, Pow(9, Pow(9, 9)))", "hint": {"as_int": 4}}}


def text_argument(members, marker):
    members[GRAPH] = _renamed(members[GRAPH], "plain", f"' or {expression(marker)} or '")


def enumeration(members, marker):
    signature = members[GRAPH]["graph_module"]["module_call_graph"][0]["signature"]
    tree = json.loads(signature["out_spec"])
    context = json.dumps({"__enum__": True, "fqn": "hostile_module:Kind", "name": "x"})
    signature["out_spec"] = json.dumps([tree[0], {"type": "builtins.list", "context": context, "children_spec": []}])


def default_factory(members, marker):
    signature = members[GRAPH]["graph_module"]["module_call_graph"][0]["signature"]
    tree = json.loads(signature["out_spec"])
    context = {"default_factory_module": "hostile_module", "default_factory_name": "Kind", "dict_context": []}
    spec = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    signature["out_spec"] = json.dumps([tree[0], spec])


def library(members, marker):
    members["data/aotinductor/model/model.wrapper.so"] = b"\x7fELF"
    members["data/aotinductor/model/model.wrapper_metadata.json"] = {"AOTI_DEVICE_KEY": "cpu"}


def file_of_the_caller(members, marker):
    graph = members[GRAPH]["graph_module"]["graph"]
    named = [("filename", {"as_string": str(marker)}), ("shared", {"as_bool": True}), ("size", {"as_int": 4})]
    inputs = [{"name": n, "arg": a, "kind": 1} for n, a in named]
    node = {**graph["nodes"][0], "target": "torch.ops.aten.from_file.default", "inputs": inputs, "name": "extra"}
    graph["tensor_values"]["extra"] = graph["tensor_values"]["x"]
    graph["nodes"].insert(0, {**node, "outputs": [{"as_tensor": {"name": "extra"}}]})


RUN_BY_TORCH = {  # torch 2.13 runs these when it loads the file, or when the graph is called
    "example inputs": example_inputs,
    "example inputs, no zip": example_inputs_without_zip,
    "a weight": pickled_member(WEIGHTS, crafted.pickled),
    "a weight in two forms": member_of_two_forms,
    "a constant": pickled_member(CONSTANTS, crafted.pickled),
    "an opaque constant": object_member("opaque_obj_", crafted.plainly_pickled),
    "all weights": legacy_member("weights"),
    "all constants": legacy_member("constants"),
    "a size": size,
    "a size in an expression": hidden_size,
    "a size behind a name": size_behind_a_name,
    "an enumeration": enumeration,
    "a defaultdict": default_factory,
    "a guard": guard,
    "a guard by attributes": guard_by_attributes,
    "a text among the arguments": text_argument,
    "a file of the caller": file_of_the_caller,
}
OTHERS = {  # and these with more craft
    "a function": function("torch.os.system"),
    "a node's name": node_name,
    "a keyword's name": keyword_name,
    "an argument's name": argument_name,
    "a library by an operator": function("torch.ops.load_library"),
    "a method of an operator": function("torch.ops.aten.add.__class__"),
    "an operator of the module operator": function("_operator.methodcaller"),
    "an operator as an argument": operator_argument,
    "a TorchScript object": object_member("custom_obj_", crafted.plainly_pickled),
    "a placeholder's name": placeholder_name,
    "a parameter's name": parameter_name,
    "an attribute's name": attribute_name,
    "a text in the place of a number": number,
    "a number that takes for ever": tower,
    "a library": library,
}


LEFT_OUT = ("example inputs", "example inputs, no zip", "all weights", "all constants", "a library")  # torch sees none


@pytest.mark.parametrize("kind", ["theirs", "graph", "cuda"])
@pytest.mark.parametrize("name", [*RUN_BY_TORCH, *OTHERS])
def test_nothing_in_a_graph_runs(files, tmp_path, marker, kind, name):
    source, load = files[kind]
    path = crafted.changed(source, tmp_path / "hostile.pt2", lambda m: (RUN_BY_TORCH | OTHERS)[name](m, marker))
    if name in LEFT_OUT or (name, kind) == ("a text among the arguments", "cuda"):
        graph = load(path)
        graph(batch()) if kind == "cuda" else graph(x=batch(), mode="plain")
    else:
        with pytest.raises(tq.ArtifactError, match=r"hostile\.pt2"):
            load(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", RUN_BY_TORCH)
def test_the_same_runs_where_torch_reads_the_file(files, tmp_path, marker, name):
    path = crafted.changed(
        files["theirs"][0], tmp_path / "hostile.pt2", lambda members: RUN_BY_TORCH[name](members, marker)
    )
    with contextlib.suppress(Exception):  # it may fail once it has run
        torch.export.load(path).module()(x=batch(), mode="plain")
    assert marker.exists()


def test_what_torch_wrote_is_read_as_torch_reads_it(files):
    x, path = batch(), files["theirs"][0]
    ours, theirs = exported.load(path), torch.export.load(path)
    assert torch.equal(ours.module()(x=x, mode="plain"), theirs.module()(x=x, mode="plain"))
    assert ours.module().code == theirs.module().code
    assert ours._guards_code == theirs._guards_code
    for program in (ours, theirs):
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(x=torch.randn(65, 16), mode="plain")


def test_inputs_may_be_named_like_the_fields_of_a_file(tmp_path):
    class Named(torch.nn.Module):
        def forward(self, target, name, metadata, inputs, nodes, dtype, signature):
            return target + name + metadata + inputs + nodes + dtype + signature

    x = torch.ones(3, 4)
    shapes = tuple({0: torch.export.Dim("n")} for _ in range(7))
    torch.export.save(torch.export.export(Named(), (x,) * 7, dynamic_shapes=shapes), tmp_path / "named.pt2")
    assert torch.equal(exported.load(tmp_path / "named.pt2").module()(*[x[:2]] * 7), 7 * x[:2])


def test_sizes_that_depend_on_each_other_are_read(tmp_path):
    class Halves(torch.nn.Module):
        def forward(self, x, y):
            return x[: x.shape[0] // 2] + y[1:], x.reshape(-1)[: 3 * y.shape[0]] ** 2, max(x.shape[0], 7)

    n = torch.export.Dim("n", min=2, max=32)
    example = (torch.ones(8, 4), torch.ones(5, 4))
    program = torch.export.export(Halves(), example, dynamic_shapes=({0: 2 * n}, {0: n + 1}), strict=False)
    torch.export.save(program, tmp_path / "halves.pt2")
    actual, expected = exported.load(tmp_path / "halves.pt2"), torch.export.load(tmp_path / "halves.pt2")
    assert actual._guards_code == expected._guards_code
    assert actual.module().code == expected.module().code
    assert str(actual.range_constraints) == str(expected.range_constraints)


def test_notes_of_nodes_end_no_comment(files, tmp_path):
    def change(members):
        for node in members[GRAPH]["graph_module"]["graph"]["nodes"]:
            node["metadata"]["stack_trace"] = 'File "a", line 1, in f\n    x = 1\r    exec(y)'

    path = crafted.changed(files["theirs"][0], tmp_path / "noted.pt2", change)
    traces = [n.meta["stack_trace"] for n in exported.load(path).graph.nodes if "stack_trace" in n.meta]
    assert traces
    assert all(t.splitlines()[-1] == "    x = 1     exec(y)" for t in traces)


ARITHMETIC = (
    "Mul(Integer(2), Symbol('s0', positive=True, integer=True))",
    "2*s0 + 1",
    "s0**2",
    "(s0 - 1)//2",
    "Mod(s0, 3)",
    "FloorDiv(s0, Integer(2))",
    "Max(1, s0)",
    "-s0",
    "Float('1.5', precision=53)",
    "Pow(Symbol('s0'), Integer(-1))",
)


@pytest.mark.parametrize("text", ARITHMETIC)
def test_expressions_of_sizes_are_let_through(text):
    exported._check_expression(text)


NO_ARITHMETIC = (
    "s0.__class__",
    "[s0]",
    "(lambda: 1)()",
    "f'{s0}'",
    "open('a')",
    "Symbol('a b')",
    "s0[0]",
    "9**9**9",
    "1 << 1000",
    "",
    "s0;s1",
    "(s0 := 1)",
    "Add('f(x)')",
    "Pow(2, 100000)",
    "[x for x in s0]",
    "s0 if s1 else s2",
    3,
    None,
)


@pytest.mark.parametrize("text", NO_ARITHMETIC)
def test_other_expressions_are_not(text):
    with pytest.raises(exported.UnsafeContentError):
        exported._check_expression(text)


GUARDS = (
    "(L['x'].size()[0] // 2) != 1",
    "L['x'].size()[0] <= 64",
    "math.isnan(L['y'])",
    "L['m'] == 'plain'",
    "not L['flag']",
    "max(1, L['x'].size()[0]) >= 2",
    "L['flat_args'][0].stride()[1] == 1",
)


@pytest.mark.parametrize("text", GUARDS)
def test_guards_are_let_through(text):
    exported._check_guard(text)


NO_GUARDS = (
    "torch.os.system('x')",
    "L.__class__",
    "getattr(L, 'x')",
    "torch.load('x')",
    "eval('x')",
    "L['\"']",
    "exec(L['x'])",
    "math.__loader__",
    "L['x'].size.__globals__",
    "().__class__",
    "globals()",
    "L['x'].tofile('x')",
)


@pytest.mark.parametrize("text", NO_GUARDS)
def test_other_guards_are_not(text):
    with pytest.raises(exported.UnsafeContentError):
        exported._check_guard(text)


def test_the_format_before_is_refused(tmp_path, marker):
    content = crafted.pickled(command(marker))
    members = {"version": b"8.20", "serialized_exported_program.json": b"{}"}
    members |= {f"serialized_{n}.pt": content for n in ("state_dict", "constants", "example_inputs")}
    path = crafted.write(tmp_path / "old.pt2", members, root="")
    with pytest.raises(tq.ArtifactError, match=r"old\.pt2"):
        sources.load_model(str(path))
    assert not marker.exists()


def test_two_members_of_one_name_are_refused(files, tmp_path):
    source = files["theirs"][0]
    members = crafted.members(source)
    path = crafted.write(tmp_path / "twice.pt2", members)
    with pytest.warns(UserWarning, match="Duplicate"), crafted.zipfile.ZipFile(path, "a") as out:
        out.writestr(f"model/{INPUTS}", b"")
    with pytest.raises(tq.ArtifactError, match="twice"):
        exported.load(path)


@pytest.mark.parametrize("field", ["in_spec", "out_spec"])
@pytest.mark.parametrize("change", [enumeration, default_factory])
def test_trees_of_a_program_import_nothing(files, tmp_path, marker, field, change):
    source = files["cuda"][0]
    signature = {"in_spec": None, "out_spec": json.dumps([1, {}])}
    change({GRAPH: {"graph_module": {"module_call_graph": [{"signature": signature}]}}}, marker)
    sealed = crafted.about(source)
    sealed["signature"][field]["exact"] = signature["out_spec"]
    path = crafted.write(tmp_path / "hostile.pt2", crafted.members(source), sealed)
    with pytest.raises(tq.ArtifactError, match="names a module"):
        inductor_cuda.load(path, "cpu")
    assert not marker.exists()


# files that are code --------------------------------------------------------------------------------------------------


def test_the_command_runs_an_x86_program_only_if_it_is_trusted(x86_pixels, tmp_path, monkeypatch):
    path = x86_pixels.program.save(tmp_path / "program.pt2")
    np.savez(tmp_path / "data.npz", x=np.stack([t.numpy() for t in x86_pixels.batch]))
    arguments = ["run", str(path), "--inputs", str(tmp_path / "data.npz")]
    refused = CliRunner().invoke(cli.app, arguments)
    assert isinstance(refused.exception, tq.InputError)
    assert "--trust" in str(refused.exception)
    assert CliRunner().invoke(cli.app, [*arguments, "--trust"]).exit_code == 0
    monkeypatch.setattr(native, "_load_file", lambda *_: pytest.fail("it is loaded"))
    monkeypatch.setattr("torchquant.backends.inductor_x86.program.run_package", lambda path: pytest.fail("it is run"))
    report = CliRunner().invoke(cli.app, ["report", str(path)])
    assert report.exit_code == 0
    assert "annotated compute ops run quantized" in report.output


def test_a_library_that_changed_is_not_mapped(x86_pixels, tmp_path, monkeypatch):
    from torchquant.backends import inductor_x86

    source = x86_pixels.program.save(tmp_path / "program.pt2")
    members, sealed = crafted.members(source), crafted.about(source)
    name = next(n for n in members if n.endswith(".so") and "aotinductor" in n)
    path = crafted.write(tmp_path / "other.pt2", {**members, name: members[name] + b"\0"})
    with crafted.zipfile.ZipFile(path, "a") as out:
        out.writestr(f"model/extra/{archive.NAME}", json.dumps(sealed))
    monkeypatch.setattr(native, "_load_file", lambda *_: pytest.fail("it is loaded"))
    with pytest.raises(tq.ArtifactError, match="not as it was written"):
        inductor_x86.load(path)


def test_a_library_that_came_with_a_program_stays_out_of_the_cache(tmp_path, monkeypatch):
    loaded = {}
    monkeypatch.setenv("TORCHQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_load_file", loaded.__setitem__)
    name = native.build_name()
    content = b"not of our sources, but of their name: " + native._namespace(name).encode()
    native.load_packaged(name, content)
    assert loaded[name].read_bytes() == content
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(native, "_build", lambda folder: pytest.fail("it is built"))
    built = tmp_path / "cache" / name
    built.write_bytes(b"of our sources")
    built.with_suffix(".sha256").write_text(hashlib.sha256(b"of our sources").hexdigest())
    assert native.library_file() == built
    monkeypatch.setattr(native, "_load_file", lambda name, path: native._loaded.update({name: path}))
    native.load_packaged(name, content)
    assert native._loaded == {name: built}


def test_a_library_whose_ops_are_not_those_of_its_name_is_not_mapped(monkeypatch):
    """Two such would register the same ops, at which torch ends the process."""
    monkeypatch.setattr(native, "_load_file", lambda *_: pytest.fail("it is loaded"))
    other = native.PREFIX + "0" * 16 + ".so"
    with pytest.raises(tq.LoweringError, match="lower the model again"):
        native.load_packaged(other, native.library_file().read_bytes())


def test_the_command_lets_torch_unpickle_a_model_only_if_it_is_trusted(files, tmp_path, marker):
    path = crafted.changed(
        files["theirs"][0], tmp_path / "hostile.pt2", lambda members: RUN_BY_TORCH["a weight"](members, marker)
    )
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 4, 16), "float32"))
    command = ["report", "--model", str(path), "--calibration", str(tmp_path / "data.npz")]
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, tq.ArtifactError)
    assert "give --trust" in str(refused.exception)
    assert not marker.exists()
    assert CliRunner().invoke(cli.app, [*command, "--trust"]).exit_code == 1  # what the payload returned is no tensor
    assert marker.exists()
    assert sources.load_model(str(files["theirs"][0]), trust=True)(x=batch(), mode="plain").shape == (8, 8)


def test_pickles_in_other_files_do_not_run(tmp_path, marker):
    content = crafted.plainly_pickled(command(marker))
    for name in ("a.npz", "a.safetensors", "a.pte", "a.pt2"):
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "b.npz", x=np.array([crafted.Payload(command(marker))], dtype=object))
    readers = [
        *((sources.load_batches, n) for n in ("a.npz", "a.safetensors", "b.npz")),
        *((f, "a.pt2") for f in (sources.load_model, tq.load)),
        (executorch_xnnpack.load, "a.pte"),
    ]
    for read, name in readers:
        with pytest.raises(tq.ArtifactError, match=name):
            read(str(tmp_path / name))
    assert not marker.exists()


def test_a_program_is_not_pickled(files):
    import copy
    import pickle

    program = inductor_cuda.load(files["cuda"][0], "cpu")
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"\.save\(path\)"):
            copying(program)
