"""A checkpoint of a language model becomes a program with weights of few bits, for x86 or for phones (XNNPACK).

python examples/llm.py MODEL.gguf --bits 4 --group 64 --text wiki.txt --out model.pt2
python examples/llm.py MODEL.gguf --target xnnpack --group 32 --out model.pte

It prints what was quantized, the perplexity of a text in float and quantized, a continuation of the prompt, and the
speed at which it came. MODEL is a GGUF file, or a folder with config.json and safetensors.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import torchquant as tq
from torchquant.artifacts.program import Program
from torchquant.backends import executorch_xnnpack, inductor_x86
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer

_TARGETS: dict[str, tuple[Any, Any]] = {
    "x86": (X86Quantizer, inductor_x86),
    "xnnpack": (XnnpackQuantizer, executorch_xnnpack),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, quantize, measure, lower, save, write."""
    options = _options(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    checkpoint = tq.load_causal_lm(options.model)
    stored = ", ".join(f"{count:,} {kind}" for kind, count in checkpoint.stored_as.items())
    print(f"{options.model.name}: weights {stored}")
    exported = tq.export_causal_lm(checkpoint.model, options.cache)
    judged, seen = _windows(checkpoint, options)
    quantized = _quantize(exported, options, seen)
    print(f"{options.target}, {_scheme(options)}, {options.method}: {tq.report(quantized).summary()}")
    if judged is not None:
        _judge(exported, quantized, judged, options.cache)
    if options.save is not None:
        _save(quantized, checkpoint, options.save)
    example = torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), torch.arange(8)
    start = time.perf_counter()
    program = _TARGETS[options.target][1].lower(quantized, example)
    print(f"lowered and proven in {time.perf_counter() - start:.0f} s, {options.out} written")
    program.save(options.out)
    tq.report(quantized, program).save(options.out.with_suffix(".txt"))
    _describe(program)
    if judged is not None:
        window = judged[: options.cache]
        graph, lowered = (tq.evaluate(m, window, window=options.cache) for m in (quantized, program))
        print(f"first window: perplexity {graph.perplexity:.3f} by the graph, {lowered.perplexity:.3f} by the program")
    _write(tq.Decoder(program), checkpoint.tokenizer, options.prompt, options.new_tokens)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", choices=_TARGETS, default="x86")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="of weights")
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale; 0: all of an output")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--a8", action="store_true", help="activations in 8 bits, with a scale for each row")
    parser.add_argument("--method", choices=("nearest", "gptq"), default="nearest")
    parser.add_argument("--text", type=Path, help="judged from its beginning; gptq sees its end")
    parser.add_argument("--windows", type=int, default=4, help="of the text that are judged")
    parser.add_argument("--calibration", type=int, default=32, help="windows of the text that gptq sees")
    parser.add_argument("--cache", type=int, default=512, help="longest sequence, and tokens in a window")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("model.pt2"))
    parser.add_argument("--save", metavar="FORMAT:PATH", help="for others: gguf, compressed-tensors, gptq or awq")
    options = parser.parse_args(arguments)
    if options.save is not None and not all(options.save.partition(":")):
        parser.error("--save takes FORMAT:PATH, for example gguf:model.gguf")
    if options.method == "gptq" and options.text is None:
        parser.error("gptq rounds by what the layers see: give it a --text")
    return options


def _scheme(options: argparse.Namespace) -> str:
    on_phones = options.target == "xnnpack"  # whose linears take 4 bits in no other form
    ending = "_symmetric" if options.symmetric or on_phones else ""
    group = f"_g{options.group}" if options.group else ""
    return f"w{options.bits}{'a8' if options.a8 or on_phones else ''}{ending}{group}"


def _windows(checkpoint: tq.Checkpoint, options: argparse.Namespace) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The tokens to be judged, and the windows that a solver sees; no token is in both."""
    if options.text is None:
        return None, ()
    text = options.text.read_text(encoding="utf-8")
    tokens = checkpoint.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    end = options.windows * options.cache
    count = options.calibration if options.method == "gptq" else 0
    if len(tokens) < end + count * options.cache:
        raise SystemExit(f"{options.text} has {len(tokens)} tokens, fewer than {end + count * options.cache}")
    return tokens[:end], tokens[len(tokens) - count * options.cache :].split(options.cache) if count else ()


def _quantize(exported: GraphModule, options: argparse.Namespace, seen: Sequence[Tensor]) -> GraphModule:
    prepared = tq.prepare(exported, _TARGETS[options.target][0](_scheme(options)))
    if options.method == "gptq":
        places = torch.arange(options.cache)
        batches = [(window.unsqueeze(0), places, places) for window in seen]
        tq.calibrate(prepared, batches)
        tq.optimize(prepared, batches, [tq.GPTQ()])
    return tq.convert(prepared)


def _judge(exported: GraphModule, quantized: GraphModule, judged: Tensor, window: int) -> None:
    plain = tq.evaluate(exported, judged, window=window)
    few = tq.evaluate(quantized, judged, window=window, reference=exported)
    assert few.kl_divergence is not None
    assert few.top1_agreement is not None
    print(
        f"{few.tokens} tokens: perplexity {plain.perplexity:.2f} in float, {few.perplexity:.2f} quantized; KL "
        f"{few.kl_divergence:.4f}, same most likely token {100 * few.top1_agreement:.1f} %"
    )


def _save(quantized: GraphModule, checkpoint: tq.Checkpoint, place: str) -> None:
    format, _, path = place.partition(":")
    saved = tq.save_causal_lm(quantized, checkpoint, path, format)  # type: ignore[arg-type]
    stored = ", ".join(f"{count:,} {kind}" for kind, count in saved.stored_as.items())
    again = f"; encoded again: {len(saved.encoded_again)}" if saved.encoded_again else ""
    print(f"{saved.path}: {saved.size_bytes:,} bytes; weights {stored}{again}")


def _describe(program: Program) -> None:
    assert program.proof is not None
    kernels = ", ".join(f"{count} {name}" for name, count in program.proof.kernels.items())
    print(f"program: {program.size_bytes:,} bytes; {kernels}; proof: {program.proof.outcome}")


def _write(decoder: tq.Decoder, tokenizer: Any, prompt: str, new_tokens: int) -> None:
    """Print the continuation, and how many tokens a second it took after the first."""
    print(f"\n{prompt}", end="", flush=True)
    times, ids = [], tokenizer(prompt, return_tensors="pt").input_ids
    for token in decoder.stream(ids, new_tokens, eos_token_id=tokenizer.eos_token_id):
        print(tokenizer.decode(token), end="", flush=True)
        times.append(time.perf_counter())
    rate = f", {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s" if len(times) > 1 else ""
    print(f"\n\n{len(times)} tokens{rate}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
