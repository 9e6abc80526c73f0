"""Going on from an older run beside training anew: accuracy and seconds of both.

    python benchmarks/update.py runs/beauty --json [--save] [--size tiny] [--set sft.epochs=6]

Cuts a prepared run's log in two. Where it has times, the older log is what came before the time
that divides it at --share of its interactions; where it has none, it is every user's first --share
of items, and one user in five is missing. The newer log is all of it. An older run is trained
(tokenize, pretrain, annotate, sft); then, on the newer log, `update` goes on from it, and another
run trains everything anew with the same settings. Both are evaluated on the newer log's test users.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file

from streamctl import config as configs
from streamctl.api import prepare
from streamctl.data import load_data
from streamctl.evaluation.makers import maker
from streamctl.evaluation.stage import RANKS, evaluate_run, read_result
from streamctl.evaluation.update import update
from streamctl.provenance import provenance
from streamctl.ranking import paired_difference
from streamctl.runs import RunDir

RECEIPT = Path(__file__).parent / "results" / "update.json"
STAGES = ("tokenizer", "pretrain", "annotate", "sft")
METHODS = ("stream_sft", "l0")
METRICS = ("recall@10", "ndcg@10")


def older(run: RunDir, share: float) -> np.ndarray:
    """bool (T,): which interactions of a run's log the older log has."""
    log = load_data(run)[1].log
    if log.timestamps is not None:
        return log.timestamps < np.quantile(log.timestamps, share)
    place = np.arange(len(log)) - np.repeat(log.offsets[:-1], log.lengths)
    users = np.repeat(np.arange(log.n_users), log.lengths)
    return (place < np.repeat(share * log.lengths, log.lengths)) & (users % 5 > 0)


def make_data(run: RunDir, folder: Path, rows: np.ndarray) -> RunDir:
    """A run whose data are some interactions of another's log."""
    catalog, split = load_data(run)
    log = split.log
    users = np.repeat(np.arange(log.n_users), log.lengths)[rows]
    items = log.items[rows]
    order = "position" if log.timestamps is None else "timestamp"
    times = np.arange(len(log)) if log.timestamps is None else log.timestamps
    there = np.unique(items).tolist()
    columns = {"item_id": catalog.ids, "title": catalog.titles, **catalog.fields}
    table = {
        "user_id": [log.user_ids[user] for user in users],
        "item_id": [catalog.ids[item] for item in items],
        order: times[rows],
    }
    prepare(
        pa.table(table),
        pa.table({name: [values[item] for item in there] for name, values in columns.items()}),
        folder, min_user=3, min_item=0, history=split.history,
    )  # fmt: skip
    return RunDir(folder)


def train(run: RunDir, size: str, sets: list[str]) -> float:
    """Make every stage; in how many seconds."""
    began = time.perf_counter()
    for name in STAGES:
        make, cls = maker(name)
        flags = {"size": size} if cls is configs.PretrainConfig else {}
        make(run, configs.resolve(cls, sets=sets, **flags))
    return time.perf_counter() - began


def judge(run: RunDir) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Figures of each method, and the masked ranks of all test users."""
    stage = evaluate_run(run, configs.EvalConfig(methods=METHODS, bootstrap=100))
    result = read_result(stage)
    rows = {**result["methods"], **result["controls"]}
    figures = {
        name: {metric: row[metric] for metric in METRICS}
        | {f"{metric}_masked": row["masked"][metric] for metric in METRICS}
        for name, row in rows.items()
    }
    ranks = load_file(stage.file(RANKS))
    return figures, {name: ranks[f"{name}/masked"] for name in METHODS}


def measure(source: RunDir, folder: Path, options: argparse.Namespace) -> dict:
    old = make_data(source, folder / "old", older(source, options.share))
    seconds = {"older": train(old, options.size, options.set)}
    everything = np.ones(len(load_data(source)[1].log), bool)
    found = {}
    for name in ("updated", "anew"):
        run = make_data(source, folder / name, everything)
        began = time.perf_counter()
        update(old, run) if name == "updated" else train(run, options.size, options.set)
        seconds[name] = time.perf_counter() - began
        found[name] = judge(run)
    difference = {
        name: paired_difference(found["updated"][1][name], found["anew"][1][name]).as_dict()
        for name in METHODS
    }
    return {
        "logs": {
            name: {
                key: RunDir(folder / name).stage("data").json("statistics.json")[key]
                for key in ("users", "items", "interactions")
            }
            for name in ("old", "updated")
        },
        "accuracy": {name: figures for name, (figures, _) in found.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["anew"] / seconds["updated"], 2),
        "updated_less_anew_ndcg@10_masked": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run with a data stage")
    parser.add_argument("--share", type=float, default=0.8, help="of the log that is older")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--set", action="append", default=[], help="stage.key=value of both")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/update.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamctl-update-") as folder:
        measured = measure(RunDir(options.run), Path(folder), options)
    receipt = {"name": "update", "run": options.run.resolve().name, "share": options.share}
    receipt |= {"size": options.size, "sets": options.set, "seed": 0, **measured, **provenance()}
    if options.save:
        RECEIPT.write_text(json.dumps(receipt, indent=1) + "\n")
    if options.json:
        print(json.dumps(receipt, indent=1))


if __name__ == "__main__":
    main()
