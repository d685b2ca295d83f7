"""Native code behind damaged plans and odd arguments: it refuses or runs, and the process lives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact import REGION, conv, exported, regions_in
from nets import Call

from torchquant.ops.x86 import native
from torchquant.ops.x86 import plan as plans
from torchquant.ops.x86.plan import KINDS
from torchquant.ops.x86.translation import replace_regions

FUZZ = Path(__file__).with_name("native_fuzz.py")

SIZES = {"header": 64, "values": 64, "ops": 192}
FIELDS = {
    "header": ["magic", "version", "values", "ops", "inputs", "outputs", "arena", "chunk", "blob", "size", "split"],
    "values": ["is_float", "h", "w", "c", "stride", "top", "left", "bottom", "right", "offset", "external"],
    "ops": [name.removeprefix("f:") for name in plans._FIELDS],
}


def test_no_damaged_plan_and_no_odd_argument_ends_the_process():
    command = [sys.executable, "-W", "ignore", str(FUZZ), "0", "6000", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    for kind, count in (("plans", 6000), ("arguments", 1500)):
        assert sum(counts[kind].values()) == count
    assert counts["plans"]["refused"] > 2000  # and what runs has other numbers in it, or changed nothing that matters
    assert counts["plans"]["ran"] > 1000
    assert counts["arguments"]["refused"] > 500


@pytest.fixture
def region():
    """The records of the plan of a convolution, as int32 that may be changed, and a function that runs it."""
    graph = exported(Call(lambda m, x: m.a(x).relu(), a=conv(5, 16, 3, padding=1)), (torch.randn(2, 5, 6, 7),))
    replace_regions(graph)
    [node] = regions_in(graph)
    plan = getattr(graph, node.args[0].target).clone()
    counts = dict(zip(("values", "ops"), plan[8:16].view(torch.int32).tolist(), strict=True))
    records, at = {"header": plan[:64].view(torch.int32)[None]}, 64
    for name, count in counts.items():
        end = at + count * SIZES[name]
        records[name], at = plan[at:end].view(torch.int32).view(count, -1), end

    def run():
        return REGION.x86_region(plan, [torch.randn(2, 5, 6, 7)], list(node.args[2]))

    run()
    return records, run


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        ("header", "size", 64),  # not the plan's
        ("header", "blob", 10**6),  # constants beyond the end
        ("header", "arena", 2**30),  # 64 GiB
        ("values", "h", 0),  # samples are counted by dividing by it
        ("values", "c", 2**30),
        ("values", "external", 7),  # an input that is none
        ("ops", "kind", 77),
        ("ops", "input", 10**6),  # a value that is none
        ("ops", "kh", 1000),  # a window that leaves the image
        ("ops", "depth", 2**20),  # more than the input has
        ("ops", "weights", 10**6),  # beyond the end
        ("ops", "panel", -1),
        ("ops", "dynamic", 5),  # a range that is none
    ],
)
def test_a_plan_with_a_field_out_of_range_is_refused(region, record, field, value):
    records, run = region
    column = FIELDS[record].index(field)
    of_products = field in ("kh", "depth", "weights")
    for row in range(len(records[record])):
        if of_products and int(records["ops"][row, 0]) != KINDS.index("conv"):
            continue
        before = int(records[record][row, column])
        records[record][row, column] = value
        with pytest.raises(RuntimeError, match="the plan is damaged"):
            run()
        records[record][row, column] = before
    run()


def test_attention_refuses_masks_and_dtypes_that_do_not_fit():
    native.load()
    q = torch.randn(2, 4, 5, 8)
    attention = REGION.x86_attention
    for mask in (torch.zeros(5, 3), torch.zeros(2, 4, 1, 5, 5), torch.zeros(3, 1, 5, 5), torch.zeros(5, 5).int()):
        with pytest.raises(RuntimeError, match="torchquant: attention"):
            attention(q, q, q, mask, 1.0, False)
    for bad in ((q.int(), q, q), (q, q, q.int()), (q, q, q[:, :, :3]), (q, q[:1], q[:1]), (q, q, q[:, :2])):
        with pytest.raises(RuntimeError, match="torchquant: attention"):
            attention(*bad, None, 1.0, False)


def test_what_a_kernel_does_not_write_is_nan_where_memory_is_poisoned():
    """A value that no op writes: its memory is what is left of earlier calls, or NaN."""
    graph = exported(Call(lambda m, x: m.a(x) + 1.0, a=conv(5, 16, 3, padding=1)), (torch.randn(2, 5, 6, 7),))
    replace_regions(graph)
    [node] = regions_in(graph)
    plan, x = getattr(graph, node.args[0].target).clone(), torch.randn(2, 5, 6, 7)

    def run(bytes_):
        return REGION.x86_region(bytes_, [x], list(node.args[2]))[0]

    before = native.load().torchquant_x86_poison(0)
    try:
        right = run(plan)
        header = plan[:64].view(torch.int32)
        shorter = plan.clone()
        shorter[:64].view(torch.int32)[3] = int(header[3]) - 1  # the last op, which writes the output, is left out
        with native.poisoned():
            assert torch.equal(run(plan), right)
            assert run(shorter).isnan().all()
    finally:
        native.load().torchquant_x86_poison(before)
