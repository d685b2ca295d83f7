"""Segmentation, detection, super-resolution: outputs as large as images, or several."""

from __future__ import annotations

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, images, rows, weight
from zoo.vision import conv_norm


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv_norm(3, 8, 3, nn.ReLU()), conv_norm(8, 16, 3, nn.ReLU())
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), conv_norm(16, 8, 3, nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        down = self.down(x)
        up = self.up(self.middle(F.max_pool2d(down, 2)))
        return self.head(self.last(torch.cat([up, down], 1)))


class Pyramid(nn.Module):
    """FPN with two heads, a dict of lists of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.side, self.top = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.scores, self.boxes = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        c1 = F.relu(self.first(x))
        p2 = self.top(F.relu(self.second(c1)))
        p1 = self.side(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return {
            "scores": [self.scores(p) for p in (p1, p2)],
            "boxes": [F.softplus(self.boxes(p)).flatten(2).transpose(1, 2) for p in (p1, p2)],
        }


class Aspp(nn.Module):
    """DeepLab's pooling pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm(3, 8, 1, nn.ReLU())])
        for rate in (2, 4):
            layers = [nn.Conv2d(3, 8, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
            self.branches.append(nn.Sequential(*layers))
        self.pooled, self.project = nn.Conv2d(3, 8, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        features = [branch(x) for branch in self.branches]
        mean = F.relu(self.pooled(F.adaptive_avg_pool2d(x, 1)))
        features.append(F.interpolate(mean, size=x.shape[-2:], mode="bilinear", align_corners=False))
        logits = F.interpolate(self.project(torch.cat(features, 1)), scale_factor=2.0, mode="bilinear")
        return logits, logits.argmax(1)


def pixel_shuffle() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


def super_resolution() -> nn.Module:
    def forward(m, x):
        base = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return (base + m.up(F.leaky_relu(m.conv(x), 0.2))).clamp(0, 1)

    return Call(forward, conv=nn.Conv2d(3, 8, 3, padding=1), up=nn.ConvTranspose2d(8, 3, 4, 2, 1))


def autoencoder() -> nn.Module:
    encoder = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU()]
    decoder = [nn.ConvTranspose2d(4, 8, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3, 2, 1, 1, groups=1)]
    return nn.Sequential(*encoder, *decoder, nn.Sigmoid())


class Vae(nn.Module):
    """Its noise is an argument; mean and log variance are returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(4, 16)

    def forward(self, x, noise):
        mean, log_variance = self.encode(x).chunk(2, -1)
        return self.decode(mean + noise * torch.exp(0.5 * log_variance)), mean, log_variance


Detections = namedtuple("Detections", ["boxes", "scores", "labels"])


class Detector(nn.Module):
    """Anchors decoded, the best chosen: floats and integers in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 9, 1)
        self.register_buffer("anchors", torch.rand(64, 4))

    def forward(self, x):
        y = self.head(F.relu(self.conv(x))).flatten(2).transpose(1, 2)
        boxes = self.anchors + 0.1 * torch.tanh(y[..., :4])
        scores, labels = y[..., 4:].softmax(-1).max(-1)
        best = scores.topk(5, 1).indices
        return Detections(
            boxes.gather(1, best[..., None].expand(-1, -1, 4)), scores.gather(1, best), labels.gather(1, best)
        )


def several_resizes() -> nn.Module:
    def forward(m, x):
        y = m.conv(x)
        half = F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=False)
        exact = F.interpolate(half, size=(13, 9), mode="nearest-exact")
        return F.interpolate(exact, size=(16, 16), mode="bilinear", align_corners=True), F.adaptive_max_pool2d(y, 3)

    return Call(forward, conv=nn.Conv2d(3, 8, 3, padding=1))


def spatial_transformer() -> nn.Module:
    def forward(m, x):
        theta = m.identity + 0.1 * torch.tanh(m.where(x.flatten(1))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return m.conv(F.grid_sample(x, grid, align_corners=False, padding_mode="border"))

    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    return Call(forward, where=nn.Linear(192, 6), conv=nn.Conv2d(3, 4, 3), identity=identity)


def keypoints() -> nn.Module:
    """Soft argmax over heat maps."""

    def forward(m, x):
        maps = m.conv(x)
        share = maps.flatten(2).softmax(-1).view(maps.shape)
        places = torch.arange(16.0)
        return torch.stack([(share.sum(2) * places).sum(-1), (share.sum(3) * places).sum(-1)], -1), maps.amax((2, 3))

    return Call(forward, conv=nn.Conv2d(3, 5, 3, padding=1))


def style_transfer() -> nn.Module:
    """Reflection pads, InstanceNorm, nearest resizing."""
    layers = [nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU()]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=2), nn.ReplicationPad2d(1), nn.Conv2d(8, 3, 3))


def modulated_convolution() -> nn.Module:
    """StyleGAN2: the weight of a functional convolution is computed from an input."""

    def forward(m, x, style):
        scale = m.affine(style)[0]
        weight_ = m.weight * scale[None, :, None, None]
        weight_ = weight_ * torch.rsqrt(weight_.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        return F.conv2d(m.first(x), weight_, padding=1)

    return Call(forward, first=nn.Conv2d(3, 6, 1), affine=nn.Linear(8, 6), weight=weight(4, 6, 3, 3))


CASES = (
    Case("unet", UNet, images(), dynamic_shapes=rows()),
    Case(
        "feature_pyramid",
        Pyramid,
        images(side=14),
        dynamic_shapes=rows(),
        expected={"x86/foreign": "X86InductorQuantizer"},
    ),
    Case("aspp", Aspp, images(side=9), dynamic_shapes=rows(), most_unequal=0.02),
    Case("pixel_shuffle", pixel_shuffle, images(side=7), dynamic_shapes=rows()),
    Case("super_resolution", super_resolution, lambda n: (torch.rand(n, 3, 8, 8),), dynamic_shapes=rows()),
    Case("autoencoder", autoencoder, images(1), dynamic_shapes=rows()),
    Case("vae", Vae, lambda n: (torch.randn(n, 16), torch.randn(n, 4)), dynamic_shapes=rows(2)),
    Case("detector", Detector, images(), dynamic_shapes=rows(), at_least_db=5, most_unequal=0.2),
    Case("several_resizes", several_resizes, images(), dynamic_shapes=rows()),
    Case("spatial_transformer", spatial_transformer, images(side=8), dynamic_shapes=rows()),
    Case("keypoints", keypoints, images(), dynamic_shapes=rows()),
    Case("style_transfer", style_transfer, images(side=8), dynamic_shapes=rows()),
    Case(
        "modulated_convolution",
        modulated_convolution,
        lambda n: (torch.randn(n, 3, 6, 6), torch.randn(1, 8)),
        expected={"xnnpack/foreign": "conv2d_1"},  # theirs annotates it, and its weight is made by the graph
    ),
)
