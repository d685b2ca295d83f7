"""ResNet-20 on CIFAR-10 in few bits: calibrated, trained, lowered for x86, beside a float network trained the same.

python examples/qat_cnn.py resnet20.safetensors cifar10_2000.zip --weights 4 --activations 4 --steps 200

The weights are those of github.com/akamaster/pytorch_resnet_cifar10; the archive holds images as CLASS/NAME.jpg, half
of which are trained on. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import torchquant as tq
from torchquant import qat
from torchquant.backends import inductor_x86
from torchquant.quantizers import X86Quantizer

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
ENDS = ["conv1", "linear"]  # the first and the last layer keep 8 bits


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut drops pixels and pads channels (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """(batch, 3, 32, 32) float -> (batch, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Data:
    """Images of the archive in two halves."""

    def __init__(self, archive: str) -> None:
        with zipfile.ZipFile(archive) as file:
            names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(file.read(n))).convert("RGB")) for n in names])
        classes = sorted({name.split("/")[0] for name in names})
        labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
        images = ((torch.from_numpy(pixels) / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split(2)
        self.train, self.test = ((images[half], labels[half]) for half in order)

    def batches(self, seed: int, steps: int, size: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops and flips."""
        draws = torch.Generator().manual_seed(seed)
        images, labels = self.train
        for _ in range(steps):
            chosen = torch.randint(0, len(images), (size,), generator=draws)
            corners = torch.randint(0, 9, (size, 2), generator=draws).tolist()
            flips = torch.rand(size, generator=draws) < 0.5
            x = torch.where(flips[:, None, None, None], images[chosen].flip(3), images[chosen])
            padded = F.pad(x, (4, 4, 4, 4))
            cropped = [image[:, i : i + 32, j : j + 32] for image, (i, j) in zip(padded, corners, strict=True)]
            yield torch.stack(cropped), labels[chosen]

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Top-1 of the other half in percent; `model` is a module, a graph or a program."""
        pairs = zip(self.test[0].split(50), self.test[1].split(50), strict=True)
        return 100 * sum(int((model(x).argmax(-1) == y).sum()) for x, y in pairs) / len(self.test[0])


def train(model: nn.Module, groups: list[dict[str, Any]], data: Data, options: Any, loss: Any, schedule: Any) -> None:
    """A plain loop: the only lines that know of quantization are those of the schedule."""
    optimizer = torch.optim.Adam(groups)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / options.steps))
    for x, y in data.batches(options.seed, options.steps):
        optimizer.zero_grad()
        value = loss(model(x), x, y)
        value.backward()
        if schedule is not None:
            schedule.step(value)  # freezes ranges and BatchNorm late, and stops at NaN
        optimizer.step()
        cosine.step()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run it; returns the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", default="qat_cnn.pt2")
    options = parser.parse_args(arguments)
    data, model = Data(options.images), ResNet20()
    model.load_state_dict(load_file(options.checkpoint))
    calibration = list(data.train[0][:200].split(50))
    exported = tq.export(model.eval(), calibration[0], dynamic_shapes=({0: torch.export.Dim("batch")},))
    accuracy = {"float": data.accuracy(exported)}

    twin = copy.deepcopy(model).train()
    groups = [{"params": list(twin.parameters()), "lr": options.lr}]
    train(twin, groups, data, options, lambda outputs, x, y: F.cross_entropy(outputs, y), None)
    accuracy["float, trained the same steps"] = data.accuracy(twin.eval())

    bits = {"weights": options.weights, "activations": options.activations, "exclude": ENDS}
    prepared = qat.prepare(exported, X86Quantizer(is_qat=True), **bits)
    tq.calibrate(prepared, calibration)
    qat.learn_steps(prepared, batches=calibration, exclude=ENDS)
    with qat.evaluate(prepared):
        accuracy["few bits, before training"] = data.accuracy(prepared)
    teacher = qat.Distillation(prepared, exported, temperature=2.0)
    schedule = qat.schedule(prepared, options.steps)
    groups = qat.parameters(prepared, options.lr, step_lr=10 * options.lr)
    train(prepared, groups, data, options, lambda o, x, y: F.cross_entropy(o, y) + teacher(o, x), schedule)
    quantized = qat.convert(prepared)
    accuracy["few bits, trained"] = data.accuracy(quantized)
    program = inductor_x86.lower(quantized, calibration[0])
    program.save(options.out)
    accuracy["the program"] = data.accuracy(program)
    print(tq.report(quantized, program))
    for name, value in accuracy.items():
        print(f"{name}: {value:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
