"""Which kernel, and how it is cut, for a product of a given size on a given GPU.

Answers that were found by measurement (`tuning.search`) are kept by GPU: those that come with the package in
`measured/*.json`, those of this machine in the cache folder, which win. Everything else is chosen by rules from the
sizes. Nothing is ever searched for while a model runs.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchquant.errors import ArtifactError
from torchquant.files.whole import reading, warn_ignored, write_whole
from torchquant.ops import builds

__all__ = ["Config", "bucket", "candidates", "choose", "remember", "slug", "table"]

WEIGHT_ONLY = ("w4a16", "w8a16")
FORMATS = (*WEIGHT_ONLY, "int8", "fp8")
TRIAL = frozenset(
    os.environ.get("TORCHQUANT_GPU_TRIAL", "").split(",")
)  # features to try that no GPU has run yet, see kernels.py
_PACKAGED = Path(__file__).parent / "measured"
_HOPPER_BYTES = 200 * 1024  # shared memory of a program: more than any GPU before Hopper has
_MULTIPROCESSOR_BYTES = 228 * 1024  # shared memory of a Hopper multiprocessor; each program also takes 1024 bytes of it
_LARGEST = 8192  # products with more rows than this use the config for this many
_BUCKETS = {str(1 << i) for i in range(_LARGEST.bit_length())}


@dataclass(frozen=True)
class Config:
    """A kernel and its cut.

    Args:
        kernel: `skinny`, `tiled`, `direct` (weight only: without shared memory), `pipelined` (weight only: unpacks
            while Hopper's tensor cores multiply), `copied` (codes by codes: tiles by Hopper's copies), `dequantize`
            (weight only: to a float weight, then cuBLAS) or `library` (cuBLAS).
        m, n, k: the tile, as far as the kernel has one.
        slices: of K: within a program (skinny), or over programs (tiled, pipelined).
        warps, stages: as Triton's num_warps and num_stages.
        quantizes: the kernel quantizes float activations itself (skinny).
    """

    kernel: str
    m: int = 0
    n: int = 0
    k: int = 0
    slices: int = 1
    warps: int = 4
    stages: int = 3
    quantizes: bool = False


def bucket(m: int) -> int:
    """Sizes that are cut alike: the next power of two."""
    return min(1 << max(0, m - 1).bit_length(), _LARGEST)


def candidates(format: str, m: int) -> list[Config]:
    """What is worth trying for a product with m rows."""
    return _weight_only_candidates(format, m) if format in WEIGHT_ONLY else _codes_candidates(m)


def _weight_only_candidates(format: str, m: int) -> list[Config]:
    rows, configs = max(8, min(bucket(m), 32)), []
    if m <= 64:
        configs += [Config("direct", rows, n, slices=s, warps=s, stages=a) for n, s, a in _DIRECT if rows * n <= 2048]
    if m <= 128:
        configs += [
            Config("skinny", rows, n, slices=s, warps=w, stages=st)
            for n, s, w, st in _SKINNY_WEIGHT_ONLY
            if rows * n <= 1024 and not (format == "w8a16" and n * s > 256)
        ]
    if m > 8:
        configs += [
            Config("tiled", tile, n, slices=s, warps=w, stages=st)
            for tile, n, w, st in _TILED_WEIGHT_ONLY
            for s in (1, 2, 4)
            if tile <= max(16, bucket(m)) and tile * 8 >= m and (s == 1 or m <= 256)
        ]
    if m > 32 and "pipelined" in TRIAL:
        configs += [
            Config("pipelined", tile, n, slices=s, warps=w, stages=st)
            for tile, n, w, st in _PIPELINED
            for s in (1, 2, 4)
            if tile <= max(64, bucket(m)) and (tile > 64 or m <= 512) and (s == 1 or m <= 256)
        ]
    return [*configs, Config("dequantize")] if m > 32 else configs


def _codes_candidates(m: int) -> list[Config]:
    rows, configs = max(8, min(bucket(m), 32)), []
    if m <= 128:
        configs += [
            Config("skinny", rows, n, k, slices=s, warps=w, stages=st, quantizes=q)
            for n, k, s, w, st in _SKINNY
            for q in ((True, False) if m <= 8 else (False,))
            if rows * n <= 1024
        ]
    if m > 16:
        configs += [
            Config(kernel, tile, n, k, slices=s, warps=w, stages=st)
            for kernel, cuts in (("tiled", _TILED), ("copied", _COPIED))
            for tile, n, k, w, st in cuts
            for s in (1, 2, 4)
            if tile <= max(64, bucket(m)) and (s == 1 or m <= 256)
        ]
        configs.append(Config("library"))
    return configs


# direct: (outputs, slices, steps of codes loaded ahead)
_DIRECT = ((16, 4, 2), (16, 8, 1), (16, 8, 2), (16, 16, 1), (32, 4, 1), (32, 4, 2), (32, 8, 1))
# skinny, weight only: (outputs, slices, warps, stages)
_SKINNY_WEIGHT_ONLY = ((32, 4, 4, 4), (64, 2, 2, 4), (64, 4, 4, 3), (128, 2, 2, 3))
# tiled, weight only: (rows, outputs, warps, stages)
_TILED_WEIGHT_ONLY = (
    (16, 64, 4, 4),
    (16, 128, 4, 4),
    (32, 64, 4, 4),
    (32, 128, 4, 4),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 256, 8, 3),
    (128, 128, 4, 2),
    (128, 128, 8, 3),
    (256, 128, 8, 3),
)
# pipelined: (rows, outputs, warps, stages); with four warps a multiprocessor runs two programs
_PIPELINED = (
    (64, 128, 4, 4),
    (64, 256, 8, 4),
    (128, 128, 4, 2),
    (128, 128, 8, 4),
    (128, 256, 8, 3),
    (128, 256, 8, 4),
    (256, 128, 8, 2),
    (256, 128, 8, 3),
)
# skinny, codes by codes: (outputs, columns, slices, warps, stages)
_SKINNY = (
    (16, 128, 2, 2, 8),
    (16, 128, 4, 4, 4),
    (16, 256, 4, 4, 3),
    (32, 128, 4, 4, 4),
    (32, 256, 4, 4, 3),
    (64, 128, 4, 4, 3),
)
# tiled, codes by codes: (rows, outputs, columns, warps, stages)
_TILED = (
    (64, 64, 128, 4, 4),
    (64, 64, 256, 4, 3),
    (64, 128, 128, 4, 4),
    (128, 64, 128, 4, 4),
    (128, 128, 128, 4, 3),
    (128, 128, 128, 8, 3),
    (256, 128, 128, 8, 3),
)
# copied: (rows, outputs, columns, warps, stages)
_COPIED = (
    (64, 64, 128, 4, 4),
    (64, 128, 128, 4, 4),
    (128, 128, 128, 4, 3),
    (128, 256, 128, 8, 4),
    (256, 128, 128, 8, 3),
)


def by_rule(format: str, m: int, n: int, multiprocessors: int, shared_bytes: int) -> Config:
    """A cut for sizes that were not measured, after what was fastest for others on an H200.

    Args:
        shared_bytes: shared memory that one program may have.
    """
    hopper = shared_bytes >= _HOPPER_BYTES
    rule = _weight_only_rule if format in WEIGHT_ONLY else _codes_rule
    return _fitted(rule(format, m, n, multiprocessors, hopper), format, shared_bytes)


def _weight_only_rule(format: str, m: int, n: int, multiprocessors: int, hopper: bool) -> Config:
    rows, wide = max(8, min(bucket(m), 64)), n >= 64 * multiprocessors
    if m <= 8 and wide:  # a warp that computes more outputs reads x less often
        outputs, stages = (64, 4) if format == "w4a16" else (128, 3)
        return Config("skinny", rows, outputs, slices=2, warps=2, stages=stages)
    if m <= 8:
        return Config("direct", rows, 16, slices=8, warps=8, stages=1)
    if m > 256:
        return Config("dequantize")
    if m > 128 and wide and hopper:  # earlier tensor cores read both operands from registers: too few
        return Config("tiled", 256, 128, warps=8, stages=3)
    tiled = Config("tiled", rows, 128 if wide or m > 32 else 64, warps=4, stages=3 if m > 32 else 4)
    tiles = -(-n // tiled.n) * -(-m // tiled.m)
    while tiled.slices < 4 and 2 * tiles * tiled.slices <= 3 * multiprocessors:
        tiled = replace(tiled, slices=2 * tiled.slices)
    return tiled


def _codes_rule(format: str, m: int, n: int, multiprocessors: int, hopper: bool) -> Config:
    rows, wide = max(8, min(bucket(m), 32)), n >= 64 * multiprocessors
    if m <= 32 and (wide or rows == 32):
        return Config("skinny", rows, 32, 256 if wide else 128, slices=4, stages=3 if wide else 4)
    if m <= 32:
        return Config("skinny", rows, 16, 128, slices=4, stages=4, quantizes=m <= 2)
    if m <= 64:
        return Config("tiled", 64, 128, 128, stages=4) if wide else Config("tiled", 64, 64, 256, stages=3)
    if format == "fp8":
        return Config("library")
    kernel = "copied" if hopper else "tiled"
    if m <= 256 and not wide:
        return Config(kernel, 64, 64, 128, stages=4)
    return Config(kernel, 128, 128, 128, stages=3)


def _fitted(config: Config, format: str, shared_bytes: int) -> Config:
    """The same with as many stages, or at least as many rows, as shared memory holds."""
    if config.kernel in ("direct", "dequantize", "library"):
        return config
    while config.stages > 2 and tile_bytes(config, format) * config.stages > shared_bytes:
        config = replace(config, stages=config.stages - 1)
    while config.m > 1 and tile_bytes(config, format) * config.stages > shared_bytes:
        config = replace(config, m=config.m // 2)
    return config


def tile_bytes(config: Config, format: str) -> int:
    """What one step of a program copies to shared memory: codes, activations, scales."""
    slices = config.slices if config.kernel == "skinny" else 1
    if format in WEIGHT_ONLY:
        weight, x = config.n * (64 if format == "w4a16" else 128) + 4 * config.n, config.m * 256
    else:
        weight, x = config.n * config.k, config.m * config.k * (2 if config.quantizes else 1)
    return slices * (weight + x)


def pipelined_stages(config: Config, bits: int, group_size: int) -> int:
    """How many stages of a pipelined product shared memory holds, of those that are wanted.

    Beside them it holds 16 rows of sums, and barriers.
    """
    groups = 1 if group_size % 128 == 0 else 4
    stage = config.m * 256 + config.n * (16 * bits + 4 * groups)
    free = _MULTIPROCESSOR_BYTES * config.warps // 8 - 1024 - config.n * 64 - 64
    return max(2, min(config.stages, free // stage))


def convolution_by_rule(m: int, n: int) -> Config:
    """The cut of a convolution with m pixels and n channels in its output."""
    return Config("tiled", 64 if m < 16384 else 128, 64 if n <= 64 else 128, 64, warps=4 if n <= 64 else 8, stages=4)


def choose(format: str, m: int, n: int, k: int, device: torch.device, *, library: bool = True) -> Config:
    """The cut of a product x (m, k) by weight (n, k); `library`: whether cuBLAS takes it."""
    config = _chosen(format, bucket(m), n, k, device)
    if config.kernel == "library" and not library:
        return Config("skinny", 8, 16, 128, slices=4, warps=4) if m <= 16 else Config("tiled", 64, 64, 128, stages=4)
    return config


@functools.cache
def _chosen(format: str, m: int, n: int, k: int, device: torch.device) -> Config:
    properties = torch.cuda.get_device_properties(device)
    measured = table(slug(properties.name)).get(format, {}).get(f"{n}x{k}", {}).get(str(m))
    if measured is not None:
        return Config(**measured)
    shared_bytes: int = getattr(properties, "shared_memory_per_block_optin", 49152)
    return by_rule(format, m, n, properties.multi_processor_count, shared_bytes)


def slug(name: str) -> str:
    """A GPU's name as a file name."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


def _own_folder() -> Path:
    folder = builds.cache_folder() / "gpu"
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        folder = builds.own_folder() / "gpu"
        folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def table(gpu: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """format -> `NxK` -> rows -> Config, of one GPU; without what the kernels do not know, with a warning."""
    known: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for folder in (_PACKAGED, _own_folder()):
        for format, sizes in _measured(folder / f"{gpu}.json").items():
            for size, rows in sizes.items():
                known.setdefault(format, {}).setdefault(size, {}).update(rows)
    return known


def _measured(file: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """A table, read from a file that anybody may have written: only configurations that could have been measured."""
    if not file.exists():
        return {}
    try:
        with reading(file, "a table of measurements"):
            measurements = json.loads(file.read_text(encoding="utf-8"))
            entries = [
                (format, size, rows, config)
                for format, sizes in measurements.items()
                for size, by_rows in sizes.items()
                for rows, config in by_rows.items()
            ]
    except ArtifactError as error:
        warn_ignored(file, str(error.__cause__ or error))
        return {}
    known: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for format, size, rows, config in entries:
        if _is_known(format, size, rows, config):
            known.setdefault(format, {}).setdefault(size, {})[rows] = config
        else:
            warn_ignored(file, f"no kernel is cut like {format} {size} {rows}: {config!r:.200}")
    return known


def _is_known(format: str, size: str, rows: str, config: Any) -> bool:
    """Whether a search for a product of this size could have found this."""
    if format not in FORMATS or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) or rows not in _BUCKETS:
        return False
    return any(config == asdict(c) and _same_types(config, asdict(c)) for c in candidates(format, int(rows)))


def _same_types(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        type(value) is type(other[name]) for name, value in one.items()
    )  # JSON's true equals 1, but is no number of stages


def remember(gpu: str, format: str, m: int, n: int, k: int, config: Config) -> Path:
    """Keep what was measured on this machine; products from now on use it."""
    file = _own_folder() / f"{gpu}.json"
    known = _measured(file)
    known.setdefault(format, {}).setdefault(f"{n}x{k}", {})[str(bucket(m))] = asdict(config)
    write_whole(file, lambda part: part.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8"))
    table.cache_clear()
    _chosen.cache_clear()
    return file
