"""What looking evidence up does for baselines: memory, questions and choice, given to them.

    python benchmarks/aids.py RUN --methods sasrec_ce,tiger --json --save

after `streamctl reproduce RUN`. A baseline is put in the ranker's place: its own states fill the
memory, its own validation users choose the repeat term and the questions (`training/thought.py`)
and train the reader of what is found (`training/reading.py`).
SASRec ranks by products of its state, as the ranker does. TIGER asks by the mean of its encoder's
states (d_0) and ranks by its beam; an item outside of it counts as the last one inside. Rows: the
baseline as it is, read without look-ups, read with each number of them; paired intervals over the
test users of every row less the row before it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from streamctl.baselines.base import Baseline, last_states
from streamctl.baselines.registry import baseline_class
from streamctl.config import EvidenceConfig
from streamctl.decode.beam import recommend
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker
from streamctl.device import autocast
from streamctl.evaluation.compare import bootstrap_mean
from streamctl.evaluation.evaluate import evaluate, sample_users
from streamctl.evaluation.jobs import job_path
from streamctl.evaluation.metrics import gains
from streamctl.model.ranker import StateRanker
from streamctl.runs import RunDir, provenance
from streamctl.training.evidence import (
    CHOOSING_USERS,
    READING_USERS,
    TEXTS,
    build_memory,
    look_alikes,
)
from streamctl.training.material import Material
from streamctl.training.reading import learn
from streamctl.training.thought import Chooser, choose

RESULTS = Path(__file__).parent / "results"
BEAM = 200  # of TIGER: the items that it has an opinion of


class Sasrec:
    """A trained SASRec behind the interface of `model.ranker.StateRanker`."""

    repeat = torch.zeros(())
    opinion = staticmethod(StateRanker.opinion)

    def __init__(self, sasrec: Baseline, item_tokens: torch.Tensor):
        self.sasrec, self.item_tokens = sasrec, item_tokens
        self.shape = SimpleNamespace(width=sasrec.items.weight.shape[1])

    def item_vectors(self) -> torch.Tensor:
        return self.sasrec.items.weight.detach()

    @torch.no_grad()
    def states(self, history: torch.Tensor) -> torch.Tensor:
        return last_states(self.sasrec.states(history), history).float()


class Tiger:
    """A trained TIGER behind the same interface."""

    repeat = torch.zeros(())

    def __init__(self, tiger: Baseline, item_tokens: torch.Tensor):
        self.policy, self.trie, self.item_tokens = tiger.policy, tiger.trie, item_tokens
        self.shape = SimpleNamespace(width=self.policy.config.d_model)
        # A history's beam: it is asked for at every step of the choice and by every row.
        self._beams: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    def item_vectors(self) -> torch.Tensor:
        return torch.zeros(len(self.item_tokens), 0)

    @torch.no_grad()
    def states(self, history: torch.Tensor) -> torch.Tensor:
        with autocast(history.device):
            return self.policy.encode(history).mean()

    def opinion(
        self, state: torch.Tensor, vectors: torch.Tensor, history: torch.Tensor
    ) -> torch.Tensor:
        keys = [row[row >= 0].numpy().tobytes() for row in history]
        new = [number for number, key in enumerate(keys) if key not in self._beams]
        if new:
            found, _ = recommend(
                self.policy, self.trie, history[new], BEAM, beam=BEAM, decoder="direct"
            )
            rows = zip(found.items.int(), found.scores, strict=True)
            self._beams |= {keys[number]: row for number, row in zip(new, rows, strict=True)}
        items, values = (
            torch.stack(part) for part in zip(*map(self._beams.get, keys), strict=True)
        )
        floor = values.masked_fill(items < 0, torch.inf).amin(1, keepdim=True)
        scores = floor.repeat(1, len(vectors) + 1)  # items that are none go to the last column
        scores.scatter_(1, items.long() % scores.shape[1], values)
        return scores[:, :-1]


METHODS = {"sasrec_ce": ("sasrec", Sasrec), "tiger": ("tiger", Tiger)}


def measure(run: RunDir, method: str, seed: int) -> dict[str, dict[str, object]]:
    """Rows by name for one seed, each with its ranks of all test users."""
    material = Material.load(run)
    split = material.split
    name, facade = METHODS[method]
    stage = job_path(run, method, seed).require(f"baselines/{name}")
    ranker = facade(baseline_class(name).load(stage).eval(), material.item_tokens)
    memory = build_memory(ranker, split, "flat")
    config, alike = EvidenceConfig(), look_alikes(material)
    sample = sample_users(split.valid, CHOOSING_USERS, seed)
    chooser = Chooser(
        ranker, memory, alike, sample, neighbours=config.neighbours, look_ups=config.look_ups
    )
    settings, _ = choose(chooser)
    users = sample_users(split.valid, READING_USERS, seed)
    thinker = EvidenceThinker(ranker, memory, settings, alike)
    texts = run.stage("tokenizer").array(TEXTS)
    reader = learn(thinker, users, texts, split.popularity(), seed).reader
    rows = {method: EvidenceThinker(ranker, memory, EvidenceSettings(), alike)}
    for count in range(config.look_ups + 1):
        rows[f"{method}_l{count}"] = EvidenceThinker(
            ranker, memory, settings, alike, look_ups=count, reader=reader
        )
    found = {}
    for row, thinker in rows.items():
        done = [
            evaluate(thinker, split.test, n_items=split.n_items, masked=masked, title=row)
            for masked in (False, True)
        ]
        found[row] = {
            "recall@10": done[0].metrics["recall@10"],
            "ndcg@10": done[0].metrics["ndcg@10"],
            "ndcg@10_masked": done[1].metrics["ndcg@10"],
            "ms_per_user": done[0].ms_per_user,
            "gained": gains(done[0].ranks, 10),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/aids-NAME.json")
    options = parser.parse_args()
    began = time.monotonic()
    run = RunDir(options.run)
    rows = []
    for method in options.methods.split(","):
        seeds = [measure(run, method, seed) for seed in range(options.seeds)]
        before = None
        for name in seeds[0]:
            own = [seed[name] for seed in seeds]
            gained = np.mean([entry.pop("gained") for entry in own], axis=0)
            row = {"method": name, "seeds": len(own)}
            row |= {key: float(np.mean([entry[key] for entry in own])) for key in own[0]}
            if before is not None:
                interval = bootstrap_mean(gained - before)
                row["vs_row_before"] = [interval.low, interval.high]
            rows.append(row)
            before = gained
    result = {"name": "aids", "data_hash": run.stage("data").hash, "rows": rows}
    result |= {"wall_s": round(time.monotonic() - began, 1), **provenance()}
    name = options.run.resolve().name
    if options.save:
        (RESULTS / f"aids-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
