"""Quality receipt of a whole run: `data prepare` + `streamctl run`, what it reached, how long.

    python benchmarks/pipeline.py SOURCE --run runs/sci --size tiny --seed 0 --json --save sci

A finished run is not trained again: its manifests hold every stage's configuration, seed, versions
and wall time, and the receipt is read from them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streamctl.config import DataConfig, resolve
from streamctl.evaluation.reproduce import ancestors
from streamctl.pipeline import Settings, run_all
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"


def receipt(run: RunDir) -> dict:
    """Metrics, configurations, data hash, seeds, versions and wall times of a finished run."""
    stages = ancestors(run, ["eval"])
    # A receipt says which data, not where it lay.
    stages["data"]["config"]["source"] = Path(stages["data"]["config"]["source"]).name
    kept = ("config", "seed", "wall_s", "peak_memory_mb", "git", "hash")
    return {
        "name": "pipeline",
        "data": run.stage("data").json("statistics.json"),
        "data_hash": run.stage("data").hash,
        "stages": {
            name: {key: manifest[key] for key in kept if key in manifest}
            for name, manifest in stages.items()
        },
        "tokenizer": run.stage("tokenizer").json("report.json"),
        "evaluation": run.stage("eval").json("metrics.json"),
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="data to prepare, unless the run has its own")
    parser.add_argument("--run", required=True)
    parser.add_argument("--size", default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", metavar="NAME", help="write results/pipeline-NAME.json")
    options = parser.parse_args()
    run = RunDir(options.run)
    if not run.stage("data").complete:
        from streamctl.data import prepare

        prepare(run, resolve(DataConfig, source=options.source))
    run_all(run, Settings(sets=options.sets, seed=options.seed, size=options.size))
    result = receipt(run)
    if options.save:
        path = RESULTS / f"pipeline-{options.save}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
