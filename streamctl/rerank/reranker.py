"""A method, or several, with a learned ranker behind: itself a recommender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamctl.ranking import Ranking, Recommender
from streamctl.rerank.features import candidates
from streamctl.rerank.lambdarank import LambdaRank
from streamctl.retrieval.evidence import Evidence


@dataclass(frozen=True)
class Reranker:
    """`ranking.Recommender` over the candidates of other ones.

    Attributes:
        methods: whose candidates are ranked; the first one's thought is told.
        evidence: whose hops bring more of them, and features.
        ranker: orders them.
        depth: candidates of each method, or as many as are asked for if those are more.
    """

    methods: tuple[Recommender, ...]
    evidence: Evidence
    ranker: LambdaRank
    depth: int

    @property
    def think(self) -> int:
        """Pieces of evidence that the first method thinks with if nobody asks for another l."""
        return int(getattr(self.methods[0], "think", 0) or 0)

    def recommend(self, histories: torch.Tensor, k: int, **options: Any) -> Ranking:
        """The k best candidates by the ranker (`ranking.Recommender`)."""
        depth = max(k, self.depth)
        found = candidates(self.methods, self.evidence, histories, depth, **options)
        items, scores = ordered(found.items, self.ranker.scores(found.items, found.features), k)
        return Ranking(torch.from_numpy(items), torch.from_numpy(scores), found.rankings[0].thought)


def ordered(items: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of highest score: items (B, k) int64 and scores, -1 and -inf where fewer."""
    order = np.argsort(-scores, 1, kind="stable")[:, :k]
    items, scores = (np.take_along_axis(values, order, 1) for values in (items, scores))
    items = np.where(np.isfinite(scores), items, -1)
    short = (0, 0), (0, k - items.shape[1])
    return (
        np.pad(items, short, constant_values=-1),
        np.pad(scores, short, constant_values=-np.inf),
    )
