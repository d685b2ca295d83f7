"""Searching for cuts: what may win, what is remembered, and what compiles in processes without a GPU."""

import json

import pytest
import torch

from torchquant.ops.gpu import configs, packing, timing, tuning
from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.products import Product, relative_error

pytestmark = pytest.mark.usefixtures("cuts_by_rule")
GPU = "a-gpu"
SMALL = Product("w4a16", 48, 256, 128, dtype=torch.float32)
FORMATS = ("w4a16", "w8a16", "int8", "fp8")


class Bench:
    """Stands for a GPU: microseconds by config; some configs fail, some compute something else."""

    def __init__(self, times, failing=(), wrong=()):
        self.times, self.failing, self.wrong, self.last = times, failing, wrong, None

    def run(self, product, x, weight, config=None, **_):
        self.last = config
        if config in self.failing:
            raise RuntimeError("out of resource: shared memory")
        y = product.reference(x, weight).to(x.dtype)
        return y * 1.02 if config in self.wrong else y

    def capture(self, calls):
        calls[0]()
        config = self.last
        return lambda: self.times[config]


def searched(monkeypatch, bench, m=1, product=SMALL):
    monkeypatch.setattr(Product, "run", lambda self, *args, **kwargs: bench.run(self, *args, **kwargs))
    return tuning.search(
        product, m, device="cpu", gpu=GPU, capture=bench.capture, weights=[product.weight("cpu") for _ in range(2)]
    )


def times_of(product, m):
    return {c: 100.0 + i for i, c in enumerate(configs.candidates(product.format, m))}


def test_random_weights_to_measure_with_are_numbers():
    """A float8 beyond the largest is NaN, and one in a million draws would be."""
    for format in ("int8", "fp8", "w4a16", "w8a16"):
        product = Product(format, 2048, 1024, 128 if format == "w4a16" else 0)
        assert product.reference(product.x(2, "cpu"), product.weight("cpu")).isfinite().all(), format


def test_the_fastest_wins_and_is_remembered_for_all_sizes_of_its_bucket(monkeypatch):
    times = times_of(SMALL, 3)
    best = list(times)[2]
    times[best] = 5.0
    outcome = searched(monkeypatch, Bench(times), m=3)
    assert (outcome.config, outcome.us) == (best, 5.0)
    assert outcome.others == {c: t for c, t in times.items() if c != best}
    assert configs.table(GPU)["w4a16"]["48x256"].keys() == {"4"}
    assert Config(**configs.table(GPU)["w4a16"]["48x256"]["4"]) == best


def test_what_does_not_run_or_computes_something_else_cannot_win(monkeypatch):
    times = times_of(SMALL, 1)
    failing, wrong, right = list(times)[:3]
    times |= {failing: 1.0, wrong: 2.0, right: 3.0}
    outcome = searched(monkeypatch, Bench(times, {failing}, {wrong}))
    assert outcome.config == right
    assert outcome.skipped == {
        failing: "RuntimeError: out of resource: shared memory",
        wrong: "its relative error is 2.0e-02",
    }


def test_without_any_that_runs_the_search_says_why(monkeypatch):
    times = times_of(SMALL, 1)
    with pytest.raises(RuntimeError, match="out of resource"):
        searched(monkeypatch, Bench(times, failing=set(times)))
    assert configs.table(GPU) == {}


def test_the_last_round_decides_among_the_best(monkeypatch):
    times = times_of(SMALL, 1)
    first, second = list(times)[:2]
    calls = {first: 0, second: 0}

    class Drifting(Bench):
        def capture(self, bound):
            sample, config = super().capture(bound), self.last

            def drifting():
                calls[config] = calls.get(config, 0) + 1
                late = calls[config] > 3
                return {first: 9.0 if late else 1.0, second: 2.0}.get(config, sample())

            return drifting

    assert searched(monkeypatch, Drifting(times)).config == second


def test_what_was_measured_here_wins_over_the_package_and_over_rules(monkeypatch, tmp_path):
    class Properties:
        name, multi_processor_count, shared_memory_per_block_optin = "A GPU", 132, 232448

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    packaged, own = (Config("tiled", 16, 64, slices=s, stages=4) for s in (1, 2))
    (tmp_path / "measured").mkdir()
    monkeypatch.setattr(configs, "_PACKAGED", tmp_path / "measured")
    monkeypatch.setattr(configs, "_own_folder", lambda: tmp_path)
    device = torch.device("cuda", 0)
    configs._chosen.cache_clear()
    assert configs.choose("w4a16", 16, 64, 512, device) == Config("tiled", 16, 64, slices=4, stages=4)
    configs.remember(GPU, "w4a16", 16, 64, 512, packaged)
    tuning.write_table(tmp_path / "measured", GPU)
    (tmp_path / f"{GPU}.json").unlink()
    configs.table.cache_clear()
    configs._chosen.cache_clear()
    assert configs.choose("w4a16", 16, 64, 512, device) == packaged
    configs.remember(GPU, "w4a16", 9, 64, 512, own)
    assert [configs.choose("w4a16", m, 64, 512, device) for m in (9, 16)] == [own, own]
    assert configs.choose("w4a16", 17, 64, 512, device) not in (own, packaged)
    configs._chosen.cache_clear()


def test_sizes_between_powers_of_two_share_a_cut():
    assert [configs.bucket(m) for m in (1, 2, 3, 16, 17, 4096, 100_000)] == [1, 2, 4, 16, 32, 4096, 8192]


def test_no_split_where_tiles_fill_the_gpu():
    wide = Product("w4a16", 28672, 4096, 128)
    assert all(c.slices == 1 for c in tuning.sensible(wide, 256, 132) if c.kernel == "tiled" and c.m <= 64)
    narrow = Product("w4a16", 1024, 4096, 128)
    assert any(c.slices > 1 for c in tuning.sensible(narrow, 16, 132) if c.kernel == "tiled")


def test_kernels_that_are_the_same_are_compiled_once():
    products = [Product("int8", n, 256) for n in (4096, 1024, 100)]
    requests = tuning.requests(products, rows=(1, 4))
    assert len(requests) == 2 * len(configs.candidates("int8", 1))  # 100 is no multiple of 16


def test_copies_exceed_the_cache():
    assert timing.copies(1_000_000_000, 50_000_000) == 8
    assert timing.copies(2_000_000, 50_000_000) == 75


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_by_its_operator_is_its_reference(format):
    group_size = 128 if format == "w4a16" else 0
    product = Product(format, 24, 256, group_size, asymmetric=format[0] == "w", dtype=torch.float32)
    weight, x = product.weight("cpu"), product.x(5, "cpu")
    assert relative_error(product.run(x, weight), product.reference(x, weight)) < 1e-5
    assert sum(w.nbytes for w in weight) == product.weight_bytes


def test_no_number_is_an_infinite_error():
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")


def test_products_are_read_from_a_lowered_graph():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            codes = torch.randint(-8, 8, (32, 256), dtype=torch.int8)
            self.register_buffer("packed", packing.pack_weight(codes, 4))
            self.register_buffer("scales", packing.pack_params(torch.rand(32, 2, dtype=torch.bfloat16)))
            self.register_buffer("codes", torch.randint(-127, 128, (16, 32), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(16))

        def forward(self, x):
            linear, ops = (None, None, 4, 128, False, "relu"), torch.ops.torchquant
            y = ops.weight_only_linear(x, self.packed, self.scales, *linear)
            y = y + ops.weight_only_linear(x * 2, self.packed, self.scales, *linear)
            rest = (-127.0, 127.0, 1e-9, "none", torch.float32)
            return ops.scaled_linear(y, self.codes, self.scale, None, None, None, None, None, *rest)

    graph = torch.export.export(Net(), (torch.randn(2, 256, dtype=torch.bfloat16),)).module()
    products = tuning.products_of(graph)
    assert products == [
        Product("w4a16", 32, 256, 128),
        Product("int8", 16, 32, dtype=torch.float32),
    ]


def test_tuning_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="none here"):
        tuning.tune(torch.nn.Module())


def test_kernels_compile_in_processes_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from torchquant.ops.gpu.precompile import Precompiling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tile = Config("tiled", 64, 64, 128, warps=4, stages=3)
    impossible = Config("tiled", 64, 48, 128)
    product = Product("int8", 64, 256)
    failures = Precompiling([(product, 64, c) for c in (tile, impossible)], target=90, processes=1).wait()
    assert [json.loads(f[: f.index("}}") + 2])["config"]["n"] for f in failures] == [48]
    assert any("scaled_tiled" in f.name and f.suffix == ".cubin" for f in (tmp_path / "triton").rglob("*"))
