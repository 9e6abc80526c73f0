"""The same small search for every trained method: would other settings have done better?

    streamctl reproduce runs/scientific --size tiny --set ...
    python benchmarks/search.py runs/scientific --json --save

Starts from the settings of the run's table (seed 0). Each of a few settings is changed alone, then
the changes that gained are made together. One half of the validation users chooses (masked
ndcg@10), the other half judges: `gain` is its paired 95% interval of the choice over the table's
settings. Test users are not read. Writes results/search-NAME.json, where the rows of methods that
`--methods` leaves out stay; trains in RUN/search and goes on where it was interrupted.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from receipts import RESULTS, finish, head, parser

from streamctl.baselines.train import train_baseline
from streamctl.config import BaselineConfig, EvalConfig, SftConfig, resolve
from streamctl.evaluation.methods import Models
from streamctl.files import read_json
from streamctl.ranking import evaluate, gains, paired_difference
from streamctl.runs import RunDir
from streamctl.training.sft import sft

RATES = (1 / 3, 3)  # times the table's
# What is tried of each method beside its learning rate.
TRIED = {
    "ranker": {},
    "caser": {"dropout": (0.3, 0.7), "dim": (128,)},
    "gru4rec": {"dropout": (0.1, 0.5), "dim": (64, 256)},
    "bert4rec": {"dropout": (0.1, 0.4), "mask": (0.2, 0.6)},
    "sasrec_bce": {"dropout": (0.1, 0.5), "dim": (128,)},
    "sasrec_ce": {"dropout": (0.1, 0.5), "dim": (128,)},
    "tiger": {"dropout": (0.0, 0.2)},
    "stream_sft": {"dropout": (0.1, 0.3), "weigh_weight": (3.0,)},
}
STAGES = ("data", "tokenizer", "pretrain", "annotate")


class Search:
    """Trains a method with some settings changed, and ranks the validation users."""

    def __init__(self, run):
        self.seed, self.folder = RunDir(run.path / "reproduce" / "seed-0"), run.path / "search"

    def stage(self, method):
        return self.seed.stage("sft" if method == "stream_sft" else f"baselines/{method}")

    def config(self, method):
        """The table's settings of a method."""
        cls = SftConfig if method == "stream_sft" else BaselineConfig
        return resolve(cls, base=self.stage(method).manifest["config"])

    def ranks(self, method, changes):
        """Ranks of the validation users' targets, and the seconds that the training took."""
        job = self.seed
        if changes:
            name = ",".join(f"{key}={value:g}" for key, value in changes.items())
            job = RunDir(self.folder / method / name)
            config = dataclasses.replace(self.config(method), **changes)
            for stage in STAGES:
                if self.seed.stage(stage).complete:
                    self.seed.copy(stage, job)
            made = sft if method == "stream_sft" else train_baseline
            made(job, config, device="cpu")
        models = Models(job, EvalConfig(), None, "cpu")
        split = models.split
        if method == "stream_sft":
            recommender = models.reasoning("sft")
        else:
            recommender = models.tiger() if method == "tiger" else models.baseline(method)
        found = evaluate(recommender, split.valid, n_items=split.n_items, masked=True)
        stage = job.stage(self.stage(method).name)
        return found.ranks, stage.manifest["wall_s"]

    def row(self, method):
        """What was tried of a method, what the choosing half chose, and what the other says."""
        base, tried = self.config(method), []

        def attempt(changes):
            began = time.perf_counter()
            ranks, seconds = self.ranks(method, changes)
            choosing = np.arange(len(ranks)) % 2 == 0
            tried.append((changes, ranks[choosing], ranks[~choosing], seconds))
            figures = [gains(half, 10).mean() for half in tried[-1][1:3]]
            took = time.perf_counter() - began
            print(
                f"{method:12} {changes} {figures[0]:.4f} {figures[1]:.4f}, {took:.0f} s", flush=True
            )
            return figures[0]

        usual, better = attempt({}), {}
        options = {"lr": tuple(base.lr * times for times in RATES), **TRIED[method]}
        for key, values in options.items():
            found = max((attempt({key: value}), value) for value in values)
            if found[0] > usual:
                better[key] = found[1]
        if len(better) > 1:
            attempt(better)
        changes, _, judged, _ = max(tried, key=lambda each: gains(each[1], 10).mean())
        gain = paired_difference(judged, tried[0][2])
        return {
            "method": method,
            "table": {key: getattr(base, key) for key in options},
            "chosen": changes,
            "ndcg@10_masked": float(gains(judged, 10).mean()),
            "table_ndcg@10_masked": float(gains(tried[0][2], 10).mean()),
            "gain": [gain.low, gain.high],
            "tried": [
                {
                    "changes": changes,
                    "choosing": float(gains(first, 10).mean()),
                    "judging": float(gains(second, 10).mean()),
                    "train_s": seconds,
                }
                for changes, first, second, seconds in tried
            ],
        }


def main():
    options = parser(__doc__)
    options.add_argument("run", type=Path, help="a run that `streamctl reproduce` has gone through")
    options.add_argument("--methods", default=",".join(TRIED), help="some of them")
    options = options.parse_args()
    run, began = RunDir(options.run), time.monotonic()
    search, data_hash = Search(run), run.stage("data").hash
    receipt = head(f"search-{options.run.name}")
    path, rows = RESULTS / f"{receipt['name']}.json", {}
    if path.exists():
        before = read_json(path)
        if before["data_hash"] == data_hash:
            rows = {row["method"]: row for row in before["rows"]}
    for method in options.methods.split(","):
        rows[method] = search.row(method)
    receipt |= {
        "data_hash": data_hash,
        "protocol": "seed 0, masked ndcg@10; even validation users choose, odd ones judge",
        "rows": [rows[method] for method in TRIED if method in rows],
        "wall_s": round(time.monotonic() - began, 1),
    }
    finish(receipt, options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
