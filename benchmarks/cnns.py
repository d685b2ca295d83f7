"""MobileNetV2 and ResNets of ImageNet size, with random weights but the BatchNorm statistics that these give.

Good for latency, and for how close to the float output a quantized network stays; they recognize nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["estimate_statistics", "mobilenetv2", "resnet18", "resnet50"]

CLASSES = 1000
MOBILENET_STAGES = (  # expansion, channels, blocks, stride of the first: Sandler et al. 2018, Table 2
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]


class InvertedResidual(nn.Module):
    """1x1 that expands, 3x3 depthwise, linear 1x1 (Sandler et al. 2018, Figure 3)."""

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = i * expansion
        expand = [*_conv(i, wide), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(*expand, *_conv(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv(wide, o))
        self.skip = stride == 1 and i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.skip else y


class Residual(nn.Module):
    """The block of a ResNet around `layers`, whose output has `o` channels (He et al. 2016, option B)."""

    def __init__(self, layers: list[nn.Module], i: int, o: int, stride: int) -> None:
        super().__init__()
        self.layers, self.relu = nn.Sequential(*layers), nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 and i == o else nn.Sequential(*_conv(i, o, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.relu(self.layers(x) + self.shortcut(x))
        return y


def _basic(i: int, width: int, stride: int) -> Residual:
    return Residual([*_conv(i, width, 3, stride), nn.ReLU(), *_conv(width, width, 3)], i, width, stride)


def _bottleneck(i: int, width: int, stride: int) -> Residual:
    """v1.5: the stride is in the 3x3."""
    o = 4 * width
    layers = [*_conv(i, width), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, o)]
    return Residual(layers, i, o, stride)


def mobilenetv2() -> nn.Module:
    """MobileNetV2 1.0 for images `(samples, 3, 224, 224)`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers, i = [*_conv(3, 32, 3, 2), nn.ReLU6()], 32
        for expansion, o, blocks, stride in MOBILENET_STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(i, o, stride if block == 0 else 1, expansion))
                i = o
        return _classifier([*layers, *_conv(i, 1280), nn.ReLU6()], 1280)


def resnet18() -> nn.Module:
    """ResNet-18 for images `(samples, 3, 224, 224)`, in eval mode."""
    return _resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> nn.Module:
    """ResNet-50 v1.5 for images `(samples, 3, 224, 224)`, in eval mode."""
    return _resnet((3, 4, 6, 3), bottleneck=True)


def _resnet(stages: tuple[int, ...], bottleneck: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers, i = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
        for stage, blocks in enumerate(stages):
            width = 64 << stage
            for block in range(blocks):
                stride = 2 if stage and block == 0 else 1
                layers.append((_bottleneck if bottleneck else _basic)(i, width, stride))
                i = 4 * width if bottleneck else width
        return _classifier(layers, i)


def _classifier(layers: list[nn.Module], features: int) -> nn.Module:
    """The network in eval mode, its weights drawn by He et al. 2015."""
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, CLASSES))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if isinstance(module, nn.Conv2d) else "fan_in")
    return model.eval()


def estimate_statistics(model: nn.Module, batches: Iterable[tuple[torch.Tensor, ...]]) -> None:
    """Give every BatchNorm the mean and variance of its inputs over the batches, each batch counting alike."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of the batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    model.eval()
