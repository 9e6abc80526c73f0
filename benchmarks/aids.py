"""What looking evidence up does for a baseline: SASRec given the memory, the questions, the choice.

    python benchmarks/aids.py RUN --seeds 1 --json --save      after `streamctl reproduce RUN`

SASRec ranks by a state and item vectors, as the evidence thinker does, so it is put in the ranker's
place: its own states fill the memory, its own validation users choose the repeat term and the
questions (`training/thought.py`). Rows: SASRec as it is, with the repeat term, with each number of
look-ups; paired intervals over the test users of every row less the row before it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from streamctl.baselines.base import last_states
from streamctl.baselines.registry import baseline_class
from streamctl.config import EvidenceConfig
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker
from streamctl.evaluation.compare import bootstrap_mean
from streamctl.evaluation.evaluate import evaluate, sample_users
from streamctl.evaluation.jobs import job_path
from streamctl.evaluation.metrics import gains
from streamctl.runs import RunDir, provenance
from streamctl.training.evidence import CHOOSING_USERS, build_memory, look_alikes
from streamctl.training.material import Material
from streamctl.training.thought import Chooser, choose

RESULTS = Path(__file__).parent / "results"


class Ranker:
    """A trained SASRec behind the interface of `model.ranker.StateRanker`."""

    def __init__(self, sasrec: torch.nn.Module, item_tokens: torch.Tensor):
        self.sasrec, self.item_tokens = sasrec, item_tokens
        self.shape = SimpleNamespace(width=sasrec.items.weight.shape[1])
        self.repeat = torch.zeros(())

    def item_vectors(self) -> torch.Tensor:
        return self.sasrec.items.weight.detach()

    @torch.no_grad()
    def states(self, history: torch.Tensor) -> torch.Tensor:
        return last_states(self.sasrec.states(history), history).float()


def measure(run: RunDir, seed: int) -> dict[str, dict[str, object]]:
    """Rows by name for one seed, each with its ranks of all test users."""
    material = Material.load(run)
    split = material.split
    stage = job_path(run, "sasrec_ce", seed).require("baselines/sasrec")
    ranker = Ranker(baseline_class("sasrec").load(stage).eval(), material.item_tokens)
    memory = build_memory(ranker, split, "flat")
    config, alike = EvidenceConfig(), look_alikes(material)
    sample = sample_users(split.valid, CHOOSING_USERS, seed)
    chooser = Chooser(
        ranker, memory, alike, sample, neighbours=config.neighbours, look_ups=config.look_ups
    )
    settings, _ = choose(chooser)
    plain = EvidenceThinker(ranker, memory, EvidenceSettings(), alike)
    rows = {"sasrec_ce": plain}
    for count in range(config.look_ups + 1):
        rows[f"sasrec_ce_l{count}"] = EvidenceThinker(
            ranker, memory, settings, alike, look_ups=count
        )
    found = {}
    for name, thinker in rows.items():
        done = [
            evaluate(thinker, split.test, n_items=split.n_items, masked=masked, title=name)
            for masked in (False, True)
        ]
        found[name] = {
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
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/aids-NAME.json")
    options = parser.parse_args()
    began = time.monotonic()
    run = RunDir(options.run)
    seeds = [measure(run, seed) for seed in range(options.seeds)]
    rows, before = [], None
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
