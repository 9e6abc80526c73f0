"""A ranking: the common currency of evaluation, rewards and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Ranking:
    """The best items for each user, best first.

    Attributes:
        items: (B, k) int64, -1 where there are fewer than k.
        scores: (B, k) float32, -inf where there is no item.
    """

    items: torch.Tensor
    scores: torch.Tensor

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Trace:
    """What the model thought for each user.

    Attributes:
        tokens: (B, l) int64 think tokens.
        states: (B, l + 1, d) float32: s_0 before thinking, then the state after each token.
    """

    tokens: torch.Tensor
    states: torch.Tensor

    def row(self, index: int) -> Trace:
        """One user's trace, its first dimension kept."""
        return Trace(self.tokens[index : index + 1], self.states[index : index + 1])


def rank_scores(
    scores: torch.Tensor, k: int, exclude: Sequence[np.ndarray] | None = None
) -> Ranking:
    """The k items of highest score, without those excluded.

    Args:
        scores: float (B, N); -inf for an item that must not be ranked either.
        exclude: for each user the items to leave out.

    Returns:
        items int64 and scores float32, both (B, min(k, N)); item -1 where too few were left.
    """
    if exclude is not None:
        rows = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
        scores = scores.clone()
        scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(exclude))] = -torch.inf
    # A stable sort of all N would be exact about ties too; topk's order among equals is free,
    # and item numbers are a random permutation, so no item gains from it.
    best, items = scores.topk(min(k, scores.shape[1]), dim=1)
    return Ranking(items.masked_fill(best == -torch.inf, -1), best.float())
