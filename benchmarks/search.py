"""One trial of a baseline: train it with some settings, note what it reached on validation.

    python benchmarks/search.py RUN sasrec loss=ce dropout=0.5

Every trial ranks the whole catalogue for every validation user; test users are never looked at.
Trials of a run gather in results/search-NAME.json; one that is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from streamctl.baselines.registry import baseline_class
from streamctl.baselines.train import train_baseline
from streamctl.config import BaselineConfig, resolve
from streamctl.data import load_data
from streamctl.evaluation.evaluate import evaluate
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
METRICS = ("recall@10", "ndcg@10")


def trial(run: RunDir, name: str, sets: list[str]) -> dict:
    """Train in RUN/search/NAME_SETTINGS, a run of its own, and evaluate on all validation users."""
    job = RunDir(run.path / "search" / "_".join([name, *sets]))
    for parent in baseline_class(name).parents:
        if not job.stage(parent).complete:
            shutil.copytree(run.stage(parent).path, job.stage(parent).path)
    config = resolve(BaselineConfig, sets=sets, name=name)
    stage = train_baseline(job, config)
    split = load_data(job)[1]
    model = baseline_class(name).load(stage)
    found = evaluate(model, split.valid, n_items=split.n_items, masked=False).metrics
    manifest = stage.manifest
    return {
        "method": name,
        "settings": sets,
        "config": manifest["config"],
        **{key: found[key] for key in METRICS},
        **{key: manifest[key] for key in ("parameters", "epochs", "best_epoch", "wall_s", "git")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("method")
    parser.add_argument("settings", nargs="*", help="key=value of [baseline]")
    options = parser.parse_args()
    run = RunDir(options.run)
    path = RESULTS / f"search-{run.path.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = (options.method, sorted(options.settings))
    if key not in [(row["method"], row["settings"]) for row in rows]:
        rows.append(trial(run, *key))
        result = {"name": "search", "data_hash": run.stage("data").hash, "split": "valid"}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result | {"rows": rows, **provenance()}, indent=1) + "\n")
    print(json.dumps(rows[-1], indent=1))


if __name__ == "__main__":
    main()
