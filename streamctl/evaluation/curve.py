"""What thinking and searching cost and bring: the think curve, and what a beam loses.

`think_curve`  ndcg@10 against milliseconds for l = 0..8, beams and modes, early exit, and the
               controls: random thoughts of the same length, and wider beams without a thought.
`beam_losses`  beams of 20 and 50 beside the true top-k of best-first search.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamctl.config import EvalConfig
from streamctl.data import Examples, Split, load_data
from streamctl.decode import PolicyRecommender, exact_top, recommend
from streamctl.decode.recommender import random_thoughts
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import Models
from streamctl.files import atomic_file
from streamctl.progress import plain_console, progress_bar
from streamctl.ranking import evaluate, ranking_metrics, sample_users, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.runs import RunDir, Stage

CURVE, LOSSES = "think-curve", "beam-losses"
LONGEST = 8  # l
BEAMS = (20, 50)
WIDER = (100, 200)  # beams of the control without a thought
MARGINS = (0.4, 0.2, 0.1, 0.05, 0.02)
USERS = 1000  # a seeded sample where the settings ask for everyone
DEPTH = 10


def _thinker(run: RunDir) -> str:
    for stage in ("rl", "sft"):
        if run.stage(stage).complete:
            return stage
    raise StreamctlError(
        "there is no thinking policy to measure",
        where=run.path,
        run=f"streamctl sft --run {run.path}",
    )


def _examples(split: Split, config: EvalConfig, name: str) -> Examples:
    return sample_users(getattr(split, name), config.users or USERS, config.seed)


def choose_margin(models: Models, recommender: PolicyRecommender, config: EvalConfig) -> float:
    """The widest margin whose validation ndcg@10 is no lower than that of whole thoughts.

    Validation users decide, and no others. 0 (only a thought that stands still ends) if none is.
    """
    examples = _examples(models.split, config, "valid")
    options = {"n_items": models.split.n_items, "masked": False}
    whole = evaluate(recommender, examples, **options, title="whole thoughts")
    for margin in MARGINS:
        trial = replace(recommender, margin=margin)
        found = evaluate(trial, examples, **options, title=f"margin {margin}")
        if found.metrics["ndcg@10"] >= whole.metrics["ndcg@10"]:
            return margin
    return 0.0


def think_curve(run: RunDir, config: EvalConfig, *, device: str = "auto") -> Stage:
    """Measure every point and write points.json and think-curve.png into RUN/think-curve.

    Raises:
        StreamctlError: the run has no policy that thinks.
    """
    stage_name = _thinker(run)
    parents = ["data", "tokenizer", "annotate", stage_name]
    with run.begin(CURVE, config, parents=parents, force=True) as stage:
        examples = _examples(load_data(run)[1], config, config.split)
        models = Models(run, config, examples, device)
        base = models.generative(stage_name)
        tokens, users = base.policy.config.tokens, models.split.log.n_users
        margin = choose_margin(models, replace(base, think=LONGEST), config)
        points: list[dict[str, Any]] = []

        def measure(kind: str, recommender: PolicyRecommender, length: int, **more: Any) -> None:
            found = evaluate(
                recommender, examples, n_items=models.split.n_items, masked=False,
                title=f"{kind} l={length} beam={recommender.beam}",
            )  # fmt: skip
            point = {"kind": kind, "length": length, "beam": recommender.beam, **more}
            point |= {"ndcg@10": found.metrics["ndcg@10"], "recall@10": found.metrics["recall@10"]}
            points.append(point | {"ms_per_user": found.ms_per_user})

        for beam in BEAMS:
            fast = replace(base, beam=beam)
            measure("no thought", fast, 0)
            for length in range(1, LONGEST + 1):
                measure("greedy", replace(fast, think=length), length)
                for mode in ("joint", "marginal"):
                    if length in (1, 4, LONGEST):
                        measure(mode, replace(fast, think=length, mode=mode), length)
                chance = random_thoughts(tokens, users, length, config.seed)
                measure("random thoughts", replace(fast, thoughts=chance), length, control=True)
            early = replace(fast, think=LONGEST, margin=margin)
            measure("early exit", early, LONGEST, margin=margin)
        for beam in WIDER:
            measure("no thought", replace(base, beam=beam), 0, control=True)
        _against_controls(points)
        result = {
            "stage": stage_name, "split": config.split, "users": len(examples),
            "seed": config.seed, "margin": margin, "points": points,
        }  # fmt: skip
        stage.save_json("points.json", result)
        plot(result, stage.path / "think-curve.png")
        stage.adopt("think-curve.png")
        stage.publish(margin=margin)
    return run.stage(CURVE)


def _against_controls(points: list[dict[str, Any]]) -> None:
    """Beside each thinking point, the best a model without a thought does in no more time."""
    fast = [point for point in points if point["kind"] == "no thought"]
    for point in points:
        if point["kind"] == "no thought":
            continue
        rivals = [rival for rival in fast if rival["ms_per_user"] <= point["ms_per_user"]]
        best = max((rival["ndcg@10"] for rival in rivals), default=None)
        point["no_thought_at_equal_latency"] = best


def beam_losses(run: RunDir, config: EvalConfig, *, device: str = "auto") -> Stage:
    """Beams of 20 and 50 against exact search, in fp32, the same thoughts for all.

    Writes losses.json into RUN/beam-losses.

    Raises:
        StreamctlError: the run has no policy that thinks.
    """
    stage_name = _thinker(run)
    parents = ["data", "tokenizer", "annotate", stage_name]
    with run.begin(LOSSES, config, parents=parents, force=True) as stage:
        examples = _examples(load_data(run)[1], config, config.split)
        models = Models(run, config, examples, device)
        result = {"stage": stage_name, "split": config.split, "users": len(examples)}
        result |= {"seed": config.seed, "rows": {}}
        for length in dict.fromkeys((0, models.annotation["length"])):
            name = f"l = {length}"
            result["rows"][name] = _losses(models, stage_name, length, examples, config)
        stage.save_json("losses.json", result)
        stage.publish()
    return run.stage(LOSSES)


def _losses(
    models: Models, stage_name: str, length: int, examples: Examples, config: EvalConfig
) -> dict[str, Any]:
    policy, trie = models.policy(stage_name), models.material.trie
    names = ["exact", *(f"beam {beam}" for beam in BEAMS)]
    top = {name: np.full((len(examples), DEPTH), -1, np.int64) for name in names}
    spent = dict.fromkeys(names, 0.0)
    expansions = np.zeros(len(examples), np.int64)
    with progress_bar(f"exact search, l = {length}", len(examples), "users") as bar:
        for index in batches_by_length(examples.lengths, config.batch):
            history = torch.from_numpy(examples.histories(index)).to(models.device)
            options = {"think": length, "seed": config.seed}
            for name in names:
                began = time.perf_counter()
                if name == "exact":
                    ranking, count = exact_top(policy, trie, history, DEPTH, **options)
                    expansions[index] = count
                else:
                    beam = int(name.split()[1])
                    ranking, _ = recommend(
                        policy, trie, history, DEPTH, beam=beam, exact=True, **options
                    )
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
    quantiles = np.percentile(expansions, (50, 95, 100))
    found["exact"]["expansions"] = {
        "mean": float(expansions.mean()),
        **dict(zip(("median", "p95", "most"), map(float, quantiles), strict=True)),
        "prefixes_in_the_trie": int(trie.n_nodes - (np.diff(trie.item_start) > 0).sum()),
    }
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """ndcg@10 over milliseconds a user, a line a kind, at the widest of `BEAMS`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for kind in dict.fromkeys(point["kind"] for point in result["points"]):
        points = [point for point in result["points"] if point["kind"] == kind]
        if kind != "no thought":
            points = [point for point in points if point["beam"] == BEAMS[-1]]
        points.sort(key=lambda point: point["ms_per_user"])
        style = "--" if any(point.get("control") for point in points) else "-"
        line = [[point[key] for point in points] for key in ("ms_per_user", "ndcg@10")]
        axis.plot(*line, style, marker="o", label=kind)
        for point in points:
            text = f"beam {point['beam']}" if kind == "no thought" else f"l {point['length']}"
            at = point["ms_per_user"], point["ndcg@10"]
            axis.annotate(text, at, (3, 3), textcoords="offset points", fontsize="x-small")
    axis.set_xlabel("milliseconds a user, in batches")
    axis.set_ylabel("ndcg@10, seen items left in")
    axis.set_title(
        f"{result['split']} split, {result['users']:,} users, beam {BEAMS[-1]} unless said",
        loc="left",
    )
    axis.legend(frameon=False)
    with atomic_file(path) as target:
        figure.savefig(target, format="png", dpi=150)


def show_curve(result: Mapping[str, Any]) -> None:
    """Print the points of a think curve."""
    head = ("ndcg@10", "recall@10", "ms", "no thought,\nno slower")
    rows = [
        (
            f"{point['kind']}, l = {point['length']}, beam {point['beam']}",
            f"{point['ndcg@10']:.4f}",
            f"{point['recall@10']:.4f}",
            f"{point['ms_per_user']:.2f}",
            _figure(point.get("no_thought_at_equal_latency")),
        )
        for point in result["points"]
    ]
    _print(result, head, rows, f"early exit at margin {result['margin']}, chosen on validation")


def show_losses(result: Mapping[str, Any]) -> None:
    """Print what beams lose to exact search."""
    head = ("ndcg@10", "recall@10", "of the true\ntop 10", "same top 10", "ms", "expansions")
    rows = [
        (
            f"{length}, {name}",
            f"{row['ndcg@10']:.4f}",
            f"{row['recall@10']:.4f}",
            f"{row['of_true_top10']:.1%}",
            f"{row['same_top10']:.1%}",
            f"{row['ms_per_user']:.2f}",
            f"{row['expansions']['mean']:.0f}" if "expansions" in row else "",
        )
        for length, methods in result["rows"].items()
        for name, row in methods.items()
    ]
    _print(result, head, rows, "expansions: prefixes that exact search decodes for a user")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print(result: Mapping[str, Any], head: tuple, rows: list[tuple], caption: str) -> None:
    from rich.table import Table

    title = f"{result['stage']}, {result['split']} split, {result['users']:,} users"
    table = Table("", title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)
