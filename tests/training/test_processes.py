"""Two processes under DistributedDataParallel train as one does."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

PROGRAM = """
import os, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
import torchquant as tq
from torchquant import qat
from torchquant.quantizers import X86Quantizer

torch.manual_seed(0)
x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
exported = tq.export(model, x, dynamic_shapes=({0: torch.export.Dim("batch")},))
graph = qat.prepare(exported, X86Quantizer(is_qat=True), weights=4, activations=4)
tq.calibrate(graph, [x], progress=False)
qat.learn_steps(graph)
parallel = "RANK" in os.environ
if parallel:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]
module = nn.parallel.DistributedDataParallel(graph) if parallel else graph
optimizer = torch.optim.SGD(graph.parameters(), 0.02)
schedule = qat.schedule(graph, 6)
for _ in range(6):
    optimizer.zero_grad()
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    schedule.step(loss)
    optimizer.step()
torch.save(graph.state_dict(), sys.argv[1] + (f".{rank}" if parallel else ""))
if parallel:
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_processes_train_as_one_does(tmp_path):
    program, out = tmp_path / "train.py", tmp_path / "state"
    program.write_text(textwrap.dedent(PROGRAM))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"cwd": Path(__file__).resolve().parents[2], "check": True, "timeout": 300}
    subprocess.run([sys.executable, str(program), str(out)], **here)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    subprocess.run([*torchrun, str(program), str(out)], **here)
    alone, first, second = (torch.load(f"{out}{end}", weights_only=True) for end in ("", ".0", ".1"))
    tensors = [name for name, value in alone.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 12
    for name in tensors:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(alone[name].float(), first[name].float(), rtol=1e-4, atol=1e-6), name
