"""What a GPU will run: kernels compiled as at a launch, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from torchquant.ops.gpu import kernels

__all__ = ["Code", "Target", "compiled"]


class Target:
    """Stands in for the driver of a GPU of which only the architecture is known, e.g. 90."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Code:
    """A compiled kernel.

    Args:
        name: of the kernel.
        registers: of a thread; stack_bytes: memory that stands in for registers that it lacks.
        shared_bytes: shared memory of a program.
        instructions: the disassembled code.
    """

    def __init__(self, built: Any) -> None:
        usage = _disassembled("-res-usage", built.asm["cubin"])
        counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert counts is not None, usage
        self.name: str = built.metadata.name
        self.registers, self.stack_bytes = int(counts.group(1)), int(counts.group(2))
        self.shared_bytes: int = built.metadata.shared
        self.instructions = _disassembled("-sass", built.asm["cubin"])

    def loop(self) -> list[str]:
        """The instructions of the longest loop."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self.instructions)
        at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        bodies: list[list[str]] = [[]]
        for address, instruction in lines:
            back = re.search(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", instruction)
            if back and int(back.group(1), 16) < int(address, 16):
                first, last = at[int(back.group(1), 16)], at[int(address, 16)]
                bodies.append([text for _, text in lines[first : last + 1]])
        return max(bodies, key=len)


def compiled(capability: int, run: Callable[[], object]) -> list[Code]:
    """The kernels that `run` launches, compiled for a GPU of `capability` and not launched.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    built: list[Any] = []

    class Compiling:
        """Stands in a kernel's place."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: built.append(self.kernel.warmup(*arguments, grid=grid, **options))

    originals = {name: getattr(kernels, name) for name in kernels.__all__}
    in_place: dict[str, Any] = {name: Compiling(kernel) for name, kernel in originals.items()}
    for kernel in originals.values():
        kernel.device_caches.clear()  # it may hold code for another capability
    with (
        mock.patch.object(driver, "_active", Target(capability)),
        mock.patch.multiple(kernels, **in_place),
    ):
        run()
    for kernel in originals.values():
        kernel.device_caches.clear()
    return [Code(kernel) for kernel in built]


def _disassembled(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
