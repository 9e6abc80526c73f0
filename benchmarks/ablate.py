"""Ablations of the slow thinkers on validation, a line each, with paired intervals.

    python benchmarks/ablate.py RUN                      every line; or name them with --lines
    python benchmarks/ablate.py RUN --lines "no L_DPO,l = 2"

A line is the run's own model with one thing changed: the stages before the change are taken over,
those from it on are trained again with the run's settings, in RUN/ablations/. Test users are never
looked at. Lines done gather in results/ablations-NAME.json and are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamctl import config as configs
from streamctl.data import load_data
from streamctl.evaluation.compare import bootstrap_mean
from streamctl.evaluation.evaluate import Recommender, evaluate
from streamctl.evaluation.methods import Models
from streamctl.evaluation.metrics import gains
from streamctl.runs import RunDir, provenance
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.evidence import evidence
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import TWIN, sft

RESULTS = Path(__file__).parent / "results"
STAGES: dict[str, tuple[type, Callable[..., Any]]] = {
    "tokenizer": (configs.TokenizeConfig, tokenize),
    "pretrain": (configs.PretrainConfig, pretrain),
    "annotate": (configs.AnnotateConfig, annotate),
    "sft": (configs.SftConfig, sft),
    "rl": (configs.RlConfig, rl),
    TWIN: (configs.SftConfig, partial(sft, twin=True)),
    # With other settings of the thought alone, the ranker is not trained again.
    "evidence": (configs.EvidenceConfig, partial(evidence, force=True)),
}
PATHS = {  # the stages up to a last one
    "sft": ("data", "tokenizer", "pretrain", "annotate", "sft"),
    "rl": ("data", "tokenizer", "pretrain", "annotate", "sft", "rl"),
    TWIN: ("data", "tokenizer", "pretrain", TWIN),
    "evidence": ("data", "tokenizer", "evidence"),
}
REFERENCES = {  # the line that those of the same last stage are compared with
    "sft": "SFT as configured",
    TWIN: "SFT as configured",
    "rl": "RL as configured",
    "evidence": "evidence by the sum",
}


@dataclass(frozen=True)
class Line:
    """What is changed, the first stage that is trained again for it, and the last one.

    Attributes:
        sets: `stage.key=value`; empty for the run as it is.
        first, last: stages; the last one's model is evaluated, a policy thinking greedily.
        mode: decoding of the evaluated policy.
    """

    sets: tuple[str, ...] = ()
    first: str | None = None
    last: str = "sft"
    mode: str = "greedy"


def _sft(name: str) -> Line:
    return Line((f"sft.{name}=0",), "sft")


def _reward(name: str) -> Line:
    return Line((f"rl.{name}_weight=0",), "rl", "rl")


def _evidence(setting: str) -> Line:
    """By the sum: the reader learns from the users that these lines are judged by."""
    return Line(("evidence.reader=false", f"evidence.{setting}"), "evidence", "evidence")


LINES = {
    "SFT as configured": Line(),
    "joint beam over thoughts and codes": Line(mode="joint"),
    "marginal over 8 sampled thoughts": Line(mode="marginal"),
    "no L_DPO": _sft("dpo_weight"),
    "no L_Quant": _sft("quant_weight"),
    "no L_State": _sft("state_weight"),
    "no corrupted thoughts": _sft("corrupt"),
    "l = 0": Line((), TWIN, TWIN),
    **{
        f"l = {length}": Line((f"annotate.length={length}",), "annotate")
        for length in (1, 2, 3, 5, 6, 7, 8)
    },
    "literal annotation": Line(("annotate.mode=literal",), "annotate"),
    "1 round": Line(("sft.rounds=1",), "sft"),
    "RL as configured": Line(last="rl"),
    **{
        f"no {name} reward": _reward(name)
        for name in ("format", "exact", "similarity", "likelihood", "ranking")
    },
    "no thinking rewards": Line(("rl.likelihood_weight=0", "rl.ranking_weight=0"), "rl", "rl"),
    "think codebook of 64": Line(("pretrain.think_codebook=64",), "pretrain"),
    "softmax over the vocabulary": Line(("pretrain.softmax=vocabulary",), "pretrain"),
    "history as codes": Line(("pretrain.history=codes",), "pretrain"),
    "collaborative tokenizer": Line(("tokenize.collaborative=1",), "tokenizer"),
    "RQ-KMeans": Line(("tokenize.method=rqkmeans",), "tokenizer"),
    "3 levels and a dedup digit": Line(
        ("tokenize.levels=3", "tokenize.collisions=dedup"), "tokenizer"
    ),
    "evidence by the sum": Line(("evidence.reader=false",), "evidence", "evidence"),
    **{f"at most {count} look-ups": _evidence(f"look_ups={count}") for count in (1, 2, 8)},
    **{f"{count} rows a look-up": _evidence(f"neighbours={count}") for count in (5, 10, 50, 100)},
}


def _train(run: RunDir, line: Line, folder: Path) -> RunDir:
    """A run with the line's change, finished up to its last stage."""
    job = RunDir(folder)
    path = PATHS[line.last]
    fresh = path.index(line.first) if line.first else len(path)
    for place, name in enumerate(path):
        own = run.stage(name)
        if own.complete and not job.stage(name).complete and (place < fresh or name == "evidence"):
            shutil.copytree(own.path, job.stage(name).path, dirs_exist_ok=True)
        if place >= fresh:
            cls, function = STAGES[name]
            base = (run.stage("sft") if name == TWIN else own).manifest["config"]
            function(job, configs.resolve(cls, base=base, sets=line.sets))
    return job


def _recommender(models: Models, line: Line) -> Recommender:
    if line.last == "evidence":
        return models.evidence()
    if line.last == TWIN:
        return models.generative(TWIN)
    return replace(models.thinking(line.last), mode=line.mode)


def measure(run: RunDir, name: str, users: int) -> tuple[dict[str, Any], np.ndarray]:
    """(figures of a line on validation, each user's gain in ndcg@10)."""
    line = LINES[name]
    job = run
    if line.first:
        job = _train(run, line, run.path / "ablations" / name.replace(" ", "_"))
    split = load_data(job)[1]
    examples = split.valid.subset(np.arange(min(users or len(split.valid), len(split.valid))))
    models = Models(job, configs.EvalConfig(split="valid"), examples, "auto")
    recommender = _recommender(models, line)
    found = evaluate(recommender, examples, n_items=split.n_items, masked=False, title=name)
    stage = job.stage(line.last)
    figures = {key: found.metrics[key] for key in ("recall@10", "ndcg@10")}
    row = {"line": name, "sets": list(line.sets), "stage": line.last, "mode": line.mode, **figures}
    if line.last == "rl":  # the kept step is often the first one: what training did shows here
        row["validations"] = stage.json("report.json")["validations"]
    return row | {
        "ms_per_user": found.ms_per_user,
        "wall_s": stage.manifest["wall_s"] if line.first else None,
    }, gains(found.ranks, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--lines", help="comma-separated; default: all")
    parser.add_argument("--users", type=int, default=0, help="the first so many; 0: all")
    options = parser.parse_args()
    run = RunDir(options.run)
    path = RESULTS / f"ablations-{run.path.resolve().name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    gained: dict[str, np.ndarray] = {}
    base = partial(measure, run, users=options.users)
    for name in options.lines.split(",") if options.lines else LINES:
        if name in [row["line"] for row in rows]:
            continue
        row, gain = base(name)
        reference = REFERENCES[LINES[name].last]
        if reference not in gained:
            gained[reference] = gain if name == reference else base(reference)[1]
        interval = bootstrap_mean(gain - gained[reference])
        rows.append(row | {"reference": reference, "difference": [interval.low, interval.high]})
        result = {"name": "ablations", "data_hash": run.stage("data").hash, "split": "valid"}
        result |= {"users": len(gain), "rows": rows, **provenance()}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
