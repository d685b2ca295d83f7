"""Linears with 4-bit weights and tables of few bits: so in the program, delegated, and equal to the converted graph."""

import pytest
import torch
import torch.nn.functional as F
from foreign import SpecQuantizer, dynamic, groupwise, per_channel, per_tensor
from nets import Call
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import torchquant as tq
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer

pytest.importorskip("executorch")
from torchquant.backends import executorch_xnnpack
from torchquant.backends.executorch_xnnpack.delegated import Delegated

SCHEME = "w4a8_symmetric_g32"
QUIET = {"algorithms": (), "progress": False}
IDS = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def lowered(model, x, quantizer, **options):
    """The program, its converted graph, and the sites that read weights."""
    torch.manual_seed(0)
    exported = tq.export(model.eval(), x, **options)
    quantized = tq.quantize(exported, x, [x], quantizer=quantizer, **QUIET)
    program = executorch_xnnpack.lower(quantized, x, progress=False)
    return program, quantized, [s for s in tq.report(quantized, program).sites if s.op in ("linear", "embedding")]


def four_bit_linears(program):
    return program.proof.kernels.get("delegated int4 linear", 0)


def every_kind():
    """Linears with and without bias, with one weight, by keyword, as products with a parameter, and one not used."""

    def forward(m, x):
        x = m.twice(m.twice(m.first(x).relu()))
        x = F.linear(bias=m.offset, weight=m.named, input=x)
        x = x.flatten(0, 1)
        return torch.addmm(m.offset, torch.matmul(x, m.matrix), m.matrix) - x @ m.matrix

    parameters = {"offset": torch.randn(64), "named": torch.randn(64, 64), "matrix": torch.randn(64, 64)}
    layers = {"first": nn.Linear(96, 64), "twice": nn.Linear(64, 64, bias=False), "unused": nn.Linear(64, 64)}
    return Call(forward, **layers, **{name: nn.Parameter(value / 8) for name, value in parameters.items()})


def test_every_kind_of_linear_is_delegated_with_4_bit_weights_at_every_length():
    shapes = (({1: torch.export.Dim("length", min=1, max=9)},),)
    program, graph, sites = lowered(
        every_kind(), torch.randn(2, 5, 96), XnnpackQuantizer(SCHEME), dynamic_shapes=shapes
    )
    assert len(sites) == four_bit_linears(program) == program.proof.annotated == 7
    assert program.proof.kernels["delegate calls"] == 1
    for length in (1, 9, 4):
        x = torch.randn(2, length, 96)
        assert tq.sqnr_db(graph(x), program(x)) > 40  # an input may round to the other side


@pytest.mark.parametrize(
    ("scheme", "inputs", "weight"),
    [
        ("w4a8_symmetric_g64", 576, "int8[-8,7] per group of 64"),
        ("w4a8_symmetric_g256", 96, "int8[-8,7] per group of 32"),
        ("8da4w", 100, "int8[-8,7] per channel 0"),
        ("w4a8_symmetric", 64, "int8[-8,7] per channel 0"),
        ("8da4w", 33, "int8[-127,127] per channel 0"),
    ],
)
def test_a_weight_gets_the_largest_group_that_fits_and_the_program_computes_the_graph(scheme, inputs, weight):
    program, graph, (site,) = lowered(
        nn.Sequential(nn.Linear(inputs, 33)), torch.randn(1, inputs), XnnpackQuantizer(scheme)
    )
    assert site.weight.describe() == weight
    assert four_bit_linears(program) == weight.startswith("int8[-8,7]")
    x = torch.randn(1, inputs)
    assert tq.sqnr_db(graph(x), program(x)) > 90  # 48 with scales that are not stored as they are
    assert not site.weight.group_size or torch.equal(site.weight.scale, site.weight.scale.bfloat16().float())
    assert ("inputs are" in site.reason) == (scheme != "w4a8_symmetric" and inputs != 576)


def test_codes_of_4_bits_take_4_bits_in_the_program():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    program, _, _ = lowered(model, torch.randn(2, 512), XnnpackQuantizer(SCHEME))
    weights = 2 * 512 * 512
    assert weights / 2 < program.size_bytes < weights * 4.5 / 8 + 20_000  # 16 bits for 32 codes; biases, the program


def test_a_4_bit_weight_that_the_program_has_in_more_bits_is_an_error():
    x = torch.randn(2, 64)
    quantized = tq.quantize(nn.Sequential(nn.Linear(64, 8)), x, [x], quantizer=XnnpackQuantizer(SCHEME), **QUIET)
    sites = [s for s in tq.report(quantized).sites if s.op == "linear"]
    Delegated(integer={"linear"}, four_bits={"linear"}).check(sites)
    with pytest.raises(tq.LoweringError, match=r"linear linear \(0\).*more bits|more bits.*linear linear \(0\)"):
        Delegated(integer={"linear"}).check(sites)


SOLVERS = {"gptq": tq.GPTQ(), "adaquant": tq.AdaQuant(iterations=10)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scales_that_a_solver_chooses_are_stored_as_they_are(solver):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(64, 32)).eval(), [torch.randn(32, 64) for _ in range(2)]
    options = {"quantizer": XnnpackQuantizer(SCHEME), "algorithms": [SOLVERS[solver]], "progress": False}
    quantized = tq.quantize(model, batches[0], batches, **options)
    (site,) = (s for s in tq.report(quantized).sites if s.op == "linear")
    assert torch.equal(site.weight.scale, site.weight.scale.bfloat16().float())
    program = executorch_xnnpack.lower(quantized, batches[0], progress=False)
    assert tq.sqnr_db(quantized(batches[1]), program(batches[1])) > 90


REFUSED_GROUPS = {
    "zero points": (dynamic(), groupwise(mapping=MappingType.ASYMMETRIC), "zero points.*take symmetric ones"),
    "3 bits": (dynamic(), groupwise(32, -4, 3), r"groups have codes -4\.\.3.*take w4a8_symmetric_g32"),
    "8 bits": (dynamic(), groupwise(32, -128, 127), r"groups have codes -128\.\.127.*take w4a8_symmetric_g32"),
    "groups of 16": (dynamic(), groupwise(16), "groups are of 16.*multiples of 32"),
    "fixed scale": (per_tensor(), groupwise(), "fixed scale.*take w4a8_symmetric_g32"),
    "weights alone": (None, groupwise(), "weight-only.*w4a8_symmetric_g32"),
    "odd inputs": (dynamic(), per_channel(low=-8, high=7), "33 inputs are odd.*8 bits"),
}


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize("name", REFUSED_GROUPS)
def test_weights_of_few_bits_without_a_kernel_are_refused_with_what_to_take(name):
    activation, weight, words = REFUSED_GROUPS[name]
    x = torch.randn(4, 33 if name == "odd inputs" else 64)
    quantizer = SpecQuantizer({"linear"}, activation, weight)
    quantized = tq.quantize(nn.Sequential(nn.Linear(x.shape[1], 8)), x, [x], quantizer=quantizer, **QUIET)
    with pytest.raises(tq.LoweringError, match=rf"linear linear \(0\) is annotated, but .*{words}.*allow_float"):
        executorch_xnnpack.lower(quantized, x, progress=False)


def test_a_graph_for_x86_whose_inputs_have_no_zero_points_is_refused_by_name():
    x = torch.randn(4, 64)
    quantized = tq.quantize(nn.Sequential(nn.Linear(64, 8)), x, [x], quantizer=X86Quantizer(SCHEME), **QUIET)
    with pytest.raises(tq.LoweringError, match=r"linear linear \(0\).*without a zero point.*XnnpackQuantizer"):
        executorch_xnnpack.lower(quantized, x, progress=False)


@pytest.mark.parametrize("scheme", ["w4_g32", "w8", "w4a8_g32", "w3a8_symmetric_g32"])
def test_a_scheme_that_no_linear_runs_in_is_refused_when_it_is_named(scheme):
    with pytest.raises(tq.SchemeError, match="w4a8_symmetric"):
        XnnpackQuantizer(scheme)


# tables ---------------------------------------------------------------------------------------------------------------


def tied(columns=64, rows=300, tie=True):
    layers = {"table": nn.Embedding(rows, columns), "head": nn.Linear(columns, rows, bias=False)}
    if tie:
        layers["head"].weight = layers["table"].weight
    return Call(lambda m, ids: m.head(m.table(ids).relu()), **layers)


TABLES = {  # scheme of the table, its columns, whether it is the head too -> its kernel, bits a code
    "with the linears": ({}, 64, True, "embedding_4bit", 4),
    "w4": ({"op:embedding": "w4"}, 100, True, "embedding_4bit", 4),
    "w4_g32": ({"op:embedding": "w4_g32"}, 64, False, "embedding_4bit", 4),
    "w8": ({"op:embedding": "w8"}, 64, True, "embedding_byte", 8),
    "w8_symmetric_g64": ({"op:embedding": "w8_symmetric_g64"}, 128, False, "embedding_byte", 8),
    "odd columns": ({"op:embedding": "w4_symmetric"}, 33, False, "embedding_byte", 8),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_stored_in_its_bits_and_read_by_a_kernel(name):
    overrides, columns, tie, kernel, bits = TABLES[name]
    program, graph, sites = lowered(tied(columns, 3000, tie), IDS, XnnpackQuantizer(SCHEME, overrides=overrides))
    assert [s.status for s in sites] == ["quantized", "quantized"]
    assert program.proof.kernels[f"portable {kernel}"] == 1
    assert "portable embedding" not in program.proof.kernels
    head = 3000 * columns * (1 if columns % 2 else 0.5)
    scales = 3000 * 4 * 2 * (columns // 32 + 1) + 3000 * 2 * (columns // 32 + 2)
    assert program.size_bytes < 3000 * columns * bits / 8 + head + scales + 20_000
    ids = torch.randint(0, 300, (2, 7))
    assert tq.sqnr_db(graph(ids), program(ids)) > 35


def test_the_rows_of_a_table_alone_are_those_of_the_graph_to_the_last_bits():
    model = Call(lambda m, ids: m.table(ids), table=nn.Embedding(50, 64))
    quantizer = XnnpackQuantizer("dynamic_int8", overrides={"op:embedding": "w4_g32"})
    program, graph, (site,) = lowered(model, IDS % 50, quantizer)
    assert site.status == "quantized"
    torch.testing.assert_close(program(IDS % 50), graph(IDS % 50))


def test_a_saved_program_with_a_table_runs_after_it_is_loaded(tmp_path):
    program, _, _ = lowered(tied(), IDS, XnnpackQuantizer(SCHEME))
    again = executorch_xnnpack.load(program.save(tmp_path / "tied.pte"))
    assert torch.equal(again(IDS), program(IDS))


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(("low", "high", "words"), [(-4, 3, r"int8\[-4,3\].*take w8"), (-8, 7, "rows of 33.*8 bits")])
def test_a_table_without_a_kernel_is_refused_with_what_to_take(low, high, words):
    model, ids = Call(lambda m, ids: m.table(ids), table=nn.Embedding(50, 33)), IDS % 50
    quantizer = SpecQuantizer({"embedding"}, None, per_channel(low=low, high=high))
    quantized = tq.quantize(model, ids, [ids], quantizer=quantizer, **QUIET)
    with pytest.raises(tq.LoweringError, match=rf"embedding embedding \(table\).*{words}"):
        executorch_xnnpack.lower(quantized, ids, progress=False)


# graphs of torchao's own calls ----------------------------------------------------------------------------------------


def quantized_by_torchao(bits, granularity, mapping=MappingType.SYMMETRIC, *, with_table=False):
    """The float model's results and an export of the model whose weights `quantize_` has replaced."""
    torch.manual_seed(0)
    model = tied(tie=False).eval()
    wanted = model(IDS)
    options = {"weight_dtype": bits, "weight_granularity": granularity, "weight_mapping_type": mapping}
    quantize_(model, Int8DynamicActivationIntxWeightConfig(**options))
    if with_table:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    return wanted, torch.export.export(model, (IDS,)).module()


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    ("bits", "granularity", "weight"),
    [
        (torch.int4, PerGroup(32), "int8[-8,7] per group of 32"),
        (torch.int4, PerAxis(0), "int8[-8,7] per channel 0"),
        (torch.int8, PerAxis(0), "int8[-128,127] per channel 0"),
    ],
    ids=str,
)
def test_what_quantize_made_is_lowered_with_every_op_accounted_for(bits, granularity, weight):
    wanted, graph = quantized_by_torchao(bits, granularity, with_table=bits == torch.int4)
    before = str(graph.graph)
    program = executorch_xnnpack.lower(graph, IDS, progress=False)
    assert str(graph.graph) == before
    sites = {s.op: s for s in tq.report(graph, program).sites}
    assert sites["linear"].weight.describe() == weight
    assert four_bit_linears(program) == (bits == torch.int4)
    assert program.proof.kernels.get("portable embedding_4bit", 0) == (bits == torch.int4)
    assert tq.sqnr_db(graph(IDS), program(IDS)) > 35
    assert tq.sqnr_db(wanted, program(IDS)) > 12


@pytest.mark.filterwarnings("default::torchquant.errors.TorchquantWarning")
@pytest.mark.parametrize(
    ("bits", "mapping", "words"),
    [
        (torch.int8, MappingType.SYMMETRIC, r"codes -128\.\.127"),
        (torch.int3, MappingType.SYMMETRIC, r"codes -4\.\.3"),
        (torch.int4, MappingType.ASYMMETRIC, "zero points"),
    ],
    ids=str,
)
def test_what_quantize_made_and_xnnpack_has_no_kernel_for_is_refused_by_name(bits, mapping, words):
    _, graph = quantized_by_torchao(bits, PerGroup(32), mapping)
    with pytest.raises(tq.LoweringError, match=rf"linear linear \(head\) is annotated, but .*{words}"):
        executorch_xnnpack.lower(graph, IDS, progress=False)
