"""Recurrent networks and transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, rows, vectors, weight


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(24, 5)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, tokens):
        y, (h, c) = self.lstm(self.embedding(tokens))
        return self.head(y), h, c


def gru() -> nn.Module:
    def forward(m, x, h):
        y, h = m.gru(x, h)
        return m.head(F.relu(y[:, -1])), h

    return Call(forward, gru=nn.GRU(6, 8, batch_first=True), head=nn.Linear(8, 3))


def unrolled_cell() -> nn.Module:
    """A GRU cell in a Python loop, as decoders have it."""

    def forward(m, x):
        h = torch.zeros(x.shape[0], 8)
        outputs = []
        for t in range(5):
            h = m.cell(x[:, t], h)
            outputs.append(m.head(h))
        return torch.stack(outputs, 1)

    return Call(forward, cell=nn.GRUCell(6, 8), head=nn.Linear(8, 3))


def encoder() -> nn.Module:
    """Padding mask of bools."""

    def forward(m, x, lengths):
        mask = torch.arange(x.shape[1])[None] >= lengths[:, None]
        y = m.layers(x, src_key_padding_mask=mask)
        return (y * (~mask)[..., None]).sum(1) / lengths[:, None]

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return Call(forward, layers=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def decoder() -> nn.Module:
    """A causal float mask and cross attention."""

    def forward(m, x, memory):
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        return m.layer(x, memory, tgt_mask=mask)

    return Call(forward, layer=nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0))


class Llama(nn.Module):
    """RMSNorm, rotary positions without autocast, grouped queries, SwiGLU, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, 16), nn.RMSNorm(16)
        self.q, self.kv, self.o = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((16, 32), (16, 32), (32, 16)))
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 4, 2).float() / 4))

    @torch.no_grad()
    def rotary(self, tokens):
        with torch.autocast(device_type="cpu", enabled=False):
            angles = torch.arange(tokens.shape[1])[:, None] * self.frequencies
            angles = torch.cat([angles, angles], -1)
            return angles.cos(), angles.sin()

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, tokens):
        x, (cos, sin) = self.embedding(tokens), self.rotary(tokens)
        y = self.norm(x)
        n, length = tokens.shape
        q = self.rotate(self.q(y).view(n, length, 4, 4).transpose(1, 2), cos, sin)
        k, v = self.kv(y).view(n, length, 2, 2, 4).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, 1) for t in (self.rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, length, 16))
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return F.linear(self.norm(x), self.embedding.weight)


class Gpt(nn.Module):
    """Learned positions, a mask in a buffer, attention by matmul and masked_fill."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, 16), nn.Embedding(16, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, tokens):
        n, length = tokens.shape
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, 2, 8).unbind(2)
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / math.sqrt(8)
        scores = scores.masked_fill(~self.mask[:length, :length], -math.inf)
        y = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(n, length, 16)
        return F.linear(x + self.out(y), self.tokens.weight)


class Bert(nn.Module):
    """Integer attention mask to a float one of large negative numbers; keyword arguments with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(32, 16), nn.Embedding(2, 16)
        self.norm, self.dense, self.pooler = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, return_dict: bool = True):
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.norm(self.words(input_ids) + self.types(types))
        bias = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x = self.norm(x + self.dense(y))
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"last_hidden_state": x, "pooler_output": pooled} if return_dict else (x, pooled)


def bert_batch(n: int):
    lengths = torch.randint(3, 8, (n,))
    mask = (torch.arange(7)[None] < lengths[:, None]).long()
    return {"input_ids": torch.randint(32, (n, 7)), "attention_mask": mask, "return_dict": True}


def bert_shapes():
    batch = torch.export.Dim("batch", min=1, max=8)
    return {"input_ids": {0: batch}, "attention_mask": {0: batch}, "return_dict": None}


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 10)
        self.cls, self.positions = weight(1, 1, 16), weight(1, 17, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.block(x)[:, 0])


class Swin(nn.Module):
    """Windows, a cyclic shift, a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = weight(9, 2)
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = (places[:, :, None] - places[:, None]) + 1
        self.register_buffer("index", relative[0] * 3 + relative[1])

    def forward(self, x):
        n, h, w, c = x.shape
        shifted = torch.roll(self.norm(x), (-1, -1), (1, 2))
        windows = shifted.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).view(-1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        y = ((q * 8**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 4, c))
        y = y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + torch.roll(y, (1, 1), (1, 2))


class Detr(nn.Module):
    """Queries against image features, fixed sine positions, classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.queries = nn.Conv2d(3, 16, 4, 4), nn.Embedding(5, 16)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.classes, self.boxes = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        features = self.backbone(x).flatten(2).transpose(1, 2)
        angles = torch.arange(features.shape[1])[:, None] / 10 ** (torch.arange(8) / 8)
        memory = features + torch.cat([angles.sin(), angles.cos()], -1)
        y = self.decoder(self.queries.weight[None].repeat(x.shape[0], 1, 1), memory)
        return {"pred_logits": self.classes(y), "pred_boxes": self.boxes(y).sigmoid()}


def einsum_attention() -> nn.Module:
    def forward(m, x):
        q, k, v = torch.einsum("nld,tdhe->tnhle", x, m.weight)
        attention = torch.einsum("nhqe,nhke->nhqk", q, k).softmax(-1)
        return m.out(torch.einsum("nhqk,nhke->nqhe", attention, v).flatten(2))

    return Call(forward, weight=weight(3, 16, 2, 8), out=nn.Linear(16, 16))


def linear_attention() -> nn.Module:
    def forward(m, x):
        q, k, v = m.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1)[:, :, None] + 1e-6)
        return m.out(y)

    return Call(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 9))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class Mamba(nn.Module):
    """A selective scan in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.conv, self.out = nn.Linear(8, 32), nn.Conv1d(16, 16, 3, padding=2, groups=16), nn.Linear(16, 8)
        self.parameters_ = nn.Linear(16, 24)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, 5).float()).repeat(16, 1))

    def forward(self, x):
        x, gate = self.into(x).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        delta, b, c = self.parameters_(x).split([16, 4, 4], -1)
        delta, a = F.softplus(delta), -torch.exp(self.log_a)
        state, outputs = torch.zeros(x.shape[0], 16, 4), []
        for t in range(x.shape[1]):
            decay = torch.exp(delta[:, t, :, None] * a)
            state = decay * state + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return self.out(torch.stack(outputs, 1) * F.silu(gate))


class Seq2Seq(nn.Module):
    """nn.Transformer with everything it has."""

    def __init__(self) -> None:
        super().__init__()
        options = {"nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
        self.net = nn.Transformer(16, batch_first=True, dropout=0.0, **options)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.net(source, target, tgt_mask=mask, tgt_is_causal=True)


def t5_bias() -> nn.Module:
    """Relative positions in logarithmic buckets."""

    def forward(m, x):
        places = torch.arange(x.shape[1])
        distance = (places[None] - places[:, None]).abs()
        large = 2 + (torch.log(distance.float() / 2 + 1e-6) * 1.5).long()
        bucket = torch.where(distance < 2, distance, large.clamp(max=5))
        bias = m.table(bucket).permute(2, 0, 1)[None]
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        return m.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2))

    return Call(forward, table=nn.Embedding(6, 2), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))


def tokens(high: int, length: int):
    return lambda n: (torch.randint(high, (n, length)),)


def length_and_batch():
    length = torch.export.Dim("length", min=2, max=12)
    return ({1: length},)


CASES = (
    Case("lstm", Lstm, tokens(20, 6), dynamic_shapes=rows()),
    Case("gru", gru, lambda n: (torch.randn(n, 5, 6), torch.randn(1, n, 8))),
    Case("unrolled_cell", unrolled_cell, vectors(5, 6), dynamic_shapes=rows()),
    Case("encoder", encoder, lambda n: (torch.randn(n, 6, 16), torch.randint(1, 7, (n,))), dynamic_shapes=rows(2)),
    Case(
        "decoder",
        decoder,
        lambda n: (torch.randn(n, 5, 16), torch.randn(n, 7, 16)),
        dynamic_shapes=rows(2),
        expected={"xnnpack/foreign": "multihead_attn"},  # theirs annotates a product that the delegate leaves
    ),
    Case("llama", Llama, tokens(32, 7), dynamic_shapes=rows()),
    Case(
        "llama_of_any_length",
        Llama,
        lambda length: (torch.randint(32, (2, length)),),
        size=7,
        sizes=(2, 11),
        dynamic_shapes=length_and_batch,
    ),
    Case(
        "gpt",
        Gpt,
        lambda length: (torch.randint(32, (2, length)),),
        size=8,
        sizes=(3, 12),
        dynamic_shapes=length_and_batch,
    ),
    Case("bert", Bert, bert_batch, dynamic_shapes=bert_shapes),
    Case("vit", Vit, lambda n: (torch.randn(n, 3, 16, 16),), dynamic_shapes=rows()),
    Case("swin", Swin, vectors(4, 6, 16), dynamic_shapes=rows()),
    Case(
        "detr",
        Detr,
        lambda n: (torch.randn(n, 3, 16, 16),),
        dynamic_shapes=rows(),
        expected={"xnnpack/foreign/static": "multihead_attn"},  # as in the decoder
    ),
    Case("einsum_attention", einsum_attention, vectors(6, 16), dynamic_shapes=rows()),
    Case("linear_attention", linear_attention, vectors(6, 16), dynamic_shapes=rows()),
    Case("mixer", Mixer, vectors(9, 16), dynamic_shapes=rows()),
    Case("mamba", Mamba, vectors(5, 8), dynamic_shapes=rows()),
    Case("seq2seq", Seq2Seq, lambda n: (torch.randn(n, 6, 16), torch.randn(n, 5, 16)), dynamic_shapes=rows(2)),
    Case("t5_bias", t5_bias, vectors(6, 16), dynamic_shapes=rows()),
)
