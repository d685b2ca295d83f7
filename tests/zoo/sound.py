"""Speech, video, spectra: conv1d, conv3d, transforms, streams of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Call, Case, rows, vectors, weight


class Spectrogram(nn.Module):
    """STFT, mel filters, a conv1d stack."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.register_buffer("filters", torch.rand(17, 12))
        self.conv, self.head = nn.Conv1d(12, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, wave):
        spectrum = torch.stft(wave, 32, 16, window=self.window, return_complex=True)
        mel = torch.log1p(spectrum.abs().square().transpose(1, 2) @ self.filters)
        return self.head(F.relu(self.conv(mel.transpose(1, 2))).mean(-1)).log_softmax(-1)


class Wav2Vec(nn.Module):
    """A conv1d feature extractor with GroupNorm, positional convolution, an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(1, 16, 10, 5), nn.GroupNorm(16, 16), nn.Conv1d(16, 16, 3, 2)
        self.positions = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 4, padding=2, groups=4), dim=2)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, wave):
        x = F.gelu(self.second(F.gelu(self.norm(self.first(wave[:, None])))))
        x = x + F.gelu(self.positions(x)[:, :, :-1])
        return self.encoder(x.transpose(1, 2))


class TemporalConvolutions(nn.Module):
    """TCN and WaveNet: causal padding, dilation, gates, skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))

    def forward(self, x):
        x, total = self.start(x), 0
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(y)
            x = x + y
        return total


class Conformer(nn.Module):
    """GLU, depthwise conv1d and BatchNorm1d between transposes; half-step feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.one, self.two = nn.Conv1d(16, 32, 1), nn.Conv1d(16, 16, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(16, 16, 5, padding=2, groups=16), nn.BatchNorm1d(16)

    def forward(self, x):
        x = x + 0.5 * self.down(F.silu(self.up(self.norm(x))))
        y = F.glu(self.one(self.norm(x).transpose(1, 2)), 1)
        return x + self.two(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)


def vocoder() -> nn.Module:
    """Transposed conv1d and weight_norm."""
    up = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 4, 2, 1))
    return nn.Sequential(nn.Conv1d(6, 8, 7, padding=3), nn.LeakyReLU(0.1), up, nn.Conv1d(4, 1, 3, padding=1), nn.Tanh())


def video() -> nn.Module:
    layers = [nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.MaxPool3d((1, 2, 2))]
    separated = [nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))]
    return nn.Sequential(*layers, *separated, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4))


class TemporalShift(nn.Module):
    """TSM: channels moved between frames by writes into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        n, t = x.shape[:2]
        x = self.first(x.flatten(0, 1)).view(n, t, 8, 6, 6)
        out = torch.zeros_like(x)
        out[:, :-1, :2] = x[:, 1:, :2]
        out[:, 1:, 2:4] = x[:, :-1, 2:4]
        out[:, :, 4:] = x[:, :, 4:]
        return self.second(out.flatten(0, 1)).view(n, t, 8, 6, 6).mean(1)


def fourier_mixing() -> nn.Module:
    """FNet."""

    def forward(m, x):
        mixed = torch.fft.fft2(x, dim=(-2, -1)).real
        return m.down(F.gelu(m.up(m.norm(x + mixed))))

    return Call(forward, norm=nn.LayerNorm(16), up=nn.Linear(16, 32), down=nn.Linear(32, 16))


def global_filter() -> nn.Module:
    """GFNet: a product with complex weights between rfft2 and irfft2."""

    def forward(m, x):
        spectrum = torch.fft.rfft2(m.conv(x), norm="ortho") * torch.view_as_complex(m.filter)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")

    return Call(forward, conv=nn.Conv2d(3, 4, 1), filter=weight(4, 8, 5, 2))


def complex_parts() -> nn.Module:
    """Magnitude and angle returned beside a complex output."""

    def forward(m, x):
        z = torch.view_as_complex(m.linear(x).view(-1, 8, 2))
        return z * torch.polar(torch.ones(8), torch.arange(8.0)), z.abs(), z.real + z.imag

    return Call(forward, linear=nn.Linear(8, 16))


def mfcc() -> nn.Module:
    """A filter bank of fixed matrices, cumulative normalization, deltas by unfold."""

    def forward(m, x):
        y = torch.log(x.square() @ m.bank + 1e-3) @ m.dct
        count = torch.arange(1, y.shape[1] + 1)[None, :, None]
        y = y - y.cumsum(1) / count
        return m.conv(y.transpose(1, 2)).transpose(1, 2), y.unfold(1, 3, 1).std(-1)

    return Call(forward, bank=torch.rand(16, 10), dct=torch.randn(10, 6) / 3, conv=nn.Conv1d(6, 8, 3))


CASES = (
    Case("spectrogram", Spectrogram, vectors(160), dynamic_shapes=rows(), expected={"xnnpack": "complex"}),
    Case("wav2vec", Wav2Vec, vectors(120), dynamic_shapes=rows()),
    Case("temporal_convolutions", TemporalConvolutions, vectors(4, 21), dynamic_shapes=rows()),
    Case("conformer", Conformer, vectors(11, 16), dynamic_shapes=rows()),
    Case("vocoder", vocoder, vectors(6, 9), dynamic_shapes=rows(), expected={"x86/foreign": "conv1d"}),
    Case("video", video, vectors(3, 4, 8, 8), dynamic_shapes=rows(), expected={"xnnpack": "conv3d"}),
    Case("temporal_shift", TemporalShift, vectors(4, 3, 6, 6), dynamic_shapes=rows()),
    Case("fourier_mixing", fourier_mixing, vectors(8, 16), dynamic_shapes=rows(), expected={"xnnpack": "fft"}),
    Case("global_filter", global_filter, vectors(3, 8, 8), dynamic_shapes=rows(), expected={"xnnpack": "complex"}),
    Case("complex_parts", complex_parts, vectors(8), dynamic_shapes=rows(), expected={"xnnpack": "complex"}),
    Case("mfcc", mfcc, vectors(9, 16), dynamic_shapes=rows(), expected={"x86/foreign": "conv1d"}),
)
