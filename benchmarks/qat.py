"""Quantization-aware training of ResNet-20 on CIFAR-10 images, beside PTQ and a float control trained the same steps.

python benchmarks/qat.py --bits 3,3 --bits 4,4

999 images (random crops and flips) are trained on, the other 1,000 judge. The network was trained on other images of
CIFAR-10. The first and the last layer keep 8 bits. Every training has the same batches for the same seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import networks
import records
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer

ENDS = ("conv1", "linear")
KEY = ("network", "weights", "activations", "method", "seed", "steps")
METHODS = ["float control", "fake quantization", "LSQ", "LSQ with distillation"]
LR, STEP_LR = 3e-4, 3e-3
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Images:
    """The images in two halves, drawn once."""

    def __init__(self) -> None:
        network = networks.resnet20(calibration=1)
        inputs = torch.cat([batch[0] for batch in network.held_out])
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        labels = network.metric.args[0]
        half = len(inputs) // 2
        self.model = network.model
        self.train, self.train_labels = inputs[order[:half]], labels[order[:half]]
        self.test, self.test_labels = inputs[order[half:]], labels[order[half:]]

    def calibration(self) -> list[Tensor]:
        """Four batches of the training half, as they are."""
        return list(self.train[:200].split(50))

    def batches(self, seed: int, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of random crops and flips, epoch by epoch."""
        generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(left) < size:
                left = torch.randperm(len(self.train), generator=generator)
            chosen, left = left[:size], left[size:]
            yield _augmented(self.train[chosen], generator), self.train_labels[chosen]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 in percent on the other half."""
        right = sum(
            int((model(x).argmax(-1) == y).sum())
            for x, y in zip(self.test.split(100), self.test_labels.split(100), strict=True)
        )
        return 100 * right / len(self.test)


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    padded, size = nn.functional.pad(x, (4, 4, 4, 4)), x.shape[-1]
    corners = torch.randint(0, 9, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, i : i + size, j : j + size] for image, (i, j) in zip(padded, corners, strict=True)])


def labels_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def trained(
    model: Any, groups: list[dict[str, Any]], images: Images, seed: int, steps: int, size: int, loss: Loss, watch: Any
) -> float:
    """Train in place with Adam and a cosine; returns milliseconds a step."""
    optimizer = torch.optim.Adam(groups)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps))
    start = time.perf_counter()
    for x, y in images.batches(seed, steps, size):
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        if watch is not None:
            watch.step(value)
        optimizer.step()
        cosine.step()
    return 1000 * (time.perf_counter() - start) / steps


def control(images: Images, seed: int, steps: int, size: int) -> dict[str, Any]:
    """The float network, trained as the others are."""
    model = copy.deepcopy(images.model).train()
    groups = [{"params": list(model.parameters()), "lr": LR}]
    ms = trained(model, groups, images, seed, steps, size, labels_loss, None)
    return {"before": images.accuracy(images.model), "after": images.accuracy(model.eval()), "ms_per_step": ms}


def prepared(images: Images, exported: Any, weights: int, activations: int) -> Any:
    graph = qat.prepare(exported, X86Quantizer(is_qat=True), weights=weights, activations=activations, exclude=ENDS)
    tq.calibrate(graph, images.calibration(), progress=False)
    return graph


def quantized(
    images: Images, exported: Any, bits: tuple[int, int], method: str, seed: int, steps: int, size: int
) -> dict[str, Any]:
    """One training in few bits."""
    graph = prepared(images, exported, *bits)
    if method != "fake quantization":
        chosen = qat.LSQPlus() if method == "LSQ+" else qat.LSQ()
        qat.learn_steps(graph, chosen, chosen, batches=images.calibration(), exclude=ENDS)
    with qat.evaluate(graph):
        before = images.accuracy(graph) if seed == 0 else None
    loss: Loss = labels_loss
    if "distillation" in method:
        teacher = qat.Distillation(graph, exported, temperature=2.0)

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            outputs = model(x)
            return nn.functional.cross_entropy(outputs, y) + teacher(outputs, x)

    schedule = qat.schedule(graph, steps)
    groups = qat.parameters(graph, LR, step_lr=STEP_LR)
    ms = trained(graph, groups, images, seed, steps, size, loss, schedule)
    converted = qat.convert(graph)
    with torch.no_grad(), qat.evaluate(graph):
        db = tq.sqnr_db(graph(images.test[:100]), converted(images.test[:100]))
    return {"before": before, "after": images.accuracy(converted), "ms_per_step": ms, "prepared_db": db}


def rounded_to_nearest_or_solved(images: Images, exported: Any, bits: tuple[int, int], method: str) -> dict[str, Any]:
    """PTQ at the same bits, with ranges of least squared error."""
    graph = tq.prepare(exported, X86Quantizer())
    qat.narrow(graph, weights=bits[0], activations=bits[1], exclude=ENDS)
    tq.calibrate(graph, images.calibration(), progress=False)
    algorithms: list[Any] = [tq.RangeSearch(), *([tq.AdaRound(1000)] if method == "AdaRound" else [])]
    tq.optimize(graph, images.calibration(), algorithms, progress=False)
    return {"before": images.accuracy(exported), "after": images.accuracy(tq.convert(graph))}


def overhead(images: Images, exported: Any, size: int) -> dict[str, Any]:
    """The least time of a step with learned 4-bit grids over that of a float step, interleaved."""
    graph, model = prepared(images, exported, 4, 4), copy.deepcopy(images.model).train()
    qat.learn_steps(graph, exclude=ENDS)
    schedule = qat.schedule(graph, 1000)
    runs = {
        "float": (model, [{"params": list(model.parameters()), "lr": LR}], None),
        "LSQ": (graph, qat.parameters(graph, LR), schedule),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(12):
        for name, (network, groups, watch) in runs.items():
            times[name].append(trained(network, groups, images, i, 1, size, labels_loss, watch))
    least = {name: min(values) for name, values in times.items()}
    return {"ms_per_step": least["LSQ"], "float_ms": least["float"], "ratio": least["LSQ"] / least["float"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--bits", action="append", help="of weights and activations, e.g. 3,3 (the default)")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--only", choices=["training", "ptq", "overhead"])
    options = parser.parse_args()
    widths = [tuple(map(int, pair.split(","))) for pair in options.bits or ["3,3"]]
    torch.set_num_threads(1)
    images = Images()
    exported = tq.export(images.model, images.train[:8], dynamic_shapes=({0: torch.export.Dim("batch")},))

    def keep(weights: int, activations: int, method: str, seed: int, steps: int, measured: dict[str, Any]) -> None:
        about = {"weights": weights, "activations": activations, "method": method, "seed": seed, "steps": steps}
        row = {"network": "ResNet-20", **about, "batch": options.batch, **measured}
        print(row, flush=True)
        records.write("qat", [row], KEY)

    if options.only in (None, "ptq"):
        for weights, activations in widths:
            for method in ("RangeSearch", "AdaRound"):
                measured = rounded_to_nearest_or_solved(images, exported, (weights, activations), method)
                keep(weights, activations, method, 0, 0, measured)
    if options.only in (None, "training"):
        for seed in range(options.seeds):
            for bits in widths:
                for method in options.methods:
                    if method == "float control":
                        measured = control(images, seed, options.steps, options.batch)
                    else:
                        measured = quantized(images, exported, bits, method, seed, options.steps, options.batch)
                    keep(*((32, 32) if method == "float control" else bits), method, seed, options.steps, measured)
    if options.only in (None, "overhead"):
        keep(4, 4, "step time", 0, 0, overhead(images, exported, options.batch))


if __name__ == "__main__":
    main()
