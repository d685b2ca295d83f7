"""Float, int8 and 4 bits on inputs that are worse than those of calibration: how often they agree, how sure they are.

python benchmarks/robustness.py [--network resnet20] [--samples 128]
"""

from __future__ import annotations

import argparse
import io
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import records
import torch
from candidates import LowBitQuantizer
from networks import Batch, Network, _loader, load_network
from PIL import Image, ImageFilter

import torchquant as tq
from torchquant.quantizers import WeightOnlyQuantizer, X86Quantizer

KEY = ("network", "model", "change", "strength")
NETWORKS = ("resnet20", "lite0", "minilm")
BINS = 10  # of the confidence


def main() -> None:
    """A row a network, model, change and strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--samples", type=int, default=128, help="held-out samples (pairs for MiniLM)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=tq.TorchquantWarning)
    for name in options.network or NETWORKS:
        network = load_network(name, 64, options.samples)
        models = {"float": network.model, "int8": _int8(network), "4 bits": _four_bits(network)}
        for change, strength, held_out in _changed(name, network):
            reference: torch.Tensor | None = None
            for title, model in models.items():
                with torch.no_grad():
                    outputs = torch.cat([model(*batch) for batch in held_out])
                reference = outputs if reference is None else reference
                row = {"network": network.name, "model": title, "change": change, "strength": strength}
                row |= _figures(network, outputs, reference)
                records.write("robustness", [row], KEY)
                print(row, flush=True)


def _int8(network: Network) -> Any:
    return _quantized(network, X86Quantizer("static_int8"))


def _four_bits(network: Network) -> Any:
    """Weights of 4 bits: with activations of 8 on a CNN, whose edges keep 8; by groups on a transformer."""
    quantizer = WeightOnlyQuantizer("w4_g64") if network.transformer else _EdgesIn8(4, 8)
    return _quantized(network, quantizer)


class _EdgesIn8(LowBitQuantizer):
    """Weights and activations of the first and the last layer in 8 bits."""

    def __init__(self, weight_bits: int, activation_bits: int) -> None:
        super().__init__(weight_bits, activation_bits, 8)


def _quantized(network: Network, quantizer: Any) -> Any:
    return tq.quantize(
        network.model,
        network.example,
        network.calibration,
        quantizer=quantizer,
        dynamic_shapes=network.dynamic_shapes,
        progress=False,
    )


def _figures(network: Network, outputs: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Of classifiers, how often the class is that of the float model on the same inputs, and how sure they are.

    `calibration_error`: the mean distance of confidence and accuracy over bins of the confidence (Guo et al., 2017).
    """
    figures: dict[str, Any] = {
        "metric_name": network.metric_name,
        "metric": network.metric(outputs),
        "sqnr_db": tq.sqnr_db(reference, outputs),
        "samples": len(outputs),
    }
    if network.transformer:
        cosine = torch.nn.functional.cosine_similarity(outputs, reference).mean()
        return figures | {"agreement": 100 * float(cosine)}
    figures["agreement"] = 100 * float((outputs.argmax(-1) == reference.argmax(-1)).float().mean())
    labels = network.metric.args[0][: len(outputs)]  # type: ignore[attr-defined]
    confidence, guess = outputs.softmax(-1).max(-1)
    right, error = (guess == labels).float(), 0.0
    for low in torch.linspace(0, 1, BINS + 1)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / BINS)
        if bool(inside.any()):
            error += float(inside.float().mean() * (confidence[inside].mean() - right[inside].mean()).abs())
    return figures | {"confidence": 100 * float(confidence.mean()), "calibration_error": 100 * error}


def _changed(name: str, network: Network) -> Iterator[tuple[str, float, list[Batch]]]:
    """(change, strength, held-out batches): as they are first."""
    yield "none", 0.0, list(network.held_out)
    if network.transformer:
        for rate in (0.05, 0.1, 0.2):
            yield "typing errors", rate, _mistyped(network, rate)
        return
    images = torch.cat([batch[0] for batch in network.held_out])
    mean, deviation = _scale(name)
    pixels = (images * deviation + mean).clamp(0, 255)
    for change, strengths in STRENGTHS.items():
        for strength in strengths:
            generator = torch.Generator().manual_seed(0)
            worse = CHANGES[change](pixels, strength, generator)
            yield change, strength, [(t,) for t in ((worse - mean) / deviation).split(len(network.held_out[0][0]))]


def _scale(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a channel, in pixels of 0 to 255."""
    if name == "lite0":
        return torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 128.0)
    loader = _loader("resnet_cifar")
    return tuple(255 * torch.tensor(v)[:, None, None] for v in (loader.MEAN, loader.STD))  # type: ignore[return-value]


def _noisy(pixels: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    return (pixels + strength * torch.randn(pixels.shape, generator=generator)).clamp(0, 255)


def _brighter(pixels: torch.Tensor, strength: float, _: torch.Generator) -> torch.Tensor:
    return (pixels + strength).clamp(0, 255)


def _blurred(pixels: torch.Tensor, strength: float, _: torch.Generator) -> torch.Tensor:
    return _by_pillow(pixels, lambda image: image.filter(ImageFilter.GaussianBlur(strength)))


def _jpeg(pixels: torch.Tensor, strength: float, _: torch.Generator) -> torch.Tensor:
    def again(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(strength))
        return Image.open(file).convert("RGB")

    return _by_pillow(pixels, again)


def _by_pillow(pixels: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    arrays = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = [np.asarray(change(Image.fromarray(array))) for array in arrays]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float()


# pixels of 0 to 255: deviation of the noise, radius of the blur, what is added, JPEG's quality
STRENGTHS: dict[str, Sequence[float]] = {
    "noise": (8.0, 16.0, 32.0),
    "blur": (0.5, 1.0, 2.0),
    "brightness": (-60.0, 30.0, 60.0),
    "jpeg": (50.0, 20.0, 10.0),
}
CHANGES: dict[str, Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]] = {
    "noise": _noisy,
    "blur": _blurred,
    "brightness": _brighter,
    "jpeg": _jpeg,
}


def _mistyped(network: Network, rate: float) -> list[Batch]:
    """The sentences with this share of their letters exchanged with the next one."""
    loader = _loader("minilm")
    tokenizer, draw = loader.tokenizer(), random.Random(0)
    made = []
    for ids, mask in network.held_out:
        sentences = [tokenizer.decode(row[m.bool()].tolist()) for row, m in zip(ids, mask, strict=True)]
        new_ids, new_mask = torch.zeros_like(ids), torch.zeros_like(mask)
        for i, sentence in enumerate(sentences):
            letters = list(sentence)
            for k in range(len(letters) - 1):
                if draw.random() < rate:
                    letters[k], letters[k + 1] = letters[k + 1], letters[k]
            encoded = tokenizer.encode("".join(letters)).ids[: ids.shape[1]]
            new_ids[i, : len(encoded)], new_mask[i, : len(encoded)] = torch.tensor(encoded), 1
        made.append((new_ids, new_mask))
    return made


if __name__ == "__main__":
    main()
