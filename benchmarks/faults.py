"""Damaged and forged files of every kind, by the thousand, and what came of reading them.

python benchmarks/faults.py [--kind graph] [--count 10000] [--seed 0]

Each file is read in a process apart. `refused`: an error of torchquant's own. `same`: read, with the result of the
intact file (what changed is nothing that counts). `forged`: digests and checksums were made to fit the change, and it
was read. These are as they should be; the others are not: `changed` (another result, in silence), `raw` (an error that
is none of torchquant's), `crash`, `hang`, `ran` (a payload inside the file was executed). A row for each kind goes into
`results/faults.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import records

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import fuzz

KEY = ("kind", "seed")


def main() -> None:
    """Read, print and keep a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*fuzz.KINDS, "pt2", "all"], default="all", help="pt2: graph, exported")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = {"pt2": ["graph", "exported"], "all": list(fuzz.KINDS)}.get(options.kind, [options.kind])
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            start = time.perf_counter()
            result = fuzz.run(Path(folder), [kind], options.count, options.seed)[kind]
            counts = {outcome: result.counts[outcome] for outcome in fuzz.OUTCOMES}
            seconds = round(time.perf_counter() - start)
            row = {"kind": kind, "seed": options.seed, "files": options.count, **counts, "seconds": seconds}
            records.write("faults", [row], KEY)
            print(f"{kind:12s} " + "  ".join(f"{n} {outcome}" for outcome, n in counts.items() if n), flush=True)
            for outcome, details in result.details.items():
                for number, detail in details[:5]:
                    print(f"    {outcome} at {number}: {detail}", flush=True)


if __name__ == "__main__":
    main()
