"""Magnitudes, dtypes, zeros, and values that are not finite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, images, rows, vectors


def huge_and_small() -> nn.Module:
    """Channels whose magnitudes lie eight decades apart."""

    def forward(m, x):
        return m.linear(x * 1e6) * 1e-3, m.other(x * 1e-6)

    return Call(forward, linear=nn.Linear(8, 4), other=nn.Linear(8, 4, bias=False))


def dead_relu() -> nn.Module:
    """Everything behind the first activation is zero."""

    def forward(m, x):
        return m.last(F.relu(m.conv(x) - 1e3)).mean((2, 3)) + m.other(x).mean((2, 3))

    convs = {"conv": nn.Conv2d(3, 8, 3), "last": nn.Conv2d(8, 4, 1), "other": nn.Conv2d(3, 4, 3)}
    return Call(forward, **convs)


def zero_branch() -> nn.Module:
    """A residual branch that is initialized with zeros, and a gate that is zero."""

    def forward(m, x):
        y = m.first(x)
        return m.head(y + m.zero(F.relu(y)) + m.gate * m.first(y))

    zero = nn.Linear(8, 8)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    return Call(forward, first=nn.Linear(8, 8), zero=zero, head=nn.Linear(8, 4), gate=nn.Parameter(torch.zeros(1)))


def constant_input() -> nn.Module:
    """An argument that never changes."""
    return Call(lambda m, x, c: m.linear(x) + m.other(c), linear=nn.Linear(8, 4), other=nn.Linear(3, 4))


def double() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def half() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).half()


def bfloat() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).bfloat16()


def mixed_precision() -> nn.Module:
    """A float32 head behind a bfloat16 body."""

    def forward(m, x):
        return m.head(m.body(x.bfloat16()).float()), m.head(x[:, :4])

    return Call(forward, body=nn.Linear(8, 4).bfloat16(), head=nn.Linear(4, 4))


def autocast() -> nn.Module:
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.linear(x)
        return m.head(y.float())

    return Call(forward, linear=nn.Linear(8, 8), head=nn.Linear(8, 4))


def infinite_outputs() -> nn.Module:
    """Logits masked with minus infinity."""

    def forward(m, x, allowed):
        return m.linear(x).masked_fill(~allowed, float("-inf"))

    return Call(forward, linear=nn.Linear(8, 4))


def outliers() -> nn.Module:
    """One channel of activations is fifty times larger."""

    def forward(m, x):
        return m.second(F.gelu(m.first(x) * m.scale)) / 50

    scale = torch.ones(16)
    scale[3] = 50
    return Call(forward, first=nn.Linear(8, 16), second=nn.Linear(16, 8), scale=scale)


def integer_arithmetic() -> nn.Module:
    """Integers computed beside floats: hashes, counts, casts."""

    def forward(m, tokens):
        hashed = (tokens * 31 + tokens.roll(1, 1) * 17) % 12
        y = m.head(m.table(hashed).sum(1))
        return y, hashed.to(torch.int32), (hashed > 5).any(1), hashed.bitwise_and(3), tokens.float().mean(1)

    return Call(forward, table=nn.Embedding(12, 8), head=nn.Linear(8, 4))


def normalized_twice() -> nn.Module:
    """Dice and cosine losses: divisions by sums that may be small."""

    def forward(m, x):
        share = m.conv(x).softmax(1)
        return (share * x.abs()).sum((2, 3)) / (share.sum((2, 3)) + 1e-6), torch.log(share.clamp(min=1e-7))

    return Call(forward, conv=nn.Conv2d(3, 3, 1))


def elementwise_zoo() -> nn.Module:
    """Every activation in a row of branches."""

    def forward(m, x):
        y = m.linear(x)
        functions = [F.mish, F.softsign, F.hardsigmoid, F.hardtanh, F.selu, F.celu, F.logsigmoid, torch.erf, F.relu6]
        functions += [torch.atan, lambda v: v.pow(2), lambda v: v.abs().sqrt(), lambda v: F.threshold(v, 0.1, 0.0)]
        functions += [lambda v: torch.minimum(v, v.flip(-1)), lambda v: torch.where(v > 0, v, 0.1 * v), F.tanhshrink]
        return m.last(torch.stack([f(y) for f in functions], 1)).sum(1)

    return Call(forward, linear=nn.Linear(8, 8), last=nn.Linear(8, 4))


CASES = (
    Case("huge_and_small", huge_and_small, vectors(8), dynamic_shapes=rows()),
    Case("dead_relu", dead_relu, images(side=6), dynamic_shapes=rows()),
    Case("zero_branch", zero_branch, vectors(8), dynamic_shapes=rows()),
    Case("constant_input", constant_input, lambda n: (torch.randn(n, 8), torch.full((1, 3), 0.3))),
    Case(
        "double",
        double,
        lambda n: (torch.randn(n, 8).double(),),
        dynamic_shapes=rows(),
        expected={"x86/ours": "float32", "x86/foreign": "float64", "xnnpack/ours": "float32"},
    ),
    Case(
        "half",
        half,
        lambda n: (torch.randn(n, 8).half(),),
        dynamic_shapes=rows(),
        expected={"x86": "float32", "xnnpack/ours": "float32"},
    ),
    Case(
        "bfloat",
        bfloat,
        lambda n: (torch.randn(n, 3, 6, 6).bfloat16(),),
        dynamic_shapes=rows(),
        expected={"x86": "float32", "xnnpack/ours": "float32"},
    ),
    Case(
        "mixed_precision",
        mixed_precision,
        vectors(8),
        dynamic_shapes=rows(),
        clear_db=45,
        expected={"x86/foreign": "float32"},
    ),
    Case(
        "autocast",
        autocast,
        vectors(8),
        dynamic_shapes=rows(),
        expected={
            "x86/ours": "wrap_with_autocast",
            "x86/foreign": "X86InductorQuantizer",
            "xnnpack": "wrap_with_autocast",
        },
    ),
    Case(
        "infinite_outputs",
        infinite_outputs,
        lambda n: (torch.randn(n, 8), torch.rand(n, 4) > 0.3),
        dynamic_shapes=rows(2),
    ),
    Case("outliers", outliers, vectors(8), dynamic_shapes=rows()),
    Case("integer_arithmetic", integer_arithmetic, lambda n: (torch.randint(10, (n, 5)),), dynamic_shapes=rows()),
    Case("normalized_twice", normalized_twice, images(side=6), dynamic_shapes=rows()),
    Case("elementwise_zoo", elementwise_zoo, vectors(8), dynamic_shapes=rows()),
    Case("batch_of_one", lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), vectors(7), size=1),
)
