"""Candidates and a ranker: the hops' items under LightGBM's LambdaRank, no network at all."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np

from streamctl.baselines.hops import HopBaseline
from streamctl.config import BaselineConfig
from streamctl.data import Examples, Split
from streamctl.device import derive_seed
from streamctl.ranking import sample_users
from streamctl.rerank.lambdarank import Groups, LambdaRank
from streamctl.retrieval.evidence import Evidence, Pieces
from streamctl.runs import Stage, StageWriter

TREES = "trees.txt"
LAST = 5  # training positions of each user, SFT's default, too: the last are most like validation's
POSITIONS = 200_000  # at most, drawn from these: what fits into memory
VALIDATION_USERS = 5000  # who say how many trees; with 2,000 a seed stopped at its third
MOST_TREES = 400
BATCH = 1024


class Ranker(HopBaseline):
    """What a good engineer builds in an afternoon: five hops' candidates, gradient-boosted trees.

    Trained on training positions whose target is among their own evidence (their user's rows and
    counts taken out); validation users say how many trees.
    """

    defaults: ClassVar[dict[str, Any]] = {"lr": 0.02}

    def __init__(self, config: BaselineConfig, split: Split, evidence: Evidence):
        super().__init__(config, split, evidence)
        self.ranker: LambdaRank | None = None

    def train_on(self, split: Split) -> None:
        """Grow the trees."""
        seed = self.config.seed
        last = np.zeros(split.log.n_users, np.int64)
        np.maximum.at(last, split.train.users, split.train.end)
        late = split.train.subset(last[split.train.users] - split.train.end < LAST)
        positions = sample_users(late, POSITIONS, derive_seed(seed, "positions"))
        valid = sample_users(split.valid, VALIDATION_USERS, seed)
        self.ranker = LambdaRank.fit(
            self._groups(positions), valid=self._groups(valid), trees=MOST_TREES,
            lr=self.config.lr, seed=seed,
        )  # fmt: skip

    def _groups(self, examples: Examples) -> Groups:
        parts = []
        for index in np.split(np.arange(len(examples)), np.arange(BATCH, len(examples), BATCH)):
            pieces = self.evidence.gather(examples.histories(index), examples.users[index])
            parts.append(Groups.of(pieces.items, pieces.features(), examples.targets[index]))
        return Groups.joined(parts)

    @classmethod
    def load(cls, stage: Stage) -> Self:
        model = super().load(stage)
        model.ranker = LambdaRank.load(stage.file(TREES))
        return model

    def save(self, stage: StageWriter) -> None:
        with stage.writing(TREES) as path:
            self.ranker.save(path)

    def values(self, pieces: Pieces) -> np.ndarray:
        scores = self.ranker.scores(pieces.items, pieces.features())
        scores = np.where(np.isfinite(scores), scores, 0)
        return (1 + scores / (1 + np.abs(scores))).astype(np.float32)  # in (0, 2), same order
