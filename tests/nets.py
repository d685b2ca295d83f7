"""Small networks, each with ops that one trap or promise is about."""

import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree


class Call(nn.Module):
    """A function with parameters: `Call(lambda m, x: F.linear(x, m.w), w=...)`."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, nn.Parameter) or not isinstance(value, torch.Tensor):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class OwnConv(nn.Conv2d):
    """A subclass, as timm's Conv2dSame."""


class OwnLinear(nn.Linear):
    """A subclass, as LoRA's and most frameworks' own."""


class ManyWays(nn.Module):
    """The same two ops, written as classes, subclasses, functions and matrix products."""

    def __init__(self):
        super().__init__()
        self.module, self.subclass = nn.Conv2d(3, 4, 3), OwnConv(4, 4, 3)
        self.kernel, self.matrix, self.other, self.bias = (
            parameter(4, 4, 1, 1),
            parameter(4, 4),
            parameter(4, 4),
            parameter(4),
        )
        self.weight, self.linear, self.own = parameter(4, 4), nn.Linear(4, 4), OwnLinear(4, 4)

    def forward(self, x):
        x = F.conv2d(self.subclass(self.module(x)), self.kernel).mean((2, 3))
        x = F.linear(self.own(self.linear(x)), self.weight)
        return torch.addmm(self.bias, torch.mm(x, self.matrix), self.other)


class NoGrad(nn.Module):
    """Its ops lie in nested no_grad regions, as in a forward decorated with @torch.no_grad()."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 5),
            nn.Linear(5, 5),
        )
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    @torch.no_grad()
    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        with torch.enable_grad():
            x = self.head(x.mean((2, 3)))
            with torch.no_grad():
                return self.last(x)


class MaskedTokens(nn.Module):
    """Embeddings, positions from arange and cumsum, an integer attention mask, attention, linears."""

    def __init__(self, features=16, heads=2):
        super().__init__()
        self.words, self.places = nn.Embedding(20, features), nn.Embedding(12, features)
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.heads = heads

    def forward(self, ids, mask):
        places = (mask.cumsum(1) - 1).clamp(min=0) + torch.arange(ids.shape[1]) * 0
        x = self.words(ids) + self.places(places)
        additive = (1.0 - mask[:, None, None, :].float()) * -1e4
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + additive
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)) * torch.ones(1)

    def _split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def token_batch():
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return torch.randint(0, 20, (2, 6)), mask


class Pixels(nn.Module):
    """conv2d, a residual add behind a conv, linears on permuted 4-D, 3-D and 2-D inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pixels, self.tokens, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.body(x) + x).relu()
        x = x + self.pixels(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).mean(1))


class Residual(nn.Module):
    """`linear(x) + x` with a float result, which Inductor accumulates into x."""

    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Linear(16, 16), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, y):
        return self.inner(x) + x, self.conv(y) + y * 2


class Mobile(nn.Module):
    """A MobileNet block: strided conv, expansion, depthwise, projection, residual add, pads, pool, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = self._conv(3, 8, 3, stride=2)
        self.expand, self.depth = self._conv(8, 16, 1), self._conv(16, 16, 3, groups=16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def _conv(self, inside, outside, size, **options):
        return nn.Sequential(
            nn.Conv2d(inside, outside, size, bias=False, **options), nn.BatchNorm2d(outside), nn.ReLU6()
        )

    def forward(self, x):
        x = self.stem(F.pad(x, (0, 1, 0, 1)))
        x = x + self.project(self.depth(F.pad(self.expand(x), (1, 1, 1, 1))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shared(nn.Module):
    """cat and max_pool2d (they keep qparams), padding='same', transposed and 1-D convs, dead channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 1)
        self.up, self.line = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv1d(4, 4, 3, padding=1)
        with torch.no_grad():
            self.left.weight[1], self.left.bias[1] = 1e-12, 0.7  # what BatchNorm folding leaves of a dead channel
            self.right.weight[0] = 0

    def forward(self, x):
        x = F.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2)
        return self.line(self.up(x).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, features=32, heads=4):
        super().__init__()
        self.before, self.after = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 2 * features), nn.Linear(2 * features, features)
        self.heads = heads

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Difference(nn.Module):
    """Two inputs that cannot be swapped."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a, b):
        return self.linear(a) - b


def cnn():
    """conv, BatchNorm, relu, linear."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def callers_agree(run, inputs, rounds=20):
    """Whether a thread for each input, all at once, gets bit for bit what one alone got."""
    expected = [run(x) for x in inputs]
    wrong = []

    def call(x, wanted):
        for _ in range(rounds):
            actual = pytree.tree_leaves(run(x))
            if not all(torch.equal(a, b) for a, b in zip(actual, pytree.tree_leaves(wanted), strict=True)):
                wrong.append(x)

    callers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return not wrong


class Decoder(nn.Module):
    """A Llama block: RMSNorm, grouped-query attention with rotary positions, SwiGLU, residuals; no biases."""

    def __init__(self, features=64, heads=4, groups=2, hidden=96):
        super().__init__()
        self.before, self.after = nn.RMSNorm(features), nn.RMSNorm(features)
        size = features // heads
        self.q, self.o = (nn.Linear(features, features, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(features, groups * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(features, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, features, bias=False)
        self.size, self.repeats = size, heads // groups
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, size, 2) / size))

    def forward(self, x):
        y = self.before(x)
        q, k, v = (p(y).unflatten(2, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        q, k = self._turned(q, angles), self._turned(k, angles)
        k, v = (t.repeat_interleave(self.repeats, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _turned(self, x, angles):
        even, odd = x[..., 0::2], x[..., 1::2]
        sin, cos = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def pairs(first: Iterable[Any], second: Iterable[Any], of_each: int = 1) -> list[Any]:
    """All pairs as parameters of a test: each of the longer list has `of_each` of the shorter, the others are slow."""
    first, second = list(first), list(second)
    shorter = min(len(first), len(second))
    fast = {(i, j) for i in range(len(first)) for j in range(len(second)) if (i - j) % shorter < of_each}
    return [
        pytest.param(a, b, marks=() if (i, j) in fast else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


class Counting(nn.Module):
    """State that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        return self.linear(x) + self.calls
