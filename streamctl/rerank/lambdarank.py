"""A learned ranker over features of candidates: LightGBM's LambdaRank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamctl.errors import StreamctlError

if TYPE_CHECKING:
    import lightgbm

PATIENCE = 100  # trees without a better ndcg@10 before stopping
PARAMETERS = {
    "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "num_leaves": 31,
    "min_data_in_leaf": 50, "feature_fraction": 0.8, "bagging_fraction": 0.8, "bagging_freq": 1,
    "lambdarank_truncation_level": 20, "max_bin": 127, "lambda_l2": 1.0, "deterministic": True,
    "force_row_wise": True, "verbosity": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Candidates of some users, each group one user's.

    Attributes:
        features: float32 (R, F), a row a candidate.
        hits: bool (R,), the user's target.
        sizes: int64 (G,), rows of each group, one after another.
    """

    features: np.ndarray
    hits: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, features: np.ndarray, targets: np.ndarray) -> Groups:
        """Of users whose target is among their candidates; the others teach nothing.

        Args:
            items: (B, C) candidates, -1 for none. features: (B, C, F). targets: (B,).
        """
        hits = items == targets[:, None]
        taught = hits.any(1)
        there = (items >= 0) & taught[:, None]
        return cls(features[there], hits[there], there[taught].sum(1))

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Several as one."""
        columns = zip(*((part.features, part.hits, part.sizes) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


class LambdaRank:
    """Gradient-boosted trees whose gradient is that of ndcg.

    Deterministic: the same groups and seed give the same trees, whatever the number of threads.
    """

    def __init__(self, booster: lightgbm.Booster):
        self._booster = booster

    @classmethod
    def fit(
        cls,
        groups: Groups,
        *,
        trees: int,
        lr: float,
        seed: int,
        valid: Groups | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> LambdaRank:
        """Grow trees.

        Args:
            trees: at most; exactly so many without `valid`.
            valid: groups that say when to stop.
            parameters: LightGBM's, in the place of some of `PARAMETERS`.

        Raises:
            StreamctlError: no group has its target among its candidates.
        """
        import lightgbm

        if not len(groups.sizes):
            raise StreamctlError(
                "there is nothing to rank: no candidate is anybody's target",
                run="--methods with others, or a log with more validation users",
            )
        data = lightgbm.Dataset(groups.features, groups.hits, group=groups.sizes)
        settings = {**PARAMETERS, **(parameters or {}), "learning_rate": lr, "seed": seed % 2**31}
        options = {}
        if valid is not None and len(valid.sizes):
            held = lightgbm.Dataset(valid.features, valid.hits, group=valid.sizes, reference=data)
            stop = lightgbm.early_stopping(PATIENCE, verbose=False)
            options = {"valid_sets": [held], "callbacks": [stop]}
        return cls(lightgbm.train(settings, data, trees, **options))

    @property
    def trees(self) -> int:
        return self._booster.best_iteration or self._booster.num_trees()

    def scores(self, items: np.ndarray, features: np.ndarray) -> np.ndarray:
        """float32 (B, C): higher is better, -inf where items (B, C) has none."""
        there = items >= 0
        scores = np.full(items.shape, -np.inf, np.float32)
        if there.any():
            scores[there] = self._booster.predict(features[there], num_iteration=self.trees)
        return scores

    def gains(self) -> np.ndarray:
        """float64 (F,): how much each feature lowered the loss, as shares."""
        gained = self._booster.feature_importance("gain")
        return gained / max(gained.sum(), 1e-12)

    def save(self, path: Path) -> None:
        """Write the trees as text."""
        path.write_text(self._booster.model_to_string(num_iteration=self.trees), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LambdaRank:
        import lightgbm

        return cls(lightgbm.Booster(model_str=path.read_text(encoding="utf-8")))
