"""Ranking: the items recommended to a batch of users, and the thought that led to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Thought:
    """The evidence that was weighed for each user, in the order in which it was thought.

    Attributes:
        items: (B, l) int64, -1 where a thought is shorter.
        weights: (B, l) float32, each piece's share of the weighing.
        hops: (B, l) int64, which hop found it (index into `retrieval.evidence.HOPS`); -1 where
            there is no item.
    """

    items: torch.Tensor
    weights: torch.Tensor
    hops: torch.Tensor

    def row(self, index: int) -> Thought:
        """One user's thought, its first dimension kept."""
        rows = slice(index, index + 1)
        return Thought(self.items[rows], self.weights[rows], self.hops[rows])


@dataclass(frozen=True)
class Ranking:
    """The best items for each user, best first.

    Attributes:
        items: (B, k) int64, -1 where there are fewer than k.
        scores: (B, k) float32, -inf where there is no item.
        thought: what was thought, by methods that think.
    """

    items: torch.Tensor
    scores: torch.Tensor
    thought: Thought | None = None

    def __len__(self) -> int:
        return len(self.items)


def rank_scores(
    scores: torch.Tensor,
    k: int,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
) -> Ranking:
    """The k items of highest score, without those excluded or not allowed.

    Args:
        scores: float (B, N); -inf for an item that must not be ranked either.
        exclude: for each user the items to leave out.
        allow: for each user the only items wanted, or None for all.

    Returns:
        items int64 and scores float32, both (B, k); -1 and -inf where too few were left.
    """
    if exclude is not None:
        rows = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
        scores = scores.clone()
        scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(exclude))] = -torch.inf
    if allow is not None:
        barred = torch.zeros(scores.shape, dtype=torch.bool)
        for row, items in enumerate(allow):
            if items is not None:
                barred[row] = True
                barred[row, torch.from_numpy(items)] = False
        scores = scores.masked_fill(barred.to(scores.device), -torch.inf)
    # A stable sort of all N would be exact about ties too; topk's order among equals is free,
    # and item numbers are a random permutation, so no item gains from it.
    best, items = scores.topk(min(k, scores.shape[1]), dim=1)
    short = 0, k - best.shape[1]
    items = torch.nn.functional.pad(items.masked_fill(best == -torch.inf, -1), short, value=-1)
    return Ranking(items, torch.nn.functional.pad(best.float(), short, value=-torch.inf))
