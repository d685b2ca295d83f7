"""Where oneDNN's int8 products saturate, and which products of a graph that concerns."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from exact import Grid, conv, depthwise, exported, linear, signed, targets
from nets import Call

from torchquant.errors import ArtifactError, LoweringError
from torchquant.fx import ops
from torchquant.ops.x86 import exactness, saturation, support
from torchquant.ops.x86.translation import replace_regions

UINT8, UINT7, INT8 = Grid(0.02, 117), Grid(0.04, 60, 0, 127), signed(0.02, -17)

MEASURED = """
import json, sys, torch
from torchquant.ops.x86 import exactness, saturation
onednn = torch.ops.onednn
def linear(x, w):
    packed = onednn.qlinear_prepack(w, list(x.shape))
    scales, zeros = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int64)
    return onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
def conv(x, w):
    scales, zeros, form = torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int64), [[1, 1], [1, 1], [1, 1], 1]
    packed = onednn.qconv_prepack(w, scales, 1.0, 0, *form, list(x.shape))
    return onednn.qconv_pointwise(x, 1.0, 0, packed, scales, zeros, None, *form, 1.0, 0, torch.float32, "none", [], "")
def exact(dtype, top, heaviest):
    low = 0 if dtype == torch.uint8 else -128
    same = True
    for full in (True, False):
        for m, k, n in ((4, 64, 32), (1, 512, 64), (7, 33, 5)):
            x = torch.randint(low, top + 1, (m, k)).to(dtype)
            w = torch.randint(-heaviest, heaviest + 1, (n, k)).to(torch.int8)
            if full:
                x.fill_(top), w.copy_(torch.where(torch.arange(n) % 2 == 0, heaviest, -heaviest)[:, None].expand(n, k))
            same &= torch.equal(linear(x, w).double(), x.double() @ w.double().T)
            if dtype == torch.uint8:
                image = x[..., None, None].expand(m, k, 3, 4).contiguous(memory_format=torch.channels_last)
                window = w[..., None, None].expand(n, k, 3, 3).contiguous()
                expected = torch.nn.functional.conv2d(image.double(), window.double(), padding=1)
                same &= torch.equal(conv(image, window).double(), expected)
    return same
u8, s8 = torch.uint8, torch.int8
cases = [(u8, 255, 127), (u8, 127, 127), (u8, 255, 64), (s8, 127, 127), (s8, 127, 64)]
measured = [str(d) for d in exactness.exact_dtypes()]
print(json.dumps([measured, [exact(*case) for case in cases]]))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", None])
def test_what_is_measured_is_what_onednn_does(isa):
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    command = [sys.executable, "-W", "ignore", "-c", MEASURED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured, (unsigned, seven_bits, light, signed_codes, signed_light) = json.loads(done.stdout.splitlines()[-1])
    assert ("torch.uint8" in measured) == unsigned
    assert ("torch.int8" in measured) == signed_codes
    assert seven_bits
    assert light
    assert signed_light
    if isa:
        assert not unsigned


CODES = {  # grid, codes of the weight, whether two products may leave 16 bits
    "uint8": (UINT8, 127, True),
    "uint8 by 65": (UINT8, -65, True),
    "uint8 by 64": (UINT8, -64, False),
    "7 bits": (UINT7, 127, False),
    "7 bits by -128": (UINT7, -128, False),
    "int8": (INT8, 65, True),
    "int8 by 64": (INT8, 64, False),
    "int8 of 7 bits": (Grid(0.04, 0, -64, 63, torch.int8), 127, True),
    "int8 below zero": (Grid(0.04, -1, -128, 0, torch.int8), 127, False),
    "zeros": (UINT8, 0, False),
}


@pytest.mark.parametrize("name", CODES)
def test_a_product_is_unsafe_where_two_of_its_codes_products_leave_16_bits(name):
    grid, code, unsafe = CODES[name]
    for layer, shape in ((linear, (2, 8)), (conv, (1, 8, 5, 5)), (depthwise, (1, 8, 5, 5))):
        size = (8,) if layer is depthwise else (8, 4)
        module = Call(lambda m, x: m.a(x), a=layer(*size, grid=grid, codes=torch.tensor(code)))
        products = saturation.unsafe_products(exported(module, (torch.randn(shape),)))
        assert list(products) == ([grid.dtype] if unsafe else [])


def unsafe_graph():
    module = Call(lambda m, x: m.b(m.a(x).relu()), a=linear(8, 9), b=linear(9, 4, INT8))
    return exported(module, (torch.randn(2, 8),))


def test_products_are_refused_where_they_saturate_and_named(monkeypatch):
    unsafe = saturation.unsafe_products(unsafe_graph())
    for exact, words in (
        ({torch.uint8, torch.int8}, None),
        ({torch.int8}, r"linear linear \(a\)\. To run"),
        (set(), r"linear linear \(a\); linear linear_1 \(b\)\. To run"),
    ):
        monkeypatch.setattr(exactness, "exact_dtypes", lambda exact=exact: exact)
        if words is None:
            saturation.refuse(unsafe, own_kernels=False)
            continue
        with pytest.raises(LoweringError, match=rf"no VNNI.*{words}.*pass own_kernels=True.*7 bits"):
            saturation.refuse(unsafe, own_kernels=False)
        with pytest.raises(LoweringError, match=r"own kernels do not take.*here, exclude") as error:
            saturation.refuse(unsafe, own_kernels=True)
        assert "own_kernels" not in str(error.value)


def test_a_package_knows_what_is_exact_only_with_vnni(monkeypatch, tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/version", "1")
    saturation.note(path, {})
    monkeypatch.setattr(exactness, "exact_dtypes", frozenset)
    exactness.check_package(path)
    saturation.note(path, saturation.unsafe_products(unsafe_graph()))
    with pytest.raises(ArtifactError, match=r"VNNI.*linear \(a\); linear linear_1 \(b\).*Lower the model on this"):
        exactness.check_package(path)
    monkeypatch.setattr(exactness, "exact_dtypes", lambda: {torch.uint8, torch.int8})
    exactness.check_package(path)


@pytest.mark.parametrize("shared", [True, False])
def test_products_of_others_keep_their_quantized_values(shared, monkeypatch):
    """Inductor must see them behind dequantize ops, and what our kernels read on the same grid stays in the region."""
    can = support.convolution
    monkeypatch.setitem(
        support._RUN,
        "conv2d",
        lambda places, node: can(places, node) and ops.arguments(node).get("groups", 1) == 1,
    )

    def f(m, x):
        y = m.first.grid(m.first(x).relu())
        z = m.theirs(y)
        return (m.last(y), z) if shared else m.last(z)

    layers = {
        "first": conv(3, 12),
        "theirs": conv(12, 12, 1, grid=None, groups=3),
        "last": conv(12, 4, 1, grid=None if shared else UINT8),
    }
    inputs = (torch.randn(2, 3, 9, 11),)
    graph = exported(Call(f, **layers), inputs)
    expected = graph(*inputs)
    built = replace_regions(graph)
    assert sorted(len(b.products) for b in built) == ([2] if shared else [1, 1])
    [left] = [n for n in graph.graph.nodes if ops.op_name(n) == "conv2d"]
    assert ops.is_dequantize(left.args[0])
    assert ops.is_quantize(left.args[0].args[0])
    assert targets(graph).count("quantized_decomposed.quantize_per_tensor.default") == 1
    actual = graph(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(actual), strict=True):
        assert float((a - b).abs().mean()) < 1e-3
