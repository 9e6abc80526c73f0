"""Maximal marginal relevance: a ranking whose items are good and not all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from streamctl.ranking.ranking import Ranking
from streamctl.ranking.recommender import Recommender

CANDIDATES = 4  # items that are asked of the method for each one wanted
NO_ITEM, CHOSEN = -1e6, -2e6  # values below every item's: places without one, and those taken


class Diverse:
    """Any method's ranking, re-ranked by MMR (Carbonell and Goldstein, 1998).

    Each next item is arg max (1 - diversity) relevance - diversity max cosine to those before it,
    over the method's 4 k best; relevance falls from 1 to 0 with the place among them, because
    methods' scores have no scale in common.

    Attributes:
        diversity: 0 leaves the ranking as it is, 1 looks at likeness alone after the first item.
    """

    def __init__(self, recommender: Recommender, vectors: np.ndarray, diversity: float):
        """vectors: (N, d) float32 item vectors of length one."""
        self.recommender, self.diversity = recommender, diversity
        self._vectors = torch.from_numpy(vectors)

    def recommend(self, histories: torch.Tensor, k: int, **options: Any) -> Ranking:
        """As `Recommender.recommend`; scores are the method's own, no longer in their order."""
        wanted = CANDIDATES * k if self.diversity else k
        wide = self.recommender.recommend(histories, wanted, **options)
        return mmr(wide, self._vectors, k, self.diversity)


def mmr(ranking: Ranking, vectors: torch.Tensor, k: int, diversity: float) -> Ranking:
    """The k items of a longer ranking in the order of `Diverse`.

    Args:
        ranking: (B, C), -1 where there is no item; items that have no vector are unlike all.
        vectors: (N, d) float32, rows of length one.
    """
    items = ranking.items
    count = items.shape[1]
    inside = (items >= 0) & (items < len(vectors))
    rows = vectors.to(items.device)[items.clamp(0, len(vectors) - 1)] * inside[:, :, None]
    place = torch.arange(count, device=items.device)
    value = ((1 - diversity) * (1 - place / count)).expand(len(items), -1)
    value = value.masked_fill(items < 0, NO_ITEM)
    near = torch.zeros_like(value)  # cosine to the nearest one chosen
    order = torch.empty(len(items), min(k, count), dtype=torch.int64, device=items.device)
    for step in range(order.shape[1]):
        best = (value - diversity * near).argmax(1, keepdim=True)
        order[:, step : step + 1] = best
        value.scatter_(1, best, CHOSEN)
        chosen = rows.gather(1, best[:, :, None].expand(-1, -1, rows.shape[2]))
        cosine = (rows @ chosen.transpose(1, 2))[:, :, 0]
        near = cosine if not step else torch.maximum(near, cosine)
    return Ranking(items.gather(1, order), ranking.scores.gather(1, order), ranking.thought)
