"""ExecuTorch's own tests with XnnpackQuantizer: how many pass, and why others do not.

Writes results/executorch_suite.json.

python benchmarks/executorch_suite.py
python benchmarks/executorch_suite.py --part delegate
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import records

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import executorch_suite as suite


def main() -> None:
    """Run the parts asked for and write one row for each way in which tests ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(suite.PARTS), help="all without it")
    for part in parser.parse_args().part or list(suite.PARTS):
        records.write("executorch_suite", rows(part, suite.run(suite.PARTS[part])), ("part", "outcome", "reason"))


def rows(part: str, found: suite.Records) -> list[records.Row]:
    """One row for each outcome and reason, with the names of the tests that did not pass."""
    kinds: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], list[str]] = {}
    for name, record in found.items():
        outcome, why = record["outcome"], suite.reason(record)
        key = ("by choice" if why else outcome, why or (record["text"] if outcome in ("failed", "refused") else ""))
        kinds[key] += 1
        names.setdefault(key, []).append(name.rpartition("/")[2])
    return [
        {"part": part, "outcome": key[0], "reason": key[1], "tests": n, "names": names[key] if key[1] else []}
        for key, n in kinds.items()
    ]


if __name__ == "__main__":
    main()
