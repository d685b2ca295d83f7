"""Damaged plans and odd arguments for the x86 kernels, by the million, and what came of running them.

python benchmarks/native_faults.py [--plans 1000000] [--arguments 100000] [--sanitize]

Each part runs in a process of its own, which a crash ends: `refused` and `ran` are as they should be, `crashed` counts
the parts that ended. With `--sanitize` the kernels are compiled with AddressSanitizer and UndefinedBehaviorSanitizer,
which takes a quarter of an hour and finds accesses that happen to hit memory. A row goes into `results/faults.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import records

FUZZ = Path(__file__).resolve().parents[1] / "tests" / "faults" / "native_fuzz.py"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1"
PART = 50_000  # plans in a process


def main() -> None:
    """Run, print and keep a row for plans and one for arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=1_000_000)
    parser.add_argument("--arguments", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="needs gcc's libasan and libubsan")
    options = parser.parse_args()
    parts = max(1, -(-options.plans // PART))
    counts: dict[str, Counter[str]] = {"plans": Counter(), "arguments": Counter()}
    start = time.perf_counter()
    for part in range(parts):
        numbers = [options.seed + part, options.plans // parts, options.arguments // parts]
        command = [sys.executable, "-W", "ignore", str(FUZZ), *map(str, numbers)]
        done = subprocess.run(command, env=_environment(options.sanitize), capture_output=True, text=True, check=False)
        if done.returncode:
            counts["plans"]["crashed"] += 1
            print(f"seed {numbers[0]} ended with {done.returncode}: {done.stderr[-1500:]}", flush=True)
            continue
        counted = json.loads(done.stdout.splitlines()[-1])
        for kind, more in counts.items():
            more.update(counted[kind])
        print(f"{part + 1} of {parts}: {counts}", flush=True)
    for kind, tally in counts.items():
        row = {"kind": f"x86 {kind}", "seed": options.seed, "sanitized": options.sanitize, "files": sum(tally.values())}
        row |= {outcome: tally[outcome] for outcome in ("refused", "ran", "crashed")}
        records.write("faults", [row | {"seconds": round(time.perf_counter() - start)}], ("kind", "seed"))


def _environment(sanitize: bool) -> dict[str, str]:
    if not sanitize:
        return dict(os.environ)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    more = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "TORCHQUANT_FUZZ_FLAGS": FLAGS}
    return {**os.environ, **more}


if __name__ == "__main__":
    main()
