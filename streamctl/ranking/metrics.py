"""Ranking metrics from the rank of each target in the full catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MISSING = np.iinfo(np.int32).max  # the rank of a target that is not in the list
RECALL_AT = (1, 5, 10, 20, 50)
LIST = 10  # items of a list that is looked at as a whole
NDCG_AT = (5, 10, 20)
DEPTH = max(RECALL_AT)  # how long a ranking has to be


def target_ranks(items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Zero-based rank of each user's target among the recommended items.

    Items are compared, not codes: an item that shares its code with the target is a miss.

    Args:
        items: int64 (B, k), best first, -1 where a user has fewer than k.
        targets: int64 (B,).

    Returns:
        int32 (B,); `MISSING` where the target is not in the list.
    """
    hit = items == targets[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), MISSING).astype(np.int32)


def gains(ranks: np.ndarray, k: int) -> np.ndarray:
    """Each user's ndcg@k with one relevant item: 1 / log2(rank + 2), or 0 beyond k.

    Args:
        ranks: int32 (E,), zero-based.

    Returns:
        float64 (E,).
    """
    inside = ranks < k
    return np.where(inside, 1.0 / np.log2(np.where(inside, ranks, 0) + 2.0), 0.0)


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """recall@{1,5,10,20,50} (HR@k, there being one target), ndcg@{5,10,20} and mrr@10.

    Args:
        ranks: int32 (E,), zero-based, `MISSING` where the target was not recommended.
    """
    if not len(ranks):
        raise ValueError("metrics of no users")
    recall = {f"recall@{k}": float((ranks < k).mean()) for k in RECALL_AT}
    reciprocal = np.where(ranks < LIST, 1.0 / (ranks.astype(np.float64) + 1), 0.0)
    ndcg = {f"ndcg@{k}": float(gains(ranks, k).mean()) for k in NDCG_AT}
    return recall | ndcg | {f"mrr@{LIST}": float(reciprocal.mean())}


def coverage(items: np.ndarray, n_items: int) -> float:
    """Share of the catalogue that somebody is recommended.

    Args:
        items: int64 (E, k) recommended items, -1 where a user has fewer.
        n_items: size of the catalogue.
    """
    return len(np.unique(items[items >= 0])) / n_items


@dataclass(frozen=True)
class ItemFacts:
    """What metrics beyond accuracy need to know of the catalogue.

    Attributes:
        popularity: int64 (N,) training interactions of each item.
        vectors: float32 (N, d) item vectors of length one; None: no diversity is measured.
    """

    popularity: np.ndarray
    vectors: np.ndarray | None


def beyond_accuracy(items: np.ndarray, facts: ItemFacts) -> dict[str, float]:
    """Novelty, diversity and popularity bias of lists of 10.

    novelty@10: mean of -log2 of the share of training interactions that a recommended item has
    (one added to each item's count; Zhou et al., 2010). diversity@10: mean over users of 1 - cosine
    between two items of a list. popularity_bias@10: popularity of the recommended items over that
    of the items users took in training, minus 1: 0 is no bias, 1 twice as popular
    (Abdollahpouri et al., 2019).

    Args:
        items: int64 (E, k) recommended items, -1 where a user has fewer.
    """
    top = items[:, :LIST]
    there = top >= 0
    count = facts.popularity.astype(np.float64)
    share = (count + 1) / (count + 1).sum()
    taken = np.square(count).sum() / max(count.sum(), 1)
    shown = top[there]
    found = {
        f"novelty@{LIST}": _mean(-np.log2(share[shown])),
        f"popularity_bias@{LIST}": _mean(count[shown] / max(taken, 1e-12) - 1),
    }
    if facts.vectors is None:
        return found
    rows = facts.vectors[np.where(there, top, 0)] * there[:, :, None]
    size = there.sum(1)
    # Of all pairs of a list the cosine is the square of its sum, less each item with itself.
    alike = np.square(rows.sum(1)).sum(1) - np.square(rows).sum((1, 2))
    several = size > 1
    diversity = 1 - alike[several] / (size * (size - 1))[several]
    return found | {f"diversity@{LIST}": _mean(diversity)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
