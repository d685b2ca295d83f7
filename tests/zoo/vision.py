"""Image classifiers: the blocks of networks that people bring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, images, rows


def conv_norm(inputs: int, outputs: int, kernel: int = 3, activation: nn.Module | None = None, **options) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, activation=nn.ReLU(inplace=True), stride=stride)
        self.second = conv_norm(outputs, outputs)
        self.short = conv_norm(inputs, outputs, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.second(self.first(x))
        y += self.short(x)
        return F.relu(y, inplace=True)


def resnet() -> nn.Module:
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(conv_norm(3, 8, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1), *blocks)


class Inverted(nn.Module):
    """MobileNetV2's inverted residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(width, 4 * width, 1, nn.ReLU6(inplace=True)),
            conv_norm(4 * width, 4 * width, 3, nn.ReLU6(inplace=True), groups=4 * width),
            conv_norm(4 * width, width, 1),
        )

    def forward(self, x):
        return x + self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        conv_norm(3, 8, 3, nn.Hardswish(), stride=2), Inverted(8), Inverted(8), Mean(), nn.Linear(8, 10)
    )


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def efficientnet() -> nn.Module:
    body = [conv_norm(8, 32, 1, nn.SiLU()), conv_norm(32, 32, 5, nn.SiLU(), groups=32), Excite(32)]
    return nn.Sequential(conv_norm(3, 8, 3, nn.SiLU(), stride=2), *body, conv_norm(32, 8, 1), Mean(), nn.Linear(8, 10))


class Shuffle(nn.Module):
    """ShuffleNetV2's unit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(8, 8, 1, nn.ReLU()), conv_norm(8, 8, groups=8), conv_norm(8, 8, 1, nn.ReLU())
        )

    def forward(self, x):
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.body(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Ghost(nn.Module):
    """GhostNet's module: half of the channels by cheap depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = conv_norm(3, 6, 1, nn.ReLU())
        self.cheap = conv_norm(6, 6, 3, nn.ReLU(), groups=6)

    def forward(self, x):
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)[:, :11]


class C2f(nn.Module):
    """The block of recent YOLOs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_norm(3, 16, 1, nn.SiLU()), conv_norm(32, 16, 1, nn.SiLU())
        self.middle = nn.ModuleList(conv_norm(8, 8, 3, nn.SiLU()) for _ in range(2))

    def forward(self, x):
        parts = list(self.first(x).split((8, 8), 1))
        parts.extend(block(parts[-1]) for block in self.middle)
        return self.last(torch.cat(parts, 1))


class Focus(nn.Module):
    """YOLOv5's stem and pyramid pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = conv_norm(12, 8, 3, nn.SiLU()), conv_norm(32, 8, 1, nn.SiLU())

    def forward(self, x):
        x = self.conv(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))
        pooled = [x]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        return self.last(torch.cat(pooled, 1))


class Dense(nn.Module):
    """DenseNet: norms before convolutions, all features kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return F.avg_pool2d(torch.cat(features, 1), 2)


class Inception(nn.Module):
    """Branches with kernels of 1, 3 and 5, 1 x 7 and 7 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.long = nn.Sequential(nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), nn.Conv2d(4, 4, (7, 1), padding=(3, 0)))

    def forward(self, x):
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.relu(torch.cat([self.one(x), self.three(x), self.long(x), pooled], 1))


class ConvNext(nn.Module):
    """Depthwise 7 x 7, LayerNorm over channels last, GELU, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ReparameterizedVgg(nn.Module):
    """RepVGG in training form: three branches that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.three, self.one, self.norm = conv_norm(8, 8), conv_norm(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return F.relu(self.three(x) + self.one(x) + self.norm(x))


class Spatial(nn.Module):
    """CBAM: attention over channels and places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mlp = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
        self.where = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        x = self.conv(x)
        channel = torch.sigmoid(self.mlp(x.amax((2, 3))) + self.mlp(x.mean((2, 3))))
        x = x * channel[:, :, None, None]
        places = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * self.where(places).sigmoid()


def uint8_image() -> nn.Module:
    def forward(m, image):
        x = image.permute(0, 3, 1, 2).float() / 255.0
        return m.conv((x - m.mean) / m.std).flatten(2).mean(2)

    statistics = {"mean": torch.full((1, 3, 1, 1), 0.45), "std": torch.full((1, 3, 1, 1), 0.22)}
    return Call(forward, conv=nn.Conv2d(3, 8, 3), **statistics)


def dilated_and_grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, (3, 5), stride=(2, 1), padding=(1, 2), groups=4, padding_mode="reflect"),
        nn.ELU(),
        nn.Conv2d(8, 6, 3, padding="same"),
    )


def lenet() -> nn.Module:
    pools = [nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*pools, nn.Flatten(), nn.Linear(256, 32), nn.PReLU(), nn.Dropout(0.5), nn.Linear(32, 10))


CASES = (
    Case("resnet", resnet, images(), dynamic_shapes=rows()),
    Case("mobilenet", mobilenet, images(), dynamic_shapes=rows()),
    Case("efficientnet", efficientnet, images(), dynamic_shapes=rows()),
    Case("shufflenet", lambda: nn.Sequential(conv_norm(3, 16, stride=2), Shuffle()), images(), dynamic_shapes=rows()),
    Case("ghostnet", Ghost, images(), dynamic_shapes=rows()),
    Case("yolo_c2f", C2f, images(), dynamic_shapes=rows()),
    Case("yolo_focus", Focus, images(), dynamic_shapes=rows()),
    Case("densenet", Dense, images(side=15), dynamic_shapes=rows()),
    Case("inception", Inception, images(side=13), dynamic_shapes=rows()),
    Case("convnext", ConvNext, images(), dynamic_shapes=rows()),
    Case("repvgg", ReparameterizedVgg, images(side=9), dynamic_shapes=rows()),
    Case("cbam", Spatial, images(), dynamic_shapes=rows()),
    Case("uint8_image", uint8_image, lambda n: (torch.randint(256, (n, 12, 12, 3)).byte(),), dynamic_shapes=rows()),
    Case(
        "dilated_and_grouped",
        dilated_and_grouped,
        images(4, 11),
        size=1,
        expected={"x86/foreign": "X86InductorQuantizer"},
    ),
    Case("lenet", lenet, images(1, 28), dynamic_shapes=rows()),
)
