"""What thinking and searching cost and bring: the think curve, and what a beam loses.

`think_curve`  ndcg@10 against milliseconds for thoughts of 0, 1, 2, 4, ... and the controls: random
               thoughts of the same lengths, and wider beams without a thought.
`beam_losses`  beams of 20 and 50 beside the true top-k.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from streamctl.config import EvalConfig
from streamctl.data import Examples
from streamctl.decode import recommend
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import Models
from streamctl.evaluation.stage import held_out
from streamctl.files import atomic_file
from streamctl.progress import progress_bar
from streamctl.ranking import (
    Recommender,
    evaluate,
    ranking_metrics,
    sample_users,
    target_ranks,
)
from streamctl.ranking.evaluate import batches_by_length
from streamctl.runs import RunDir, Stage, StageWriter

CURVE, LOSSES = "think-curve", "beam-losses"
LENGTHS = {"evidence": (0, 1, 2, 4, 8, 16, 32, 64), "vocabulary": (0, 1, 2, 4, 8)}
BEAMS = (20, 50)
WIDER = (100, 200)  # beams of the control without a thought
USERS = 1000  # a seeded sample where the settings ask for everyone
DEPTH = 10


def think_curve(run: RunDir, config: EvalConfig, *, device: str = "auto") -> Stage:
    """Measure every point and write points.json and think-curve.png into RUN/think-curve.

    Raises:
        StreamctlError: the run has no policy that thinks, or nobody is held out.
    """
    with _measuring(run, CURVE, config, device) as (stage, models, result):
        name, examples = result["stage"], models.examples
        points = result["points"] = []

        def measure(kind: str, recommender: Recommender, length: int, beam: int) -> None:
            options = {
                "n_items": models.split.n_items, "title": f"{kind} l={length} beam={beam}"
            }  # fmt: skip
            found = evaluate(recommender, examples, masked=False, **options)
            masked = evaluate(recommender, examples, masked=True, **options)
            point = {"kind": kind, "length": length, "beam": beam}
            point |= {key: found.metrics[key] for key in ("ndcg@10", "recall@10")}
            point["ndcg@10_masked"] = masked.metrics["ndcg@10"]
            points.append(point | {"ms_per_user": found.ms_per_user})

        kinds = {"its own thought": models.thinking(name), "random thought": models.random(name)}
        for kind, recommender in kinds.items():
            for length in LENGTHS[models.policy(name).config.thoughts]:
                if length or kind == "its own thought":
                    budget = partial(recommender.recommend, think=length)
                    measure(kind, SimpleNamespace(recommend=budget), length, config.beam)
        for beam in WIDER:
            fast = models.generative(name, decoder="direct", beam=beam)
            measure("no thought, wider", fast, 0, beam)
        stage.save_json("points.json", result)
        plot(result, stage.path / "think-curve.png")
        stage.adopt("think-curve.png")
    return run.stage(CURVE)


def beam_losses(run: RunDir, config: EvalConfig, *, device: str = "auto") -> Stage:
    """Beams of 20 and 50 against exact search, in fp32, the same thoughts for all.

    A policy that thinks with evidence is searched without a thought, by its direct decoder. Writes
    losses.json into RUN/beam-losses.

    Raises:
        StreamctlError: the run has no policy that thinks, or nobody is held out.
    """
    with _measuring(run, LOSSES, config, device) as (stage, models, result):
        name = result["stage"]
        thoughts = models.policy(name).config.thoughts
        own = models.annotation["length"] if thoughts == "vocabulary" else 0
        result["rows"] = {
            f"l = {length}": _losses(models, name, length, models.examples, config)
            for length in dict.fromkeys((0, own))
        }
        stage.save_json("losses.json", result)
    return run.stage(LOSSES)


@contextmanager
def _measuring(
    run: RunDir, name: str, config: EvalConfig, device: str
) -> Iterator[tuple[StageWriter, Models, dict[str, Any]]]:
    """A stage that measures the last policy that thinks, and what its result says of it."""
    everyone = held_out(run, config.split)
    policy = next((each for each in ("rl", "sft") if run.stage(each).complete), None)
    if policy is None:
        raise StreamctlError(
            "there is no thinking policy to measure",
            where=run.path,
            run=f"streamctl sft --run {run.path}",
        )
    parents = ["data", "tokenizer", "annotate", policy]
    with run.begin(name, config, parents=parents, force=True) as stage:
        examples = sample_users(everyone, config.users or USERS, config.seed)
        about = {"stage": policy, "split": config.split, "users": len(examples)}
        yield stage, Models(run, config, examples, device), {**about, "seed": config.seed}
        stage.publish()


def _losses(
    models: Models, stage_name: str, length: int, examples: Examples, config: EvalConfig
) -> dict[str, Any]:
    policy, trie = models.policy(stage_name), models.material.trie
    names = ["exact", *(f"beam {beam}" for beam in BEAMS)]
    top = {name: np.full((len(examples), DEPTH), -1, np.int64) for name in names}
    spent = dict.fromkeys(names, 0.0)
    with progress_bar(f"exact search, l = {length}", len(examples), "users") as bar:
        for index in batches_by_length(examples.lengths, config.batch):
            history = torch.from_numpy(examples.histories(index)).to(models.device)
            decoder = "slow" if length else "direct"
            options = {"think": length, "seed": config.seed, "decoder": decoder}
            for name in names:
                began = time.perf_counter()
                beam = None if name == "exact" else int(name.split()[1])
                ranking = recommend(policy, trie, history, DEPTH, beam=beam, exact=True, **options)
                spent[name] += time.perf_counter() - began
                top[name][index] = ranking.items.cpu().numpy()
            bar.advance(len(index))
    found = {}
    for name in names:
        metrics = ranking_metrics(target_ranks(top[name], examples.targets))
        kept = (top[name][:, :, None] == top["exact"][:, None, :]).any(1)
        found[name] = {
            "ndcg@10": metrics["ndcg@10"],
            "recall@10": metrics["recall@10"],
            "of_true_top10": float(kept[top["exact"] >= 0].mean()),
            "same_top10": float(kept.all(1).mean()),
            "ms_per_user": 1000 * spent[name] / len(examples),
        }
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Masked ndcg@10 over milliseconds a user, a line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for kind in dict.fromkeys(point["kind"] for point in result["points"]):
        points = [point for point in result["points"] if point["kind"] == kind]
        points.sort(key=lambda point: point["ms_per_user"])
        style = "-" if kind == "its own thought" else "--"
        line = [[point[key] for point in points] for key in ("ms_per_user", "ndcg@10_masked")]
        axis.plot(*line, style, marker="o", label=kind)
        for point in points:
            text = f"l {point['length']}" if point["length"] else f"beam {point['beam']}"
            at = point["ms_per_user"], point["ndcg@10_masked"]
            axis.annotate(text, at, (3, 3), textcoords="offset points", fontsize="x-small")
    axis.set_xlabel("milliseconds a user, in batches")
    axis.set_ylabel("ndcg@10, seen items masked")
    axis.set_title(f"{result['split']} split, {result['users']:,} users", loc="left")
    axis.legend(frameon=False)
    with atomic_file(path) as target:
        figure.savefig(target, format="png", dpi=150)


def curve_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a think curve, for people."""
    keys = ("ndcg@10", "ndcg@10_masked", "recall@10", "ms_per_user")
    rows = [
        [f"{point['kind']}, l = {point['length']}, beam {point['beam']}", *(point[k] for k in keys)]
        for point in result["points"]
    ]
    return ["", "ndcg@10", "masked", "recall@10", "ms"], rows


def loss_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of what beams lose to exact search, for people."""
    keys = ("ndcg@10", "recall@10", "of_true_top10", "same_top10", "ms_per_user")
    rows = [
        [f"{length}, {name}", *(row[key] for key in keys)]
        for length, methods in result["rows"].items()
        for name, row in methods.items()
    ]
    return ["", "ndcg@10", "recall@10", "of the true\ntop 10", "same\ntop 10", "ms"], rows
