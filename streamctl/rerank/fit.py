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
from streamctl.errors import StreamctlError
from streamctl.progress import progress_bar
from streamctl.ranking import Interval, Recommender, gains, paired_difference, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.ranking.metrics import DEPTH
from streamctl.rerank.features import Candidates, candidates, permitted
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
    if not len(examples):
        raise StreamctlError(
            "nobody validates, so a re-ranker has nobody to learn from",
            run="`streamctl data prepare` with a split that leaves validation users",
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
        shown = permitted(items[mine], examples.seen(mine), None)
        top, _ = ordered(shown, fit(rest).scores(shown, features[mine]), DEPTH)
        after[mine] = target_ranks(top, examples.targets[mine])
    gain = paired_difference(after, before, users=examples.users, seed=config.seed)
    return Fit(fit(np.arange(len(examples))), before, after, gain)
