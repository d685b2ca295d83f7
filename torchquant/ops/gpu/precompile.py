"""Compile kernels ahead of their use, in processes of their own: Triton keeps what they built on disk.

A process needs no GPU for it: it goes through the launchers with tensors that have no storage, and stops in front of
each launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from torchquant.ops.gpu.configs import Config
from torchquant.ops.gpu.machine_code import Target
from torchquant.ops.gpu.products import Product

__all__ = ["Precompiling"]

Request = tuple[Product, int, Config]  # a product, its number of rows, the kernel to compile


class Precompiling:
    """Processes that compile; `wait` for them, or go on meanwhile.

    Args:
        requests: products with their rows and kernels.
        target: of a GPU that may not be there: (architecture, e.g. 90); that of this machine's if None.
        processes: how many at once; one a CPU core if None.
    """

    def __init__(self, requests: Iterable[Request], target: int | None = None, processes: int | None = None) -> None:
        texts = list(dict.fromkeys(json.dumps(_described(*request)) for request in requests))
        if target is None:
            major, minor = torch.cuda.get_device_capability()
            target = 10 * major + minor
        count = min(len(texts), processes or os.cpu_count() or 1)
        command = [sys.executable, "-m", __name__, str(target)]
        self._running = []
        for i in range(count):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdin is not None
            process.stdin.write("\n".join(texts[i::count]))
            process.stdin.close()
            self._running.append(process)

    def wait(self) -> list[str]:
        """Wait for all; why some did not compile. They may be tried again: nothing is remembered about them."""
        return [line for process in self._running for line in _lines(process)]


def _lines(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.wait():
        lines.append(f"a compiling process ended with {process.returncode}")
    return lines


def _described(product: Product, m: int, config: Config) -> dict[str, Any]:
    return {
        "product": {**asdict(product), "dtype": str(product.dtype).removeprefix("torch.")},
        "m": m,
        "config": asdict(config),
    }


def compile_one(product: Product, m: int, config: Config) -> None:
    """Go through the launch on tensors without storage."""
    product.run(product.x(m, "meta"), product.weight("meta"), config)


def _main() -> None:
    triton.runtime.driver.set_active(Target(int(sys.argv[1])))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    for line in sys.stdin:
        request = json.loads(line)
        dtype = getattr(torch, request["product"].pop("dtype"))
        try:
            compile_one(Product(**request["product"], dtype=dtype), request["m"], Config(**request["config"]))
        except Exception as error:
            print(f"{line.strip()}: {type(error).__name__}: {str(error)[-300:]!r}")


if __name__ == "__main__":
    _main()
