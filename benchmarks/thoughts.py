"""Which questions the evidence stages of a run chose on validation, and what else they tried.

    python benchmarks/thoughts.py RUN --json --save        after `streamctl reproduce RUN`

Gathers the report of every seed's evidence stage: ndcg@10 of the validation users after each
look-up, the gain of every view at every step less its standard error, the control of one wide
look-up, and what the memory takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streamctl.evaluation.jobs import job_path
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
KEYS = ("look_ups", "settings", "valid", "tried", "wide", "memory", "epochs", "best_epoch")
OPTIONAL = ("summed", "read")  # one of them, where a reader was trained


def gather(run: RunDir) -> list[dict[str, object]]:
    found = []
    for folder in sorted((run.path / "reproduce").glob("evidence-[0-9]*")):
        seed = folder.name.partition("-")[2]
        if not seed.isdigit():
            continue
        stage = job_path(run, "evidence", int(seed)).require("evidence")
        report, manifest = stage.json("report.json"), stage.manifest
        row = {"seed": int(seed)} | {key: report[key] for key in KEYS}
        row |= {key: report[key] for key in OPTIONAL if key in report}
        found.append(row | {key: manifest[key] for key in ("search_ms", "wall_s", "git", "config")})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/thoughts-NAME.json")
    options = parser.parse_args()
    run = RunDir(options.run)
    result = {"name": "thoughts", "data_hash": run.stage("data").hash, "seeds": gather(run)}
    result |= provenance()
    name = options.run.resolve().name
    if options.save:
        (RESULTS / f"thoughts-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
