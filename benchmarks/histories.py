"""Accuracy and time of `--history items` beside `codes`, and of bf16 decoding beside fp32.

    python benchmarks/histories.py RUN OUTPUT [--size tiny] [--users 0]

TIGER (the backbone with l = 0) is trained twice on a copy of RUN's data and tokenizer, once with
m encoder positions an item and once with one, all else equal. Each ranks the whole catalogue for
every test user with a beam of 50, in fp32 and in bf16; differences carry paired bootstrap
intervals over users. The receipt is results/histories-NAME.json; OUTPUT keeps the trained models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.baselines.tiger import Tiger
from streamctl.baselines.train import train_baseline
from streamctl.config import BaselineConfig
from streamctl.data import load_data
from streamctl.decode import PolicyRecommender
from streamctl.ranking import evaluate, paired_difference, sample_users
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
BEAM = 50


def trained(source: RunDir, folder: Path, config: BaselineConfig) -> RunDir:
    """A copy of the run with TIGER of one kind of history; what is complete is not done again."""
    for stage in ("data", "tokenizer"):
        if not (folder / stage).exists():
            shutil.copytree(source.stage(stage).path, folder / stage)
    run = RunDir(folder)
    train_baseline(run, config)
    return run


def measure(run: RunDir, users: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures by precision, and each user's rank by precision."""
    stage = run.stage("baselines/tiger")
    model, split = Tiger.load(stage), load_data(run)[1]
    examples = sample_users(split.test, users, 0)
    base = PolicyRecommender(model.policy, model.trie, decoder="direct", beam=BEAM)
    figures, ranks = {}, {}
    for name in ("fp32", "bf16"):
        recommender = replace(base, exact=name == "fp32")
        found = evaluate(recommender, examples, n_items=split.n_items, masked=False, title=name)
        figures[name] = {metric: found.metrics[metric] for metric in METRICS}
        figures[name]["ms_per_user"] = found.ms_per_user
        ranks[name] = found.ranks
    manifest = stage.manifest
    return {
        "users": len(examples),
        "train_s": manifest["wall_s"],
        "epochs": manifest["epochs"],
        "valid": manifest["valid"],
        "config": manifest["config"],
        "precision": figures,
        "bf16_less_fp32": paired_difference(ranks["bf16"], ranks["fp32"]).as_dict(),
    }, ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path, help="folder for the copies and the trained models")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--users", type=int, default=0, help="a seeded sample of so many; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.time()
    source = RunDir(options.run)
    rows, ranks = [], {}
    for history in ("codes", "items"):
        config = BaselineConfig(
            "tiger", size=options.size, history=history, seed=options.seed, epochs=options.epochs
        )
        run = trained(source, options.output / history, config)
        row, ranks[history] = measure(run, options.users)
        rows.append({"history": history, **row})
    difference = paired_difference(ranks["items"]["fp32"], ranks["codes"]["fp32"])
    result = {"name": "histories", "size": options.size, "seed": options.seed, "beam": BEAM}
    result |= {"data_hash": source.stage("data").hash, "rows": rows}
    result |= {"items_less_codes": difference.as_dict(), **provenance()}
    result["wall_s"] = round(time.time() - began, 1)
    path = RESULTS / f"histories-{source.path.resolve().name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
