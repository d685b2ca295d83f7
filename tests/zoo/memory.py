"""State in buffers, caches in arguments, writes in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, images, rows, vectors


class KvCache(nn.Module):
    """A decoder step that writes keys and values at a position into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("keys", torch.zeros(1, 2, 8, 8))
        self.register_buffer("values", torch.zeros(1, 2, 8, 8))

    def forward(self, x, position):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.keys[:, :, position] = k
        self.values.index_copy_(2, position, v)
        mask = torch.arange(8)[None] <= position[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class StreamingFilter(nn.Module):
    """A causal convolution that keeps the last samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 2, 1)
        self.register_buffer("past", torch.zeros(1, 4, 2))

    def forward(self, x):
        x = torch.cat([self.past, x], -1)
        self.past.copy_(x[:, :, -2:])
        return self.head(F.relu(self.conv(x)))


class MovingMean(nn.Module):
    """An exponential mean and a counter of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = self.linear(x)
        self.count += 1
        self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.mean, self.count


def cache_argument() -> nn.Module:
    """The cache is an argument that is written."""

    def forward(m, x, cache, position):
        y = m.linear(x)
        cache[:, position] = y
        return m.out(cache.mean(1))

    return Call(forward, linear=nn.Linear(8, 8), out=nn.Linear(8, 4))


class Transducer(nn.Module):
    """An RNN-T step: joint of encoder and predictor, state in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(10, 8), nn.LSTMCell(8, 8)
        self.encoder, self.joint = nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, frame, token, state):
        h, c = self.cell(self.embedding(token), state)
        logits = self.joint(torch.tanh(self.encoder(frame) + h))
        return logits.log_softmax(-1), logits.argmax(-1), (h, c)


def transducer_batch(n: int):
    return torch.randn(n, 6), torch.randint(10, (n,)), (torch.randn(n, 8), torch.randn(n, 8))


def transducer_shapes():
    batch = torch.export.Dim("batch", min=1, max=8)
    return {0: batch}, {0: batch}, ({0: batch}, {0: batch})


def in_place_everywhere() -> nn.Module:
    def forward(m, x):
        y = m.conv(x)
        y.relu_().add_(0.5).mul_(1.5).clamp_(max=3.0)
        y[:, :4] = y[:, 4:] * 2
        y[:, 0, 1:3].sub_(1.0)
        y.masked_fill_(y > 2.5, 0.25)
        y[y < 0] = 0.125
        return m.last(y)

    return Call(forward, conv=nn.Conv2d(3, 8, 3, padding=1), last=nn.Conv2d(8, 4, 1))


def index_put() -> nn.Module:
    def forward(m, x):
        y = m.linear(x)
        y[:, torch.tensor([1, 3])] = 0.0
        y.index_put_((torch.tensor([0, 1]), torch.tensor([2, 2])), torch.tensor(1.0), accumulate=True)
        padded = x.new_zeros(x.shape[0], 12)
        padded[:, 2:10] = y
        return m.last(padded)

    return Call(forward, linear=nn.Linear(6, 8), last=nn.Linear(12, 4))


def shifted_positions() -> nn.Module:
    """Positions that are counted up in place before the table is read."""

    def forward(m, tokens):
        positions = torch.arange(6)
        positions += 2
        return m.head(m.tokens(tokens) + m.places(positions))

    return Call(forward, tokens=nn.Embedding(10, 8), places=nn.Embedding(8, 8), head=nn.Linear(8, 4))


def output_is_an_input() -> nn.Module:
    """What is returned is the argument, a view of it, and a buffer."""
    return Call(lambda m, x: (m.linear(x), x, x[:, 2:], m.table), linear=nn.Linear(8, 4), table=torch.randn(3))


def same_output_twice() -> nn.Module:
    def forward(m, x):
        y = F.relu(m.conv(x))
        return y, y, y.flatten(1), {"again": y}

    return Call(forward, conv=nn.Conv2d(3, 4, 3))


def history_of_scores() -> nn.Module:
    """A ring buffer that is rolled."""

    def forward(m, x):
        m.ring.copy_(torch.roll(m.ring, 1, 0))
        m.ring[0] = m.linear(x).mean(0)
        return m.out(m.ring.flatten()[None])

    return Call(forward, linear=nn.Linear(6, 4), out=nn.Linear(12, 2), ring=torch.zeros(3, 4))


def kv_batch(_: int):
    return torch.randn(1, 1, 16), torch.randint(8, (1,))


CASES = (
    Case("kv_cache", KvCache, kv_batch, size=1, calls=4),
    Case(
        "streaming_filter",
        StreamingFilter,
        lambda _: (torch.randn(1, 4, 5),),
        size=1,
        calls=4,
        expected={"x86/foreign": "conv1d"},
    ),
    Case("moving_mean", MovingMean, vectors(8), size=3, calls=3, dynamic_shapes=rows()),
    Case(
        "cache_argument",
        cache_argument,
        lambda n: (torch.randn(n, 1, 8), torch.randn(n, 5, 8), torch.randint(5, (1,))),
        dynamic_shapes=lambda: (*rows(2)(), None),
    ),
    Case("transducer", Transducer, transducer_batch, dynamic_shapes=transducer_shapes),
    Case("in_place_everywhere", in_place_everywhere, images(), dynamic_shapes=rows()),
    Case("index_put", index_put, vectors(6), size=3),
    Case("shifted_positions", shifted_positions, lambda n: (torch.randint(10, (n, 6)),), dynamic_shapes=rows()),
    Case("output_is_an_input", output_is_an_input, vectors(8), dynamic_shapes=rows()),
    Case("same_output_twice", same_output_twice, images(side=6), dynamic_shapes=rows()),
    Case("history_of_scores", history_of_scores, vectors(6), size=3, calls=4),
)
