"""The stages `rerank/NAME`: a learned ranker behind a method, or behind several together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from safetensors.torch import load_file

from streamctl.baselines.hops import run_evidence
from streamctl.config import EvalConfig, RerankConfig
from streamctl.data import load_data
from streamctl.evaluation.methods import (
    RERANK,
    RERANKED,
    Models,
    known_rows,
    method_names,
    reranked_stages,
)
from streamctl.progress import say
from streamctl.ranking import sample_users
from streamctl.rerank.features import feature_names
from streamctl.rerank.fit import fit_reranker
from streamctl.runs import RunDir, Stage

TREES, RANKS = "trees.txt", "ranks.safetensors"


def rerank(
    run: RunDir, config: RerankConfig, *, device: str = "auto", force: bool = False
) -> list[Stage]:
    """Fit a re-ranker behind each method of a run, or one behind those that the settings name.

    It learns on validation users and is judged by folds; the report says whether it surely helps.
    Only then may it win. The table shows it as `NAME+rerank` either way.

    Returns:
        the stages, `rerank/NAME` or `rerank/NAME+NAME`.

    Raises:
        UsageError: an unknown method.
        StreamctlError: a stage that a method is read from is missing or stale.
    """
    wanted = [config.methods] if config.methods else [
        (name,) for name in method_names(run) if not name.endswith(RERANKED)
    ]  # fmt: skip
    return [_rerank(run, names, config, device, force) for names in wanted]


def _rerank(
    run: RunDir, names: tuple[str, ...], config: RerankConfig, device: str, force: bool
) -> Stage:
    name = RERANK + "+".join(names)
    parents = reranked_stages(run, names)
    config = dataclasses.replace(config, methods=names)
    with run.begin(name, config, parents=parents, force=force) as stage:
        if stage is None:
            say(f"{name}: complete already")
            return run.stage(name)
        split = load_data(run)[1]
        models = Models(run, EvalConfig(), None, device)
        rows = known_rows(run)
        methods = [rows[one].make(models) for one in names]
        examples = sample_users(split.valid, config.users, 0)
        with torch.inference_mode():
            found = fit_reranker(methods, run_evidence(run), examples, config)
        with stage.writing(TREES) as path:
            found.ranker.save(path)
        ranks = {"before": found.before, "after": found.after, "users": examples.users.copy()}
        stage.save_tensors(RANKS, {key: torch.from_numpy(value) for key, value in ranks.items()})
        report: dict[str, Any] = {"users": len(examples), **found.report(feature_names(names))}
        stage.save_json("report.json", report)
        stage.publish(kept=found.kept)
        figures, gain = report["ndcg@10"], found.gain
        say(
            f"{name}: masked ndcg@10 {figures['before']:.4f} -> {figures['after']:.4f} on "
            f"validation users by folds ({gain.low:+.4f} to {gain.high:+.4f}); "
            + ("it surely helps" if found.kept else "it does not surely help: never the winner")
        )
    return run.stage(name)


def ranks_by_folds(stage: Stage) -> dict[str, torch.Tensor]:
    """`after`, masked ranks of `users` by rankers that did not see them; `before` without one."""
    return load_file(stage.file(RANKS))
