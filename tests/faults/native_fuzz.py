"""Damaged plans and odd arguments for the x86 kernels, in a process of its own: a crash is its end.

python tests/faults/native_fuzz.py SEED PLANS ARGUMENTS

Prints how many were refused, and how many ran, as JSON. `TORCHQUANT_FUZZ_FLAGS` adds flags for the compiler, such as
those of sanitizers.
"""

import json
import os
import random
import struct
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "ops")]
from exact import Grid, conv, depthwise, exported, linear, regions_in
from nets import Call
from test_x86_dynamic import GRIDS

from torchquant.ops.x86 import native
from torchquant.ops.x86.translation import replace_regions

FIELD = struct.Struct("<i")
VALUES = (0, -1, 1, 2, 3, 4, 15, 16, 17, 255, 256, 999, 1000, 1001, 65536, 10**6, 2**26, 2**31 - 1, -(2**31))


def image(m, x):
    x = F.relu6(m.stem(x))
    x = (x + m.narrow(F.relu6(m.deep(F.relu6(m.widen(x)))))).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    return m.head(F.adaptive_avg_pool2d(F.silu(m.last(x)), 1).flatten(1)), x


def tokens(m, x):
    return x + m.second(F.gelu(m.first(F.layer_norm(x, (40,)))))


def networks():
    """Every kind of op, with and without groups, images, floats, ranges of each call; with inputs."""
    layers = {
        "stem": conv(3, 24, 3, stride=2, padding=1),
        "widen": conv(24, 72, 1),
        "deep": depthwise(72, padding=1),
        "narrow": conv(72, 24, 1),
        "last": conv(24, 130, 3, padding=1, groups=2),
        "head": linear(130, 10),
    }
    yield Call(image, **layers), torch.randn(2, 3, 17, 15)
    yield Call(tokens, first=linear(40, 100, Grid(0.03, 128)), second=linear(100, 40)), torch.randn(3, 9, 40)
    both = Call(lambda m, x, y: m.a(x) + m.b(y), a=conv(5, 16), b=conv(3, 16))
    yield both, torch.randn(2, 5, 6, 7), torch.randn(2, 3, 6, 7)
    yield Call(lambda m, x: m.a(x), a=depthwise(33, 5, padding=2)), torch.randn(1, 33, 9, 8)
    for grid in GRIDS.values():
        yield Call(lambda m, x: m.b(F.silu(m.a(x))), a=linear(20, 33, grid), b=linear(33, 8)), torch.randn(3, 20)


def calls():
    """(plan, inputs, shapes) of each region."""
    for model, *inputs in networks():
        graph = exported(model, tuple(inputs))
        replace_regions(graph)
        seen = Regions(graph)
        seen.run(*inputs)
        assert len(seen.found) == len(regions_in(graph)) > 0
        for plan, tensors, shapes in seen.found:
            yield plan.clone(), list(tensors), list(shapes)


class Regions(torch.fx.Interpreter):
    """Runs a graph and keeps the arguments of its regions."""

    def __init__(self, graph):
        super().__init__(graph)
        self.found = []

    def call_function(self, target, args, kwargs):
        if target is native.ops().x86_region.default:
            self.found.append(args)
        return super().call_function(target, args, kwargs)


def damaged(plan, chance):
    """The plan with one to three fields of its records changed, or a byte."""
    plan = plan.clone()
    records = 64 * FIELD.unpack(bytes(plan[32:36].tolist()))[0]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if chance.random() < 0.2:
            plan[chance.randrange(records)] = chance.randrange(256)
            continue
        at = 4 * chance.randrange(2, records // 4)
        old = FIELD.unpack(bytes(plan[at : at + 4].tolist()))[0]
        new = chance.choice((*VALUES, old + 1, old - 1, 2 * old, -old, old ^ 1 << chance.randrange(32)))
        new = (new + 2**31) % 2**32 - 2**31
        plan[at : at + 4] = torch.frombuffer(bytearray(FIELD.pack(new)), dtype=torch.uint8)
    return plan


def odd(tensor, chance):
    """A tensor that is not quite what was asked for."""
    size = list(tensor.shape)
    axis = chance.randrange(len(size)) if size else 0
    variants = [
        lambda: tensor,
        lambda: tensor.to(chance.choice((torch.int32, torch.float64, torch.float16, torch.uint8, torch.bool))),
        lambda: tensor.narrow(axis, 0, chance.randrange(size[axis] + 1)),
        lambda: tensor.transpose(axis, -1),
        lambda: tensor.flatten(),
        lambda: tensor[..., :1].expand_as(tensor),
        lambda: tensor.unsqueeze(axis),
        lambda: torch.cat([tensor, tensor], axis),
        lambda: tensor.flip(axis) * float("nan"),
    ]
    return chance.choice(variants)()


def tried(call, counts):
    try:
        call()
        counts["ran"] += 1
    except (RuntimeError, IndexError, ValueError, TypeError):
        counts["refused"] += 1


def main():
    seed, plans, arguments = (int(a) for a in sys.argv[1:])
    chance = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    native._FLAGS += tuple(os.environ.get("TORCHQUANT_FUZZ_FLAGS", "").split())
    native.load()
    ops = native.ops()
    regions = list(calls())
    counts = {
        "seed": seed,
        "plans": {"ran": 0, "refused": 0},
        "arguments": {"ran": 0, "refused": 0},
        "regions": len(regions),
    }
    for plan, inputs, shapes in regions:
        ops.x86_region(plan, inputs, shapes)  # as it is
    for _ in range(plans):
        plan, inputs, shapes = chance.choice(regions)
        bad = damaged(plan, chance)
        tried(lambda b=bad, i=inputs, s=shapes: ops.x86_region(b, i, s), counts["plans"])
    for _ in range(arguments):
        if chance.random() < 0.5:
            plan, inputs, shapes = chance.choice(regions)
            inputs = [odd(t, chance) for t in inputs][: chance.choice((1, 9, 9))]
            shapes = [chance.choice((s, s, s, -s, s + 1, *VALUES[:9])) for s in shapes][
                : chance.choice((1, 2, 99, 99, 99))
            ]
            tried(lambda p=plan, i=inputs, s=shapes: ops.x86_region(p, i, s), counts["arguments"])
            continue
        q = torch.randn(2, 4, 5, 8)
        mask = chance.choice((None, torch.randn(5, 5), torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.randn(4, 1, 5)))
        parts = [odd(q, chance) for _ in range(3)]
        mask = mask if mask is None else odd(mask, chance)
        causal = chance.random() < 0.5
        tried(lambda p=parts, m=mask, c=causal: ops.x86_attention(*p, m, 0.3, c), counts["arguments"])
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
