"""Train a re-ranker on validation users and judge it by folds, never on its own training users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamctl.config import RerankConfig
from streamctl.data import Examples
from streamctl.device import derive_seed
from streamctl.progress import progress_bar
from streamctl.ranking import Interval, Recommender, gains, paired_difference, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.ranking.metrics import DEPTH
from streamctl.rerank.features import candidates
from streamctl.rerank.lambdarank import Groups, LambdaRank
from streamctl.rerank.reranker import ordered
from streamctl.retrieval.evidence import Evidence

FOLDS = 5
BATCH = 256
# Trees for the few thousand validation users there are. On amazon-2018-scientific, by folds, they
# took SASRec's validation ndcg@10 to .099; PARAMETERS' larger ones, with a fold that said when to
# stop, to .091. Where such a fold stopped was chance: after 1 to 43 trees behind STREAM-Rec's SFT.
SMALL = {"num_leaves": 6, "min_data_in_leaf": 200, "feature_fraction": 0.5}


@dataclass(frozen=True)
class Fit:
    """What fitting gave.

    Attributes:
        ranker: trained on all users.
        before, after: int32 (E,) masked ranks of the targets by the first method alone and
            re-ranked by a ranker that did not see the user.
        gain: of masked ndcg@10, its paired 95% interval over users.
    """

    ranker: LambdaRank
    before: np.ndarray
    after: np.ndarray
    gain: Interval

    @property
    def kept(self) -> bool:
        """Whether it surely helps: the interval is above zero."""
        return self.gain.low > 0

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """Figures for people; `names` are the features'."""
        gains_ = self.ranker.gains()
        best = np.argsort(-gains_)[:10]
        return {
            "ndcg@10": {
                "before": float(gains(self.before, 10).mean()),
                "after": float(gains(self.after, 10).mean()),
            },
            "gain": self.gain.as_dict(),
            "kept": self.kept,
            "trees": self.ranker.trees,
            "features": {names[place]: round(float(gains_[place]), 4) for place in best},
        }


def folds(users: np.ndarray, seed: int) -> np.ndarray:
    """int64 (E,): the fold of each example by whose it is (E,); all of a user's are in one, so
    that nobody is judged by a ranker that they taught."""
    people, who = np.unique(users, return_inverse=True)
    return np.random.default_rng(derive_seed(seed, "folds")).integers(0, FOLDS, len(people))[who]


def fit_reranker(
    methods: Sequence[Recommender], evidence: Evidence, examples: Examples, config: RerankConfig
) -> Fit:
    """Fit a ranker over the candidates of some methods.

    Args:
        examples: validation users.

    Raises:
        StreamctlError: no candidate is anybody's target, or LightGBM is missing.
    """
    fold = folds(examples.users, config.seed)
    items: list[np.ndarray] = [np.empty(0)] * len(examples)
    features: list[np.ndarray] = [np.empty(0)] * len(examples)
    before = np.empty(len(examples), np.int32)
    with progress_bar("candidates", len(examples), "users") as bar:
        for index in batches_by_length(examples.lengths, BATCH):
            history = torch.from_numpy(examples.histories(index))
            found = candidates(
                methods, evidence, history, config.depth, users=examples.users[index]
            )
            alone = methods[0].recommend(
                history, DEPTH, users=examples.users[index], exclude=examples.seen(index)
            )
            before[index] = target_ranks(alone.items.cpu().numpy(), examples.targets[index])
            for place, row in enumerate(index):
                there = found.items[place] >= 0
                items[row], features[row] = found.items[place, there], found.features[place, there]
            bar.advance(len(index))

    def groups(rows: np.ndarray) -> Groups:
        hits = [items[row] == examples.targets[row] for row in rows]
        taught = [row for row, hit in zip(rows, hits, strict=True) if hit.any()]
        return Groups(
            np.concatenate([features[row] for row in taught]) if taught else np.empty((0, 1)),
            np.concatenate([hit for hit in hits if hit.any()]) if taught else np.empty(0, bool),
            np.array([len(items[row]) for row in taught], np.int64),
        )

    options = {"trees": config.trees, "lr": config.lr, "seed": config.seed, "parameters": SMALL}
    after = np.empty(len(examples), np.int32)
    for number in range(FOLDS):
        mine, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        ranker = LambdaRank.fit(groups(rest), **options)
        for row, seen in zip(mine, examples.seen(mine), strict=True):
            shown = ~np.isin(items[row], seen)
            scores = ranker.scores(items[row][None], features[row][None])
            top, _ = ordered(items[row][None][:, shown], scores[:, shown], DEPTH)
            after[row] = target_ranks(top, examples.targets[row : row + 1])[0]
    final = LambdaRank.fit(groups(np.arange(len(examples))), **options)
    gain = paired_difference(after, before, users=examples.users, seed=config.seed)
    return Fit(final, before, after, gain)
