"""The stages `rerank/NAME`: a learned ranker behind a method, or behind several together.

It learns on validation users and is judged by folds, never on the users who taught it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from streamctl.baselines.hops import run_evidence
from streamctl.config import EvalConfig, RerankConfig
from streamctl.data import Examples, load_data
from streamctl.decode.items import denied
from streamctl.device import derive_seed
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import (
    RERANK,
    RERANKED,
    Models,
    known_rows,
    method_names,
    reranked_stages,
)
from streamctl.progress import progress_bar, say
from streamctl.ranking import Recommender, gains, paired_difference, sample_users, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.ranking.metrics import DEPTH
from streamctl.rerank.features import Candidates, candidates, feature_names
from streamctl.rerank.lambdarank import Groups, LambdaRank
from streamctl.rerank.reranker import ordered
from streamctl.retrieval.evidence import Evidence
from streamctl.runs import RunDir, Stage

TREES, RANKS = "trees.txt", "ranks.safetensors"
FOLDS = 5
DECIDERS = 5000  # validation users who choose between methods
BATCH = 256
# Trees for the few thousand validation users there are. On amazon-2018-scientific, by folds, they
# took SASRec's validation ndcg@10 to .099; PARAMETERS' larger ones, with a fold that said when to
# stop, to .091. Where such a fold stopped was chance: after 1 to 43 trees behind STREAM-Rec's SFT.
SMALL = {"num_leaves": 6, "min_data_in_leaf": 200, "feature_fraction": 0.5}


def rerank(
    run: RunDir, config: RerankConfig, *, device: str = "auto", force: bool = False
) -> list[Stage]:
    """Fit a re-ranker behind each method of a run, or one behind those that the settings name.

    The report says whether it surely helps: only then may it win. The table shows it as
    `NAME+rerank` either way. Redone where a stage it reads has changed.

    Returns:
        the stages, `rerank/NAME` or `rerank/NAME+NAME`.

    Raises:
        UsageError: an unknown method.
        StreamctlError: a stage that a method is read from is missing or stale, nobody validates,
            or no candidate is anybody's target.
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
    force = force or run.stage(name).outdated
    with run.begin(name, config, parents=parents, force=force) as stage:
        if stage is None:
            say(f"{name}: complete already")
            return run.stage(name)
        models, rows = Models(run, EvalConfig(), None, device), known_rows(run)
        methods = [rows[one].make(models) for one in names]
        examples = _teachers(load_data(run)[1].valid, config.users)
        with torch.inference_mode():
            ranker, before, after = _fit(methods, run_evidence(run), examples, config)
        gain = paired_difference(after, before, users=examples.users, seed=config.seed)
        kept, shares = gain.low > 0, ranker.gains()
        figures = {
            "before": float(gains(before, 10).mean()),
            "after": float(gains(after, 10).mean()),
        }
        features = feature_names(names)
        report: dict[str, Any] = {
            "users": len(examples),
            "ndcg@10": figures,
            "gain": gain.as_dict(),
            "kept": kept,
            "trees": ranker.trees,
            "features": {
                features[at]: round(float(shares[at]), 4) for at in np.argsort(-shares)[:10]
            },
        }
        with stage.writing(TREES) as path:
            ranker.save(path)
        ranks = {"before": before, "after": after, "ends": examples.end.copy()}
        stage.save_tensors(RANKS, {key: torch.from_numpy(value) for key, value in ranks.items()})
        stage.save_json("report.json", report)
        stage.publish(kept=kept)
        say(
            f"{name}: masked ndcg@10 {figures['before']:.4f} -> {figures['after']:.4f} on "
            f"validation users by folds ({gain.low:+.4f} to {gain.high:+.4f}); "
            + ("it surely helps" if kept else "it does not surely help: never the winner")
        )
    return run.stage(name)


def deciders(valid: Examples) -> Examples:
    """The validation users who choose between the methods of a run."""
    return sample_users(valid, DECIDERS, 0)


def _teachers(valid: Examples, count: int) -> Examples:
    """The validation users who teach a re-ranker: where they are more than choose between
    methods, all of these are among them, so that it may win."""
    if not DECIDERS < count < len(valid):
        return sample_users(valid, count, 0)
    chosen = np.isin(valid.end, deciders(valid).end)
    others = np.random.default_rng(derive_seed(0, "teachers")).permutation(np.flatnonzero(~chosen))
    rows = np.concatenate([np.flatnonzero(chosen), others[: count - DECIDERS]])
    return valid.subset(np.sort(rows))


def folds(users: np.ndarray, seed: int) -> np.ndarray:
    """int64 (E,): the fold of each example by whose it is (E,); all of a user's are in one, so
    that nobody is judged by a ranker that they taught."""
    people, who = np.unique(users, return_inverse=True)
    return np.random.default_rng(derive_seed(seed, "folds")).integers(0, FOLDS, len(people))[who]


def _fit(
    methods: Sequence[Recommender], evidence: Evidence, examples: Examples, config: RerankConfig
) -> tuple[LambdaRank, np.ndarray, np.ndarray]:
    """A ranker that learned on all validation users; and int32 (E,) masked ranks of their targets
    by the first method alone, and re-ranked by a ranker that did not see the user."""
    if not len(examples):
        raise StreamctlError(
            "nobody validates, so a re-ranker has nobody to learn from",
            run="`streamctl data prepare` with a split that leaves validation users; or, of a "
            "refitted run, `streamctl rerank` of the one that it was made from",
        )
    fold = folds(examples.users, config.seed)
    before = np.empty(len(examples), np.int32)
    parts: list[tuple[np.ndarray, Candidates]] = []
    with progress_bar("candidates", len(examples), "users") as bar:
        for index in batches_by_length(examples.lengths, BATCH):
            history, users = torch.from_numpy(examples.histories(index)), examples.users[index]
            found = candidates(methods, evidence, history, config.depth, users=users)
            parts.append((index, found))
            alone = methods[0].recommend(history, DEPTH, users=users, exclude=examples.seen(index))
            before[index] = target_ranks(alone.items.cpu().numpy(), examples.targets[index])
            bar.advance(len(index))
    shape = len(examples), max(found.items.shape[1] for _, found in parts)
    items = np.full(shape, -1)
    features = np.zeros((*shape, parts[0][1].features.shape[2]), np.float32)
    for index, found in parts:
        items[index, : found.items.shape[1]] = found.items
        features[index, : found.items.shape[1]] = found.features

    def fit(rows: np.ndarray) -> LambdaRank:
        groups = Groups.of(items[rows], features[rows], examples.targets[rows])
        options = {"trees": config.trees, "lr": config.lr, "seed": config.seed}
        return LambdaRank.fit(groups, **options, parameters=SMALL)

    after = np.empty(len(examples), np.int32)
    for number in range(FOLDS):
        mine, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        shown = np.where(denied(items[mine], examples.seen(mine), None), -1, items[mine])
        top, _ = ordered(shown, fit(rest).scores(shown, features[mine]), DEPTH)
        after[mine] = target_ranks(top, examples.targets[mine])
    return fit(np.arange(len(examples))), before, after


def ranks_by_folds(stage: Stage) -> dict[str, torch.Tensor]:
    """`after`, masked ranks by rankers that did not see these users; `before` without one; `ends`,
    int64, where in the log their targets are."""
    return load_file(stage.file(RANKS))
