"""What becomes of each model of tests/zoo on each way: right, or refused by name. Writes results/zoo.json.

python benchmarks/model_zoo.py
python benchmarks/model_zoo.py --way x86/ours --case resnet --case llama
python benchmarks/model_zoo.py --missing
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import records
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from zoo.judging import outcome, ways_of  # noqa: E402
from zoo.models import FAMILIES  # noqa: E402


def main() -> None:
    """Run what is asked for; each row is written when it is known."""
    options = _options()
    torch.set_num_threads(1)
    known = {(r["case"], r["way"]) for r in records.read("zoo")["rows"]} if options.missing else set()
    for family, cases in FAMILIES.items():
        for case in cases:
            for way in ways_of(case):
                wanted = any(way.startswith(start) for start in options.way)
                if wanted and (not options.case or case.name in options.case) and (case.name, way) not in known:
                    records.write("zoo", [_row(family, case, way)], ("case", "way"))


def _row(family: str, case, way: str) -> records.Row:
    start = time.perf_counter()
    actual, expected = outcome(case, way), case.expectation(way)
    row = {
        "family": family,
        "case": case.name,
        "way": way,
        "outcome": actual.kind,
        "as_expected": not actual.problem(expected),
        "converted_db": actual.converted_db,
        "program_db": actual.program_db,
        "integer_ops": actual.integer_ops,
        "text": " ".join(actual.text.split())[:300],
        "seconds": time.perf_counter() - start,
    }
    print(f"{case.name} {way}: {actual.kind} {'' if row['as_expected'] else 'UNEXPECTED '}{row['text']}", flush=True)
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="name of a case; all without it")
    parser.add_argument("--way", action="append", default=None, help="start of a way, e.g. x86/ours or xnnpack")
    parser.add_argument("--missing", action="store_true", help="only what results/zoo.json does not hold yet")
    options = parser.parse_args()
    options.way = options.way or [""]
    return options


if __name__ == "__main__":
    main()
