"""Graphs, recommenders, experts, codebooks: indices, scatters, tables, sorting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, rows, vectors, weight


class GraphConvolution(nn.Module):
    """Messages along an edge index, summed at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(8, 16), nn.Linear(24, 8)

    def forward(self, x, edge_index):
        source, target = edge_index
        messages = F.relu(self.message(x[source]))
        total = torch.zeros(x.shape[0], 16).index_add(0, target, messages)
        degree = torch.zeros(x.shape[0]).scatter_add(0, target, torch.ones(target.shape[0])).clamp(min=1)
        return self.update(torch.cat([x, total / degree[:, None]], -1))


class GraphAttention(nn.Module):
    """GAT: a softmax over the edges of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.score = nn.Linear(8, 8), nn.Linear(16, 1)

    def forward(self, x, edge_index):
        y, (source, target) = self.linear(x), edge_index
        scores = F.leaky_relu(self.score(torch.cat([y[source], y[target]], -1)), 0.2).squeeze(-1)
        largest = torch.full((x.shape[0],), -1e9).scatter_reduce(0, target, scores, "amax")
        share = torch.exp(scores - largest[target])
        total = torch.zeros(x.shape[0]).index_add(0, target, share)
        share = share / total[target]
        return torch.zeros_like(y).index_add(0, target, share[:, None] * y[source])


def edges(nodes: int):
    around = torch.arange(nodes)
    return (torch.randn(nodes, 8), torch.stack([around, (around + torch.randint(1, nodes, (1,))) % nodes]))


def nodes_vary():
    count = torch.export.Dim("nodes", min=2, max=16)
    return ({0: count}, {1: count})


class PointNet(nn.Module):
    """Shared MLPs and a maximum over points; nearest neighbours by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(6, 16, 1), nn.Conv1d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        nearest = torch.cdist(x, x).topk(3, largest=False).indices[..., 1:].flatten(1)
        other = x.gather(1, nearest[..., None].expand(-1, -1, 3)).unflatten(1, (10, 2)).mean(2)
        y = F.relu(self.first(torch.cat([x, other - x], -1).transpose(1, 2)))
        return self.head(self.second(y).max(-1).values)


class Dlrm(nn.Module):
    """Bags of embeddings, dense features, products of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(10, 8, mode=mode) for mode in ("sum", "mean"))
        self.bottom, self.top = nn.Linear(5, 8), nn.Linear(8 + 3, 1)
        self.register_buffer("pairs", torch.triu_indices(3, 3, 1))

    def forward(self, dense, first, second):
        y = F.relu(self.bottom(dense))
        features = torch.stack([y, self.bags[0](first), self.bags[1](second)], 1)
        products = features @ features.transpose(1, 2)
        return torch.sigmoid(self.top(torch.cat([y, products[:, self.pairs[0], self.pairs[1]]], 1))).squeeze(1)


class TwoTower(nn.Module):
    """Arguments that are dicts of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(10, 8), nn.Embedding(20, 8)
        self.left, self.right = nn.Linear(11, 8), nn.Linear(8, 8)

    def forward(self, user, item):
        a = self.left(torch.cat([self.users(user["id"]), user["features"]["age"]], -1))
        b = self.right(self.items(item["id"]))
        return {"score": F.cosine_similarity(a, b), "embeddings": (F.normalize(a, dim=-1), F.normalize(b, dim=-1))}


def tower_batch(n: int):
    user = {"id": torch.randint(10, (n,)), "features": {"age": torch.randn(n, 3)}}
    return {"user": user, "item": {"id": torch.randint(20, (n,))}}


def tower_shapes():
    batch = torch.export.Dim("batch", min=1, max=8)
    return {"user": {"id": {0: batch}, "features": {"age": {0: batch}}}, "item": {"id": {0: batch}}}


class WideAndDeep(nn.Module):
    """Integer features offset into one table, factorization machine, deep part, cross layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.deep = nn.Embedding(30, 4), nn.Embedding(30, 1), nn.Linear(12, 8)
        self.head, self.cross = nn.Linear(20, 1), nn.Linear(12, 12)
        self.register_buffer("offsets", torch.tensor([0, 10, 20]))

    def forward(self, fields):
        index = fields + self.offsets
        x = self.table(index)
        pairs = 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1, keepdim=True)
        flat = x.flatten(1)
        crossed = flat * self.cross(flat) + flat
        deep = F.relu(self.deep(flat))
        return self.linear(index).sum(1) + pairs + self.head(torch.cat([deep, crossed], 1))


class Experts(nn.Module):
    """A mixture with top-k gates, all experts computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x):
        share, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weights = torch.zeros(x.shape[0], 4).scatter(1, chosen, share / share.sum(-1, keepdim=True))
        return sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)), chosen


def stacked_experts() -> nn.Module:
    """The weights of all experts in one parameter, chosen by index."""

    def forward(m, x):
        chosen = m.gate(x).argmax(-1)
        return torch.bmm(m.weights[chosen], m.first(x)[:, :, None]).squeeze(-1)

    return Call(forward, gate=nn.Linear(8, 4), first=nn.Linear(8, 8), weights=weight(4, 6, 8))


def one_hot_table() -> nn.Module:
    def forward(m, index):
        return m.head(F.one_hot(index, 12).float() @ m.table)

    return Call(forward, table=weight(12, 8), head=nn.Linear(8, 3))


def vector_quantizer() -> nn.Module:
    """Nearest code by distance; its index and straight-through value."""

    def forward(m, x):
        z = m.encode(x).flatten(2).transpose(1, 2)
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ m.codes.T + m.codes.square().sum(-1)
        index = distance.argmin(-1)
        q = F.embedding(index, m.codes)
        q = z + (q - z).detach()
        return m.decode(q.transpose(1, 2).unflatten(2, (4, 4))), index

    return Call(
        forward,
        encode=nn.Conv2d(3, 8, 2, 2),
        decode=nn.ConvTranspose2d(8, 3, 2, 2),
        codes=nn.Parameter(torch.randn(16, 8)),
    )


def argmax_only() -> nn.Module:
    return Call(lambda m, x: m.linear(x).argmax(-1), linear=nn.Linear(16, 8))


def sorted_values() -> nn.Module:
    def forward(m, x):
        y = m.linear(x)
        values, order = y.sort(-1, descending=True)
        share = values.softmax(-1)
        kept = share.cumsum(-1) - share < 0.9
        return values * kept, order, kept.sum(-1), torch.searchsorted(m.borders, y)

    return Call(forward, linear=nn.Linear(16, 8), borders=torch.linspace(-1, 1, 5))


def bilinear() -> nn.Module:
    def forward(m, a, b):
        return m.pair(F.relu(m.first(a)), b), F.pairwise_distance(a, b)

    return Call(forward, pair=nn.Bilinear(8, 6, 4), first=nn.Linear(6, 8))


def crf() -> nn.Module:
    """Viterbi scores: logsumexp and maximum over tags in a loop."""

    def forward(m, x):
        scores = m.emit(x)
        best, total = scores[:, 0], scores[:, 0]
        for t in range(1, 4):
            total = torch.logsumexp(total[:, :, None] + m.move, 1) + scores[:, t]
            best = (best[:, :, None] + m.move).max(1).values + scores[:, t]
        return total.logsumexp(-1), best.max(-1).indices

    return Call(forward, emit=nn.Linear(8, 5), move=weight(5, 5))


CASES = (
    Case("graph_convolution", GraphConvolution, edges, size=6, sizes=(3, 9), dynamic_shapes=nodes_vary),
    Case(
        "graph_attention",
        GraphAttention,
        edges,
        size=6,
        sizes=(3, 9),
        dynamic_shapes=nodes_vary,
        expected={"xnnpack": "scatter_reduce"},
    ),
    Case("pointnet", PointNet, vectors(10, 3), dynamic_shapes=rows()),
    Case(
        "dlrm",
        Dlrm,
        lambda n: (torch.randn(n, 5), torch.randint(10, (n, 3)), torch.randint(10, (n, 2))),
        dynamic_shapes=rows(3),
    ),
    Case("two_tower", TwoTower, tower_batch, dynamic_shapes=tower_shapes),
    Case("wide_and_deep", WideAndDeep, lambda n: (torch.randint(10, (n, 3)),), dynamic_shapes=rows()),
    Case("experts", Experts, vectors(8), dynamic_shapes=rows()),
    Case("stacked_experts", stacked_experts, vectors(8), dynamic_shapes=rows()),
    Case("one_hot_table", one_hot_table, lambda n: (torch.randint(12, (n, 4)),), dynamic_shapes=rows()),
    Case("vector_quantizer", vector_quantizer, vectors(3, 8, 8), dynamic_shapes=rows(), most_unequal=0.05),
    Case("argmax_only", argmax_only, vectors(16), dynamic_shapes=rows()),
    Case(
        "sorted_values",
        sorted_values,
        vectors(16),
        dynamic_shapes=rows(),
        most_unequal=0.1,
        expected={"x86/foreign": "bool"},
    ),
    Case(
        "bilinear",
        bilinear,
        lambda n: (torch.randn(n, 6), torch.randn(n, 6)),
        dynamic_shapes=rows(2),
    ),
    Case("crf", crf, vectors(4, 8), dynamic_shapes=rows()),
)
