"""What each part of thinking with evidence brings: one change at a time, on a run's test users.

    streamctl reproduce runs/beauty --size tiny
    python benchmarks/thinker.py runs/beauty --save beauty

Rows change parts, hops, lengths or orders of seed 0's SFT, for a sample of `--users` test users,
with seen items masked. `--train` also trains policies that know the first
hops alone, in RUN/hops: a hop that is taken from a policy which learned with it is missed more.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from receipts import head

from streamctl import config as configs
from streamctl.config import EvalConfig
from streamctl.decode.evidence import FULL, EvidenceRecommender
from streamctl.evaluation.makers import MAKERS
from streamctl.evaluation.methods import Models, known_rows
from streamctl.ranking import evaluate, paired_difference, sample_users
from streamctl.retrieval.evidence import HOPS
from streamctl.retrieval.memory import Memory
from streamctl.retrieval.transitions import REACH, Transitions
from streamctl.runs import RunDir

LENGTHS = (0, 1, 2, 4, 8, 16, 32, 64)
KEPT = (0, 256, 64, 16)  # pairs of an item; 0: all. Evidence keeps 1,024, and twice the rows
PARTS = ("weights_alone", "codes_alone")
STAGES = ("tokenizer", "pretrain", "annotate", "sft", "rl")


def first_hops(count):
    return "first hop" if count == 1 else f"first {count} hops"


def trained(run, seed, count):
    """The thinker after SFT of a run like seed 0's, whose policy knows the first hops alone."""
    job = RunDir(run.path / "hops" / f"first-{count}")
    for stage in ("data", "tokenizer"):
        seed.copy(stage, job)
    for stage in ("pretrain", "annotate", "sft"):
        manifest = seed.stage(stage).manifest
        make, cls = MAKERS[stage]
        config = configs.resolve(cls, base=manifest["config"])
        if stage == "pretrain":
            hops = tuple(size * (n < count) for n, size in enumerate(manifest["hops"]))
            config = dataclasses.replace(config, hops=hops)
        make(job, config, device="cpu")
    return Models(job, EvalConfig(), None, "cpu").reasoning("sft")


class Changes:
    """Rows that change one thing about seed 0's SFT; their intervals are less the whole policy."""

    def __init__(self, run, users):
        self.models = Models(run, EvalConfig(), None, "cpu")
        split = self.models.split
        self.users, self.n_items = sample_users(split.test, users, 0), split.n_items
        self.rows, self.whole = [], None

    def add(self, name, method, l=FULL):  # noqa: E741
        began = time.perf_counter()
        found = evaluate(method, self.users, n_items=self.n_items, masked=True)
        if self.whole is None:
            self.whole = found.ranks
        less = paired_difference(found.ranks, self.whole)
        self.rows.append(
            {
                "method": name, "l": l, "users": len(self.users), "ms_per_user": None,
                "ndcg@10_masked": found.metrics["ndcg@10"], "vs_whole": [less.low, less.high],
            }
        )  # fmt: skip
        took = time.perf_counter() - began
        print(f"{name:18} l={l} {found.metrics['ndcg@10']:.4f}, {took:.0f} s", flush=True)

    def all(self):
        known = known_rows(self.models.run)
        thinker = self.models.reasoning("sft")
        self.add("whole", thinker)
        ms = self.milliseconds()
        for name in PARTS:
            self.add(name, known[name].make(self.models))
        for l in LENGTHS:  # noqa: E741
            thinker.think = l
            self.add("length", thinker, l=l)
        sizes = self.models.material.hops
        for number, hop in enumerate(HOPS):
            if sizes[number]:
                self.add(f"without {hop}", self.with_hops({**dict(enumerate(sizes)), number: 0}))
        for count in range(1, sum(size > 0 for size in sizes)):
            first = {place: size * (place < count) for place, size in enumerate(sizes)}
            self.add(first_hops(count), self.with_hops(first))
        for pairs in KEPT:
            kept = f"{pairs:,} pairs" if pairs else "all pairs"
            self.add(f"{kept} and rows of an item", self.with_bounds(pairs))
        for order in ("strength", "random"):
            self.add(f"{order} order", Ordered(self.models.reasoning("sft"), order), l=8)
        for row in self.rows:
            if row["method"] in ("whole", "length"):
                row["ms_per_user"] = ms[row["l"]]

    def milliseconds(self):
        """Of a user, for each length: medians of three rounds over all lengths, 1,000 users."""
        thinker, rounds = self.models.reasoning("sft"), []
        users = sample_users(self.users, 1000, 0)
        for _ in range(3):
            rounds.append([])
            for thinker.think in LENGTHS:
                found = evaluate(thinker, users, n_items=self.n_items, masked=True)
                rounds[-1].append(found.ms_per_user)
        return dict(zip(LENGTHS, np.median(rounds, 0).tolist(), strict=True))

    def with_hops(self, sizes):
        """The thinker of SFT with other hops; it was trained with all of them."""
        thinker = self.models.reasoning("sft")
        evidence = object.__new__(type(thinker.evidence))
        sizes = tuple(size for _, size in sorted(sizes.items()))
        evidence.__dict__ = {**thinker.evidence.__dict__, "sizes": sizes, "_scratch": []}
        return EvidenceRecommender(thinker.policy, thinker.trie, evidence)

    def with_bounds(self, pairs):
        """The thinker of SFT with so many pairs kept of an item, and twice as many rows."""
        thinker = self.models.reasoning("sft")
        evidence = object.__new__(type(thinker.evidence))
        evidence.__dict__ = {**thinker.evidence.__dict__, "_scratch": []}
        items, offsets = self.models.split.training_sequences()
        pairs = pairs or len(items) * REACH
        worth = evidence._worth
        evidence.transitions = Transitions.count(items, offsets, self.n_items, pairs, worth)
        evidence.memory = Memory.index(items, offsets, self.n_items, 2 * pairs, worth=worth)
        return EvidenceRecommender(thinker.policy, thinker.trie, evidence)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run that `streamctl reproduce` has gone through")
    parser.add_argument("--users", type=int, default=6000, help="sample for rows of one change")
    parser.add_argument("--train", action="store_true", help="train with the first hops alone, too")
    parser.add_argument("--save", metavar="NAME", help="results/thinker-NAME.json")
    args = parser.parse_args()
    run = RunDir(args.run)
    seed = RunDir(run.path / "reproduce" / "seed-0")
    changes = Changes(seed, args.users)
    changes.all()
    if args.train:
        for count in range(1, sum(size > 0 for size in changes.models.material.hops)):
            changes.add(f"trained with the {first_hops(count)}", trained(run, seed, count))
    words = ["RUN" if word == str(args.run) else word for word in sys.argv[1:]]
    receipt = {
        **head(f"thinker-{args.save or args.run.name}"),
        "command": " ".join(("python benchmarks/thinker.py", *words)),
        "protocol": "leave-one-out, full catalogue; validation picks epochs and the trust in codes",
        "config": {stage: seed.stage(stage).manifest["config"] for stage in STAGES},
        "data_hash": seed.stage("data").hash,
        "rows": changes.rows,
    }
    if args.save:
        path = Path(__file__).parent / "results" / f"thinker-{args.save}.json"
        path.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
