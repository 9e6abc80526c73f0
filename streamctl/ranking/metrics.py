"""Ranking metrics from the rank of each user's one target in the full catalogue."""

from __future__ import annotations

import numpy as np

MISSING = np.iinfo(np.int32).max  # the rank of a target that is not in the list
RECALL_AT = (1, 5, 10, 20, 50)
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
    """recall@{1,5,10,20,50} (equal to HR@k, there being one target) and ndcg@{5,10,20}.

    Args:
        ranks: int32 (E,), zero-based, `MISSING` where the target was not recommended.
    """
    if not len(ranks):
        raise ValueError("metrics of no users")
    recall = {f"recall@{k}": float((ranks < k).mean()) for k in RECALL_AT}
    return recall | {f"ndcg@{k}": float(gains(ranks, k).mean()) for k in NDCG_AT}


def coverage(items: np.ndarray, n_items: int) -> float:
    """Share of the catalogue that somebody is recommended.

    Args:
        items: int64 (E, k) recommended items, -1 where a user has fewer.
        n_items: size of the catalogue.
    """
    return len(np.unique(items[items >= 0])) / n_items
