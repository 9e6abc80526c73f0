"""Thousands of generated requests, valid and not, against the server's own OpenAPI description.

    python benchmarks/openapi.py --json [--save] [--examples 500]

Runs tests/test_serving_schema.py with so many cases an operation and kind (5 for reload, run and
metrics). A 5xx, a status or a body that the description does not have is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from streamctl.runs import provenance

ROOT = Path(__file__).resolve().parent.parent
RECEIPT = ROOT / "benchmarks" / "results" / "openapi.json"


def campaign(examples: int, counts: Path) -> tuple[bool, list[dict]]:
    """Whether every case was answered as described, and the cases of each operation by status."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0",
         ROOT / "tests" / "test_serving_schema.py"],
        cwd=ROOT, stdout=sys.stderr,
        env={**os.environ, "STREAMCTL_SCHEMA_EXAMPLES": str(examples),
             "STREAMCTL_SCHEMA_COUNTS": str(counts)},
    )  # fmt: skip
    return done.returncode == 0, [json.loads(line) for line in counts.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/openapi.json")
    parser.add_argument("--examples", type=int, default=500, help="cases an operation and kind")
    options = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        passed, operations = campaign(options.examples, Path(folder) / "counts.jsonl")
    statuses: Counter[str] = Counter()
    for one in operations:
        statuses.update(one["statuses"])
    receipt = {"name": "openapi", **provenance(), "passed": passed, "cases": statuses.total()}
    receipt["server_errors"] = sum(n for status, n in statuses.items() if status >= "500")
    receipt |= {"statuses": dict(sorted(statuses.items())), "operations": operations}
    receipt["wall_s"] = round(time.time() - began, 1)
    if options.save:
        RECEIPT.write_text(json.dumps(receipt, indent=1) + "\n")
    if options.json:
        print(json.dumps(receipt, indent=1))
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
