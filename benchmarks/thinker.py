"""What thinking with evidence brings: every stage, part, hop and length, on a run's test users.

    python benchmarks/thinker.py runs/beauty --save beauty

Needs a run with pretrain, annotate, sft and rl; baselines that it has are rows, too. Figures are
of all test users, with seen items left in and masked; `--users` takes a sample for the rows that
vary one thing (parts, hops, lengths, orders). One seed a run.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from timing import provenance

from streamctl.config import EvalConfig
from streamctl.decode.evidence import FULL, EvidenceRecommender
from streamctl.evaluation.methods import Models, known_rows
from streamctl.ranking import evaluate, paired_difference, sample_users
from streamctl.retrieval.evidence import HOPS
from streamctl.runs import RunDir

LENGTHS = (0, 1, 2, 4, 8, 16, 32, 64)
MAIN = (
    "popularity", "transitions", "knn", "ranker", "sasrec_ce", "tiger", "stream_pt", "stream_sft",
    "stream_rl", "l0", "random_evidence",
)  # fmt: skip
NAMES = {"random_evidence": "random"}
RIVALS = ("transitions", "knn", "ranker", "tiger", "sasrec_ce", "l0", "random")
PARTS = ("weights_alone", "codes_alone")


class Table:
    """Rows and the ranks that they are paired by."""

    def __init__(self, run, examples, some, seed):
        self.run, self.examples, self.some, self.seed = run, examples, some, seed
        self.rows, self.ranks = [], {}

    def add(self, name, method, *, l=None, part=False, stage=None):  # noqa: E741
        """Evaluate a method; `part`: on the sample of users, masked alone."""
        users = self.some if part else self.examples
        began = time.perf_counter()
        masked = evaluate(method, users, n_items=self.run.n_items, masked=True)
        row = {"method": name, "l": l, "seeds": [self.seed], "users": len(users)}
        row["ndcg@10_masked"] = masked.metrics["ndcg@10"]
        row["recall@10_masked"] = masked.metrics["recall@10"]
        row["ms_per_user"] = masked.ms_per_user
        if not part:
            plain = evaluate(method, users, n_items=self.run.n_items, masked=False)
            row |= {key: plain.metrics[key] for key in ("recall@5", "ndcg@5", "recall@10")}
            row["ndcg@10"] = plain.metrics["ndcg@10"]
        if stage is not None:
            row |= stage
        self.rows.append(row)
        self.ranks[name, l] = masked.ranks
        print(
            f"{name:18} l={l} masked {row['ndcg@10_masked']:.4f} plain {row.get('ndcg@10', 0):.4f} "
            f"{row['ms_per_user']:.2f} ms, {time.perf_counter() - began:.0f} s",
            flush=True,
        )

    def pair(self):
        """95% intervals of the stages' masked ndcg@10 less their rivals'."""
        for row in self.rows:
            mine = self.ranks[row["method"], row["l"]]
            for rival in RIVALS:
                other = next((r for (name, _), r in self.ranks.items() if name == rival), None)
                if (
                    row["method"].startswith("stream")
                    and other is not None
                    and rival != row["method"]
                ) and len(other) == len(mine):
                    row[f"vs_{rival}"] = paired_difference(mine, other).as_dict()


def trained(run, name):
    """Prefixes a stage saw and seconds it took."""
    stages = {
        "tiger": ("baselines/tiger",), "sasrec_ce": ("baselines/sasrec_ce",),
        "ranker": ("baselines/ranker",), "transitions": ("baselines/transitions",),
        "knn": ("baselines/knn",), "stream_pt": ("pretrain",), "l0": ("pretrain",),
        "stream_sft": ("pretrain", "annotate", "sft"),
        "stream_rl": ("pretrain", "annotate", "sft", "rl"),
    }.get(name, ())  # fmt: skip
    made = [run.stage(stage) for stage in stages if run.stage(stage).complete]
    return {"train_s": round(sum(stage.manifest["wall_s"] for stage in made), 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=6000, help="sample for rows of one change")
    parser.add_argument("--main-only", action="store_true")
    parser.add_argument("--save", metavar="NAME", help="results/thinker-NAME.json")
    args = parser.parse_args()
    run = RunDir(args.run)
    models = Models(run, EvalConfig(), None, "cpu")
    split, known = models.split, known_rows(run)
    run.n_items = split.n_items
    seed = run.stage("pretrain").manifest["config"]["seed"]
    table = Table(run, split.test, sample_users(split.test, args.users, 0), seed)
    for name in MAIN:
        if name in known and all(run.stage(stage).complete for stage in known[name].stages):
            l = {"stream_sft": FULL, "stream_rl": FULL}.get(name)  # noqa: E741
            table.add(
                NAMES.get(name, name), known[name].make(models), l=l, stage=trained(run, name)
            )
    table.pair()
    if not args.main_only:
        for name in PARTS:
            table.add(name, known[name].make(models), l=FULL, part=True)
        thinker = models.reasoning("sft")
        for l in LENGTHS:  # noqa: E741
            thinker.think = l
            table.add("length", thinker, l=l, part=True)
        for number, hop in enumerate(HOPS):
            own = models.reasoning("sft")
            sizes = list(own.evidence.sizes)
            if sizes[number]:
                sizes[number] = 0
                table.add(f"without {hop}", _with(models, sizes), l=FULL, part=True)
        for count in range(1, 6):
            sizes = [
                size if place < count else 0 for place, size in enumerate(models.material.hops)
            ]
            table.add(f"first {count} hops", _with(models, sizes), l=FULL, part=True)
        for order in ("strength", "random"):
            table.add(f"{order} order", Ordered(models.reasoning("sft"), order), l=8, part=True)
    receipt = {
        **provenance(f"thinker-{args.save or args.run.name}"),
        "command": f"python benchmarks/thinker.py RUN --users {args.users}",
        "protocol": "leave-one-out, full catalogue, no re-ranker; validation: epochs, trust",
        "config": {
            stage: run.stage(stage).manifest["config"]
            for stage in ("tokenizer", "pretrain", "annotate", "sft", "rl")
        },
        "data": run.stage("data").manifest.get("files"),
        "rows": table.rows,
    }
    if args.save:
        path = Path(__file__).parent / "results" / f"thinker-{args.save}.json"
        path.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


def _with(models, sizes):
    """The thinker of SFT with other hops; trained with all of them."""
    thinker = models.reasoning("sft")
    evidence = thinker.evidence
    changed = object.__new__(type(evidence))
    changed.__dict__ = {**evidence.__dict__, "sizes": tuple(sizes), "_scratch": []}
    return EvidenceRecommender(thinker.policy, thinker.trie, changed)


class Ordered(EvidenceRecommender):
    """The thought of the strongest pieces by hop order, or of any, instead of the heaviest."""

    def __init__(self, thinker, order):
        self.__dict__ = dict(thinker.__dict__)
        self.order = order
        self.think = 8

    def weighed(self, histories, users):
        found = super().weighed(histories, users)
        place = torch.arange(found.items.shape[1]).expand_as(found.items)
        if self.order == "random":
            place = torch.from_numpy(np.random.default_rng(0).random(found.items.shape)).argsort(1)
        keep = (place < self.think) & (found.items >= 0)
        return type(found)(found.items, found.hops, found.logits.masked_fill(~keep, -torch.inf))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
