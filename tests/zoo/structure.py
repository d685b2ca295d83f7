"""How models are called, what they return, how their weights are held, and what torch.export makes of control flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from zoo.case import Call, Case, images, rows, vectors, weight


@dataclass
class Prediction:
    logits: torch.Tensor
    features: torch.Tensor
    temperature: float


torch.export.register_dataclass(Prediction, serialized_type_name="zoo.Prediction")


def dataclass_output() -> nn.Module:
    def forward(m, x):
        features = F.relu(m.first(x))
        return Prediction(m.head(features), features, 0.7)

    return Call(forward, first=nn.Linear(8, 16), head=nn.Linear(16, 4))


class Options(nn.Module):
    """Numbers, None, strings and bools among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=1.0, bias=None, mode="relu", flip: bool = False):
        y = self.linear(x) * scale
        y = y if bias is None else y + bias
        y = F.relu(y) if mode == "relu" else torch.tanh(y)
        return (y.flip(-1) if flip else y), scale, None, mode


def options_batch(n: int):
    return {"x": torch.randn(n, 8), "scale": 0.5, "bias": None, "mode": "tanh", "flip": True}


def options_shapes():
    return {"x": {0: torch.export.Dim("batch", min=1, max=8)}, "scale": None, "bias": None, "mode": None, "flip": None}


def scalar_tensor() -> nn.Module:
    """Tensors without axes as arguments and outputs."""

    def forward(m, x, temperature):
        y = m.linear(x) / temperature
        return y, y.mean(), (y > 0).sum(), y.shape[-1]

    return Call(forward, linear=nn.Linear(8, 4))


def list_arguments() -> nn.Module:
    def forward(m, levels):
        return [m.conv(level).mean((2, 3)) for level in levels]

    return Call(forward, conv=nn.Conv2d(3, 4, 3, padding=1))


def shared_weights() -> nn.Module:
    """One convolution and one linear, each called several times at other scales."""

    def forward(m, x):
        y = m.conv(F.relu(m.conv(x)) * 4)
        y = y.mean((2, 3))
        return m.linear(m.linear(y) * 10), F.linear(y, m.linear.weight)

    return Call(forward, conv=nn.Conv2d(4, 4, 3, padding=1), linear=nn.Linear(4, 4))


def siamese() -> nn.Module:
    def forward(m, a, b):
        x, y = m.net(a), m.net(b)
        return (x - y).abs().sum(-1), x

    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))
    return Call(forward, net=net)


def tied_autoencoder() -> nn.Module:
    def forward(m, x):
        return F.linear(torch.sigmoid(m.encode(x)), m.encode.weight.t(), m.bias)

    return Call(forward, encode=nn.Linear(16, 6), bias=weight(16))


def parametrized() -> nn.Module:
    layers = [parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU()]
    layers += [parametrizations.spectral_norm(nn.Linear(16, 16)), nn.ReLU()]
    return nn.Sequential(*layers, parametrizations.orthogonal(nn.Linear(16, 8)))


def low_rank() -> nn.Module:
    """LoRA: the weight is a sum that does not depend on inputs, and once a branch of its own."""

    def forward(m, x):
        merged = F.linear(x, m.weight + 0.5 * (m.b @ m.a))
        return merged + F.linear(F.linear(merged, m.a), m.b)

    return Call(forward, weight=weight(8, 8), a=weight(2, 8), b=weight(8, 2))


def standardized_convolution() -> nn.Module:
    """Weight standardization, GroupNorm: a functional convolution with a computed constant weight."""

    def forward(m, x):
        mean, std = m.weight.mean((1, 2, 3), keepdim=True), m.weight.std((1, 2, 3), keepdim=True)
        return F.group_norm(F.conv2d(x, (m.weight - mean) / (std + 1e-5) * 0.2, m.bias, padding=1), 2)

    return Call(forward, weight=weight(8, 3, 3, 3), bias=weight(8))


def norms() -> nn.Module:
    """BatchNorm without affine, without statistics, in front; GroupNorm; local response."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.GroupNorm(4, 8), nn.SiLU(), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 1))


def linear_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4), nn.BatchNorm1d(4))


def manual_norm() -> nn.Module:
    """LayerNorm and L2 norm written out."""

    def forward(m, x):
        y = m.first(x)
        y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, keepdim=True, unbiased=False) + 1e-5) * m.scale
        y = m.second(y)
        return y / y.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    return Call(forward, first=nn.Linear(8, 16), second=nn.Linear(16, 8), scale=weight(16))


def condition() -> nn.Module:
    """torch.cond on a value: both branches have weights."""

    def forward(m, x):
        y = m.first(x)
        return torch.cond(y.mean() > 0, lambda z: m.up(z), lambda z: m.down(z) - 1, (y,))

    return Call(forward, first=nn.Linear(8, 8), up=nn.Linear(8, 4), down=nn.Linear(8, 4))


def frozen_backbone() -> nn.Module:
    """A backbone under no_grad, a head with grad."""

    def forward(m, x):
        with torch.no_grad():
            features = F.relu(m.norm(m.conv(x)))
        return m.head(features.detach().mean((2, 3)))

    return Call(forward, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 4))


def deep_chain() -> nn.Module:
    """1,500 ops one after the other."""

    def forward(m, x):
        y = m.first(x)
        for i in range(500):
            y = torch.sin(y) * 0.9 + 0.01 * (i % 7)
        return m.last(y)

    return Call(forward, first=nn.Linear(8, 8), last=nn.Linear(8, 4))


def twice_the_length() -> nn.Module:
    """A size that is derived: two arguments, one twice as long."""

    def forward(m, x, y):
        return m.linear(torch.cat([x.repeat_interleave(2, 1), y], -1))

    return Call(forward, linear=nn.Linear(12, 4))


def twice_shapes():
    length = torch.export.Dim("length", min=2, max=6)
    return {1: length}, {1: 2 * length}


def any_image_size() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1))


def sides_vary():
    half = torch.export.Dim("half", min=4, max=12)
    return ({2: 2 * half, 3: 2 * half},)


def quantized_and_float_mixed() -> nn.Module:
    """A float product of two activations feeds a linear; outputs of both kinds."""

    def forward(m, x, y):
        product = x @ y.transpose(1, 2)
        return m.linear(product), product.softmax(-1), (product > 0).to(torch.uint8), product.long()

    return Call(forward, linear=nn.Linear(5, 4))


def constant_outputs() -> nn.Module:
    def forward(m, x):
        return m.linear(x), m.table @ m.table.T, torch.arange(4), 3, 0.5, True, None

    return Call(forward, linear=nn.Linear(8, 4), table=torch.randn(3, 5))


CASES = (
    Case("dataclass_output", dataclass_output, vectors(8), dynamic_shapes=rows()),
    Case("options", Options, options_batch, dynamic_shapes=options_shapes),
    Case("scalar_tensor", scalar_tensor, lambda n: (torch.randn(n, 8), torch.rand(()) + 0.5)),
    Case(
        "list_arguments",
        list_arguments,
        lambda n: ([torch.randn(n, 3, 8, 8), torch.randn(n, 3, 4, 4)],),
        dynamic_shapes=lambda: ([*rows(2)()],),
        expected={"x86/foreign": "X86InductorQuantizer"},
    ),
    Case(
        "shared_weights",
        shared_weights,
        images(4, 6),
        dynamic_shapes=rows(),
        expected={"x86/foreign": "X86InductorQuantizer"},
    ),
    Case(
        "siamese",
        siamese,
        lambda n: (torch.randn(n, 1, 6, 6), torch.randn(n, 1, 6, 6)),
        dynamic_shapes=rows(2),
        expected={"x86/foreign": "X86InductorQuantizer"},
    ),
    Case("tied_autoencoder", tied_autoencoder, vectors(16), dynamic_shapes=rows()),
    Case("parametrized", parametrized, vectors(8), dynamic_shapes=rows()),
    Case("low_rank", low_rank, vectors(8), dynamic_shapes=rows(), expected={"x86/foreign": "linear"}),
    Case(
        "standardized_convolution",
        standardized_convolution,
        images(side=8),
        dynamic_shapes=rows(),
        expected={"x86/foreign": "conv2d"},
    ),
    Case("norms", norms, images(side=10), dynamic_shapes=rows()),
    Case("linear_batch_norm", linear_batch_norm, vectors(8), dynamic_shapes=rows()),
    Case("manual_norm", manual_norm, vectors(8), dynamic_shapes=rows()),
    Case("condition", condition, vectors(8), dynamic_shapes=rows(), expected={"x86": "cond", "xnnpack": "cond"}),
    Case("frozen_backbone", frozen_backbone, images(side=8), dynamic_shapes=rows()),
    Case("deep_chain", deep_chain, vectors(8)),
    Case(
        "twice_the_length",
        twice_the_length,
        lambda n: (torch.randn(2, n, 8), torch.randn(2, 2 * n, 4)),
        size=4,
        sizes=(2, 6),
        dynamic_shapes=twice_shapes,
    ),
    Case(
        "any_image_size",
        any_image_size,
        lambda half: (torch.randn(2, 3, 2 * half, 2 * half),),
        size=8,
        sizes=(5, 11),
        dynamic_shapes=sides_vary,
    ),
    Case(
        "quantized_and_float_mixed",
        quantized_and_float_mixed,
        lambda n: (torch.randn(n, 4, 6), torch.randn(n, 5, 6)),
        dynamic_shapes=rows(2),
    ),
    Case("constant_outputs", constant_outputs, vectors(8), dynamic_shapes=rows()),
)
