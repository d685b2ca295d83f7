"""Products with weights of few bits, and lookups in them: kernels against float64, what the graph becomes, refusals."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, groupwise, per_tensor
from nets import Call
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchquant as tq
from torchquant.artifacts.serialize import export_again
from torchquant.backends import inductor_x86
from torchquant.errors import LoweringError, SchemeError
from torchquant.fx import ops
from torchquant.ops.x86 import native, rows
from torchquant.ops.x86.few_bits import LEAST_SCALE
from torchquant.ops.x86.row_products import replace_row_products
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer

LEAST = 2.0**-100
SHAPES = [(40, 64, 32), (16, 40, None), (7, 24, 8), (33, 130, None), (5, 3, None), (20, 60, 20), (48, 600, 300)]


def grid_of(n, k, bits, group, affine, half=True):
    generator = torch.Generator().manual_seed(n * k + bits)
    groups, low = k // group if group else 1, -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (n, k), generator=generator)
    scale = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    point = torch.randint(low, -low, (n, groups), generator=generator) if affine else torch.zeros(n, groups)
    return rows.Grid(codes, scale.half().float() if half else scale, point.long(), bits, low)


def weight_of(grid):
    n, k = grid.codes.shape
    codes = grid.codes.float().view(n, grid.scale.shape[1], -1)
    return ((codes - grid.zero_point[..., None].float()) * grid.scale[..., None]).view(n, k)


def decibels(got, wanted):
    return 10 * torch.log10((wanted**2).mean() / ((got - wanted) ** 2).mean().clamp(min=1e-300)).item()


@pytest.fixture(autouse=True, scope="module")
def _library():
    native.load()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_a_product_is_that_of_the_decoded_weight(instructions, bits, affine, n, k, group):
    torch.manual_seed(0)
    grid, bias = grid_of(n, k, bits, group, affine, half=not affine), torch.randn(n) if affine else None
    packed, weight = rows.pack(grid, bias), weight_of(grid)
    assert torch.equal(native.ops().x86_lookup(packed, torch.arange(n), k), weight)
    for count in (1, 2, 5, 9):
        x = torch.randn(count, k)
        wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert decibels(native.ops().x86_linear(packed, x, n, 16, LEAST), wanted) > 75
        scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=LEAST)
        codes = (x * (1 / scale)).round().clamp(-127, 127) * scale
        wanted = F.linear(codes.double(), weight.double(), None if bias is None else bias.double())
        assert decibels(native.ops().x86_linear(packed, x, n, 8, LEAST), wanted) > 110


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_largest_codes_and_activations_do_not_overflow(instructions, bits):
    n, k = 16, 2048
    codes = torch.full((n, k), 2 ** (bits - 1) - 1)
    grid = rows.Grid(codes, torch.ones(n, 1), torch.full((n, 1), -(2 ** (bits - 1))), bits, -(2 ** (bits - 1)))
    x = torch.ones(2, k)
    x[1] = -1
    for width in (16, 8):
        got = native.ops().x86_linear(rows.pack(grid), x, n, width, LEAST)
        torch.testing.assert_close(got, F.linear(x, weight_of(grid)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [16, 8])
def test_rows_that_are_zero_or_not_finite(instructions, width):
    grid = grid_of(20, 64, 4, 32, True)
    x = torch.randn(4, 64)
    x[0], x[1, 5], x[2, 40] = 0, torch.nan, torch.inf
    y = native.ops().x86_linear(rows.pack(grid), x, 20, width, LEAST)
    assert torch.equal(y[0], torch.zeros(20))
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[3].isfinite().all()


def test_a_magnitude_far_from_one_keeps_its_digits(instructions):
    grid = grid_of(20, 64, 4, 32, True)
    for size in (1e-30, 1e30):
        x = torch.randn(3, 64) * size
        wanted = F.linear(x.double(), weight_of(grid).double())
        assert decibels(native.ops().x86_linear(rows.pack(grid), x, 20, 16, LEAST_SCALE), wanted) > 75


def test_threads_and_strides_change_nothing():
    grid = grid_of(1000, 320, 4, 32, True)
    packed, x = rows.pack(grid), torch.randn(320, 37).T
    alone, threads = torch.get_num_threads(), 4
    try:
        torch.set_num_threads(1)
        one = [native.ops().x86_linear(packed, x[:n], 1000, 16, LEAST) for n in (1, 37)]
        torch.set_num_threads(threads)
        many = [native.ops().x86_linear(packed, x[:n], 1000, 16, LEAST) for n in (1, 37)]
    finally:
        torch.set_num_threads(alone)
    assert all(map(torch.equal, one, many))
    assert torch.equal(one[0], one[1][:1])  # how many rows go together does not matter


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_unpack_gives_back_what_was_packed(bits, affine):
    for n, k, group in SHAPES:
        grid, bias = grid_of(n, k, bits, group, affine), torch.randn(n)
        weight, stored = rows.unpack(rows.pack(grid, bias))
        assert torch.equal(weight, weight_of(grid))
        assert torch.equal(stored, bias)


@pytest.mark.parametrize(("bits", "most"), [(8, 8.6), (4, 4.6), (3, 3.6), (2, 2.6)])
def test_bytes_of_a_weight(bits, most):
    packed = rows.pack(grid_of(1024, 1024, bits, 32, False))
    assert packed.numel() * 8 / 1024**2 < most


def test_damaged_bytes_are_refused():
    packed, x = rows.pack(grid_of(40, 64, 4, 32, True), torch.randn(40)), torch.randn(2, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        damaged = packed.clone()
        place = int(torch.randint(0, 16, (), generator=generator))
        value = int(torch.randint(-(2**31), 2**31, (), generator=generator)) >> int(
            torch.randint(0, 31, (), generator=generator)
        )
        damaged[:64].view(torch.int32)[place] = value
        with contextlib.suppress(RuntimeError):  # what is not refused changed numbers alone
            assert native.ops().x86_linear(damaged, x, 40, 16, LEAST).shape == (2, 40)
    for cut in (packed[:-64], packed[:32], packed[:0], packed.float()):
        with pytest.raises(RuntimeError, match="packed weight"):
            native.ops().x86_linear(cut, x, 40, 16, LEAST)


def test_operands_that_do_not_fit_are_refused():
    packed = rows.pack(grid_of(40, 64, 4, 32, True))
    linear, look_up = native.ops().x86_linear, native.ops().x86_lookup
    for x in (torch.randn(2, 63), torch.randn(()), torch.randn(2, 64).double()):
        with pytest.raises(RuntimeError, match="rows of 64"):
            linear(packed, x, 40, 16, LEAST)
    for outputs, bits in ((41, 16), (40, 4)):
        with pytest.raises(RuntimeError, match="40 values"):
            linear(packed, torch.randn(2, 64), outputs, bits, LEAST)
    for index in (-1, 40, 2**40):
        with pytest.raises(RuntimeError, match="out of range"):
            look_up(packed, torch.tensor([0, index]), 64)
    with pytest.raises(RuntimeError, match="int32 or int64"):
        look_up(packed, torch.randn(3), 64)
    assert linear(packed, torch.randn(0, 64), 40, 16, LEAST).shape == (0, 40)
    assert look_up(packed, torch.zeros(2, 0, dtype=torch.int32), 64).shape == (2, 0, 64)


# graphs ---------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is looked up and multiplied by, three linears on the same rows, one on their product."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.o = nn.Linear(64, 64)

    def forward(self, tokens):
        x = self.table(tokens)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 32).sum(2)
        return self.head(x + self.o(torch.cat([q * self.k(x), self.v(x).view(b, t, 32)], -1)))


def converted(model, example, scheme, **options):
    lengths = {1: torch.export.Dim("t", min=1, max=64)}
    sizes = {"args": tuple(None if t.is_floating_point() else lengths for t in example)}
    graph = torch.export.export(Call(lambda m, *a: m.model(*a), model=model).eval(), example, dynamic_shapes=sizes)
    prepared = prepare_pt2e(graph.module(), X86Quantizer(scheme, **options))
    tq.calibrate(prepared, [example])
    return convert_pt2e(prepared)


def calls(graph, name):
    return [n for n in graph.graph.nodes if ops.op_name(n) == name]


def test_siblings_are_one_product_and_a_tied_table_is_stored_once():
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 9))
    quantized = converted(Tied(), (tokens,), "w4_g32")
    graph = export_again(quantized, (tokens,)).module()
    wanted = graph(tokens)
    (packed,) = replace_row_products(graph)
    assert sorted(packed.products) == ["linear_w4a16"] * 5 + ["lookup_w4"]
    products, (lookup,) = calls(graph, "x86_linear"), calls(graph, "x86_lookup")
    assert [p.args[2] for p in products] == [128, 64, 50]
    assert lookup.args[0].target == products[-1].args[0].target
    assert not calls(graph, "linear")
    assert decibels(graph(tokens), wanted) > 70


@pytest.mark.parametrize(
    "scheme",
    [
        "w4_g32",
        "w3_symmetric_g64",
        "w8a8",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("w8", "w2_g16", "w4a8_g32")),
    ],
)
def test_lowered_with_packed_weights(scheme, tmp_path):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 50, (1, 9))
    quantized = converted(model, (tokens,), scheme)
    program = inductor_x86.lower(quantized, (tokens,), progress=False)
    assert program.proof.fused == program.proof.annotated == 6
    for length in (1, 9, 40):
        tokens = torch.randint(0, 50, (1, length))
        assert decibels(program(tokens), quantized(tokens)) > 70
    program.save(tmp_path / "model.pt2")
    assert torch.equal(inductor_x86.load(tmp_path / "model.pt2")(tokens), program(tokens))


def test_weights_stay_packed_in_the_artefact(tmp_path):
    """Freezing would fold them to float: 512 x 512 weights at 4.5 bits are 147 kB, as floats 1 MB."""
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), torch.randn(1, 2, 512)
    program = inductor_x86.lower(converted(model, (x,), "w4_symmetric_g32"), (x,), progress=False)
    library = native.library_file().stat().st_size
    assert program.size_bytes - library < 2 * 512 * 512


def test_groups_that_do_not_divide_become_smaller_and_the_report_says_so():
    x = torch.randn(1, 4, 48)
    quantized = converted(nn.Linear(48, 8), (x,), "w4_g32")
    assert "multiple of 32" in str(tq.report(quantized))
    program = inductor_x86.lower(quantized, (x,), progress=False)
    assert program.proof.kernels["torchquant_linear_w4a16"] == 1


def test_activations_that_the_kernel_does_not_quantize_itself_are_right():
    """Weights by group under static activations: codes are made in front of the kernel."""
    x = torch.randn(3, 64)
    prepared = prepare_pt2e(
        torch.export.export(nn.Linear(64, 8).eval(), (x,)).module(),
        SpecQuantizer(["linear"], per_tensor(), groupwise(32)),
    )
    prepared(x)
    quantized = convert_pt2e(prepared)
    program = inductor_x86.lower(quantized, (x,), progress=False)
    assert program.proof.kernels["torchquant_linear_w4a16"] == 1
    assert decibels(program(x), quantized(x)) > 70


def test_without_our_kernels_they_are_refused_by_name():
    x = torch.randn(2, 64)
    quantized = converted(nn.Linear(64, 8), (x,), "w4_g32")
    with pytest.raises(LoweringError, match=r"linear linear .*own kernels alone"):
        inductor_x86.lower(quantized, (x,), own_kernels=False, progress=False)


def test_bags_and_convolutions_stay_float_with_a_reason():
    bag = nn.EmbeddingBag(20, 32, mode="sum")
    quantized = X86Quantizer("w4_g32")
    graph = torch.export.export(bag.eval(), (torch.randint(0, 20, (3, 4)),)).module()
    text = str(tq.report(convert_pt2e(prepare_pt2e(graph, quantized))))
    assert "no kernel for bags" in text
    image = torch.randn(1, 3, 8, 8)
    graph = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (image,)).module()
    text = str(tq.report(convert_pt2e(prepare_pt2e(graph, X86Quantizer("w4_g32")))))
    assert "static_int8_w7, not in w4" in text


def test_a_bag_that_another_quantizer_has_quantized_is_refused_by_name():
    bag, tokens = nn.EmbeddingBag(20, 32, mode="sum").eval(), torch.randint(0, 20, (3, 4))
    graph = torch.export.export(bag, (tokens,)).module()
    quantized = convert_pt2e(prepare_pt2e(graph, WeightOnlyQuantizer("w4_g32")))
    with pytest.raises(LoweringError, match="no kernel for bags"):
        inductor_x86.lower(quantized, (tokens,), progress=False)


def test_schemes_are_listed_in_short():
    with pytest.raises(SchemeError, match=r"w\{8,4,3,2\}\[a8\]\[_symmetric\]\[_g\{256,128,64,32,16\}\]") as caught:
        X86Quantizer("w5")
    assert len(str(caught.value)) < 200


def test_an_index_out_of_range_is_an_error_and_not_the_end_of_the_process(tmp_path):
    """The table stays float: what Inductor generates for it would end the process."""

    def model(m, tokens):
        return m.head(m.table(tokens))

    tokens = torch.randint(0, 100, (1, 4))
    module = Call(model, table=nn.Embedding(100, 16), head=nn.Linear(16, 16)).eval()
    prepared = prepare_pt2e(torch.export.export(module, (tokens,)).module(), X86Quantizer("static_int8"))
    prepared(tokens)
    quantized = convert_pt2e(prepared)
    program = inductor_x86.lower(quantized, (tokens,), progress=False)
    for wrong in (tokens + 1000, tokens - 1000):
        with pytest.raises(RuntimeError):
            program(wrong)
    assert decibels(program(tokens), quantized(tokens)) > 60
