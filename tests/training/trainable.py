"""Networks that are trained in few bits, Quantizers for training of four makes, and a short training."""

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer, XnnpackQuantizer

BATCH = ({0: torch.export.Dim("batch")},)


class Depthwise(nn.Module):
    """conv-BN-ReLU6 in both spellings, a depthwise convolution with a channel of one sign, dropout, a linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.wide, self.wide_norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.act, self.drop, self.head = nn.ReLU6(), nn.Dropout(0.25), nn.Linear(16, 5)
        with torch.no_grad():
            self.depth.weight[2].abs_()
            self.stem_norm.weight[1], self.stem_norm.weight[3] = -0.7, 0.0
            for norm in (self.stem_norm, self.depth_norm, self.wide_norm):
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.act(self.stem_norm(self.stem(x)))
        x = F.relu6(self.depth_norm(self.depth(x)))
        x = self.drop(F.relu(self.wide_norm(self.wide(x))))
        return self.head(x.mean((2, 3)))


def foreign_xnnpack(*, per_channel=True):
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel, is_qat=True))


QUANTIZERS = {
    "x86": lambda: X86Quantizer(is_qat=True),
    "xnnpack": lambda: XnnpackQuantizer("static_int8", is_qat=True),
    "torchao's x86": lambda: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(is_qat=True)
    ),
    "ExecuTorch's XNNPACK": foreign_xnnpack,
}


def images(count=8, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def exported(model=None, x=None):
    return tq.export(Depthwise() if model is None else model, images() if x is None else x, dynamic_shapes=BATCH)


def prepared(quantizer="x86", bits=None, *, calibrate=True, **options):
    graph = qat.prepare(exported(), QUANTIZERS[quantizer](), weights=bits, activations=bits, **options)
    if calibrate:
        tq.calibrate(graph, [images()], progress=False)
    return graph


def train(graph, x=None, *, steps=6, lr=1e-2, schedule=None, loss=None, optimizer=None):
    """Losses of a short training on one batch."""
    x = images() if x is None else x
    wanted = torch.arange(len(x)) % 5
    optimizer = optimizer or torch.optim.Adam(qat.parameters(graph, lr))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = F.cross_entropy(graph(x), wanted) if loss is None else loss(graph, x)
        value.backward()
        if schedule is not None:
            schedule.step(value)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def held_db(graph, x=None):
    """How close the converted graph is to the trained one in evaluation, which must do something at all."""
    x = images(5, seed=2) if x is None else x
    with torch.no_grad():
        with qat.evaluate(graph):
            trained = graph(x)
        converted = qat.convert(graph)(x)
    assert trained.std() > 0
    return tq.sqnr_db(trained, converted)
