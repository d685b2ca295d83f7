"""ExecuTorch's own tests with XnnpackQuantizer: how many pass, and why others do not.

Writes results/executorch_suite.json. It takes about two hours; with --records it goes on where it was stopped.

python benchmarks/executorch_suite.py
python benchmarks/executorch_suite.py --part delegate --files 20 --records records.json
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--records", type=Path, help="file of what became of each file of tests, kept between runs")
    parser.add_argument("--files", type=int, help="only so many of a part's files of tests, which its rows then say")
    options = parser.parse_args()
    known: dict[str, suite.Records] = {}
    if options.records and options.records.exists():
        known = json.loads(options.records.read_text())
    for part in options.part or list(suite.PARTS):
        every = suite.files(part)
        files = every[: options.files]
        for file in files:
            if file not in known:
                known[file] = suite.run(file)
                print(f"{file}: {dict(Counter(r['outcome'] for r in known[file].values()))}", flush=True)
                if options.records:
                    options.records.write_text(json.dumps(known, indent=1) + "\n")
        suite_records = {name: record for file in files for name, record in known[file].items()}
        name = part if files == every else f"{part} (the first {len(files)} of {len(every)} files)"
        records.write("executorch_suite", rows(name, suite_records), ("part", "outcome", "reason"))


def rows(part: str, suite_records: suite.Records) -> list[records.Row]:
    """One row for each outcome and reason, with the names of the tests that did not pass."""
    kinds: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], list[str]] = {}
    for name, record in suite_records.items():
        outcome, why = record["outcome"], suite.reason(record)
        kind = "upstream" if why in suite.UPSTREAM.values() else "by choice" if why else outcome
        key = (kind, why or (record["text"] if outcome in ("failed", "refused") else ""))
        kinds[key] += 1
        names.setdefault(key, []).append(name.rpartition("/")[2])
    return [
        {"part": part, "outcome": key[0], "reason": key[1], "tests": n, "names": names[key] if key[1] else []}
        for key, n in kinds.items()
    ]


if __name__ == "__main__":
    main()
