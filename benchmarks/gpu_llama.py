"""A Llama with random weights, end to end on a GPU: tokens a second in bfloat16 and with each format.

All layers run one compiled block, each with weights of its own in memory. One block and the last linear go through
export, `prepare_pt2e`, `convert_pt2e` and `inductor_cuda.transform`; the other layers hold copies, since weights are
random anyway. Every step is one CUDA graph.
"""

from __future__ import annotations

import gc
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_setup import Row, Setup, reason, report, spread
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from torchquant.ops.gpu.products import relative_error

__all__ = ["SCHEMES", "Sizes", "end_to_end", "exported", "kernels", "quantized"]

SCHEMES = {"w4a16": "w4a16", "w8a16": "w8a16", "int8": "dynamic_int8", "fp8": "dynamic_fp8"}
_SAMPLES = 7


@dataclass(frozen=True)
class Sizes:
    """Of a Llama; those of Llama-3-8B if nothing else is said. `context`: slots of the key and value cache."""

    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocabulary: int = 128256
    context: int = 1024

    @property
    def head_width(self) -> int:
        return self.width // self.heads


TINY = Sizes(width=256, heads=4, kv_heads=2, hidden=384, vocabulary=512, context=16)


class Block(torch.nn.Module):
    """Attention over a cache of fixed size, and a gated feed-forward."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, kv = sizes, sizes.kv_heads * sizes.head_width
        self.norm1, self.norm2 = (torch.nn.Parameter(torch.ones(sizes.width)) for _ in range(2))
        self.q, self.o = (torch.nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(2))
        self.k, self.v = (torch.nn.Linear(sizes.width, kv, bias=False) for _ in range(2))
        self.gate, self.up = (torch.nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """x (B, T, width) at `position` (T,); keys and values (B, kv_heads, context, head_width) are written to."""
        s, (batch, tokens, _) = self.sizes, x.shape
        y = F.rms_norm(x, (s.width,), self.norm1)
        q, k, v = (f(y).view(batch, tokens, -1, s.head_width).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (_rotated(t, cos[position], sin[position]) for t in (q, k))
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        seen = torch.arange(s.context, device=x.device) <= position[:, None]
        a = _attention(
            q.reshape(batch, s.kv_heads, -1, s.head_width), keys, values, seen.repeat(s.heads // s.kv_heads, 1)
        )
        x = x + self.o(a.view(batch, s.heads, tokens, s.head_width).transpose(1, 2).reshape(batch, tokens, s.width))
        y = F.rms_norm(x, (s.width,), self.norm2)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotated(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = t.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The heads that share keys are rows of one product; q (B, kv_heads, rows, head_width), seen (rows, context)."""
    if q.shape[2] > 64:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    scores = (q @ keys.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype) @ values


class Head(torch.nn.Module):
    """From the last token to its successor's scores."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(sizes.width))
        self.linear = torch.nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.rms_norm(x[:, -1], self.norm.shape, self.norm))


@dataclass(frozen=True)
class Part:
    """A graph as a compiled function of its inputs and its tensors."""

    run: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]

    def copied(self) -> Part:
        """The same function on tensors elsewhere in memory."""
        return Part(self.run, tuple(t.clone() for t in self.tensors))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        y = self.run(*inputs, *self.tensors)
        return y[0] if isinstance(y, (tuple, list)) else y


def _part(graph: GraphModule, compiled: bool) -> Part:
    """The graph with its parameters and buffers as inputs, so that all layers share what was compiled."""
    lifted = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    nodes = list(graph.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            values[node] = lifted.node_copy(node)
    tensors = []
    for node in nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, torch.Tensor):
                tensors.append(value.detach())
                values[node] = lifted.placeholder(node.name)
    for node in nodes:
        if node not in values:
            values[node] = lifted.node_copy(node, values.__getitem__)
    lifted.set_codegen(CodeGen())
    module = GraphModule(graph, lifted)
    return Part(torch.compile(module, dynamic=False) if compiled else module, tuple(tensors))


def exported(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> GraphModule:
    with torch.no_grad():
        return torch.export.export(module, inputs).module(check_guards=False)


def quantized(exported: GraphModule, inputs: tuple[torch.Tensor, ...], scheme: str) -> GraphModule:
    """What `convert_pt2e` makes of it; the inputs are the calibration."""
    from torchquant.quantizers.cuda import CudaQuantizer

    prepared = prepare_pt2e(exported, CudaQuantizer(scheme))
    with torch.no_grad():
        prepared(*_own(inputs))
        return convert_pt2e(prepared)


def _own(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Caches are written to, so every run gets its own."""
    return tuple(t.clone() for t in inputs)


class Decoder:
    """One step of a Llama on fixed inputs.

    Args:
        batch, tokens: sequences, and tokens of each in a step: 1 to decode, many to prefill.
        format: of `SCHEMES`; bfloat16 without quantization if None.

    Attributes:
        error: of one block, lowered against converted.
        quantize_s: seconds from the float module to the lowered graph, of a block and the head together.
    """

    def __init__(self, setup: Setup, sizes: Sizes, batch: int, tokens: int, format: str | None) -> None:
        device, dtype = setup.device, torch.bfloat16
        shape = (batch, sizes.kv_heads, sizes.context, sizes.head_width)
        begin = 0 if tokens > 1 else sizes.context // 2
        self.position = torch.arange(begin, begin + tokens, device=device)
        angles = torch.arange(sizes.context)[:, None] * 5e5 ** -torch.linspace(0, 1, sizes.head_width // 2)
        self.tables = (angles.cos().to(device, dtype), angles.sin().to(device, dtype))
        self.embedding = torch.randn(sizes.vocabulary, sizes.width, device=device, dtype=dtype)
        self.ids = torch.randint(sizes.vocabulary, (batch, tokens), device=device)
        cache = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        x = torch.randn(batch, tokens, sizes.width, device=device, dtype=dtype)
        inputs = (x, self.position, *cache, *self.tables)
        self.error, self.quantize_s = 0.0, 0.0
        block, head = (self._lowered(setup, kind, sizes, i, format) for kind, i in ((Block, inputs), (Head, (x,))))
        self.layers = [block, *(block.copied() for _ in range(setup.layers - 1))]
        self.caches = [tuple(c.clone() for c in cache) for _ in self.layers]
        self.head = head

    def _lowered(
        self,
        setup: Setup,
        kind: Callable[[Sizes], torch.nn.Module],
        sizes: Sizes,
        inputs: tuple[torch.Tensor, ...],
        format: str | None,
    ) -> Part:
        with torch.device(setup.device):
            module = kind(sizes).to(torch.bfloat16).requires_grad_(False).eval()
        graph = exported(module, inputs)
        if format is not None:
            from torchquant.backends import inductor_cuda

            start = time.perf_counter()
            converted = quantized(graph, inputs, SCHEMES[format])
            graph = inductor_cuda.transform(converted)
            self.quantize_s += time.perf_counter() - start
            with torch.no_grad():
                error = relative_error(graph(*_own(inputs)).float(), converted(*_own(inputs)).float())
            self.error = max(self.error, error)
        return _part(graph, compiled=setup.gpu)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            x = F.embedding(self.ids, self.embedding)
            for layer, cache in zip(self.layers, self.caches, strict=True):
                x = layer(x, self.position, *cache, *self.tables)
            return self.head(x).argmax(-1)


def end_to_end(setup: Setup) -> Iterator[Row]:
    """Decoding of 1 and 16 sequences, and prefill; each format after bfloat16."""
    sizes = Sizes() if setup.gpu else TINY
    for case, batch, tokens in (("decode", 1, 1), ("prefill", 1, sizes.context), ("decode", 16, 1)):
        base: float | None = None
        for format in (None, *SCHEMES):
            row: Row = {"section": "end to end", "case": case, "format": format or "bf16", "m": batch * tokens}
            row |= {"runtime": "torchquant" if format else "torch.compile", "layers": setup.layers}
            if setup.left_s <= 0 or (format and base is None):
                row["skipped"] = "no time left" if setup.left_s <= 0 else "bfloat16 did not run"
                report(row)
                yield row
                continue
            try:
                row |= _measured(setup, sizes, batch, tokens, format, profiled=case == "decode" and batch == 1)
                base = base or row["ms"]
                row["ratio"] = base / row["ms"]
            except Exception as error:
                row["missing"] = reason(error)
            report(row)
            yield row
            if setup.gpu:
                torch._dynamo.reset()
                gc.collect()  # graphs refer to themselves
                torch.cuda.empty_cache()


def _measured(setup: Setup, sizes: Sizes, batch: int, tokens: int, format: str | None, *, profiled: bool) -> Row:
    start = time.perf_counter()
    step = Decoder(setup, sizes, batch, tokens, format)
    sample = setup.capture([step])
    built = time.perf_counter() - start
    us, iqr = spread([sample() for _ in range(_SAMPLES)])
    row: Row = {"tokens_per_s": 1e6 * batch * tokens / us, "ms": us / 1e3, "iqr_ms": iqr / 1e3}
    row |= {"built_s": built, "quantize_s": step.quantize_s, "error": step.error}
    row["weight_bytes"] = sum(t.nbytes for part in (*step.layers, step.head) for t in part.tensors)
    return {**row, "kernels": kernels(setup, step)} if profiled else row


def kernels(setup: Setup, call: Callable[[], object], most: int = 12) -> list[dict[str, Any]]:
    """The kernels that take most of the time of a call: name, how many, microseconds together."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * setup.gpu
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if setup.gpu:
            torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if not setup.gpu or str(e.device_type).endswith("CUDA")]

    def us(event: Any) -> float:
        return event.self_device_time_total if setup.gpu else event.self_cpu_time_total

    events.sort(key=us, reverse=True)
    return [{"name": e.key[:80], "count": e.count, "us": us(e)} for e in events[:most]]
