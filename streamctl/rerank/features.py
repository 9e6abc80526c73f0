"""What a re-ranker reads of each candidate, whatever the method that proposed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamctl.decode.items import denied
from streamctl.ranking import Ranking, Recommender
from streamctl.retrieval.evidence import FEATURES, HOPS, Evidence

LATEST = 5  # items of the history whose text is compared
OF_HOPS = 5 * len(HOPS)  # the columns of FEATURES that hops alone can tell
OF_METHOD = ("score less the best", "score less the mean", "1/rank", "presence")


@dataclass(frozen=True)
class Candidates:
    """What is to be ranked for each of B users.

    Attributes:
        items: int64 (B, C), -1 where a user has fewer.
        features: float32 (B, C, F).
        rankings: what each method said.
    """

    items: np.ndarray
    features: np.ndarray
    rankings: list[Ranking]


def feature_names(methods: Sequence[str]) -> list[str]:
    """Names of the columns, for reports."""
    own = [f"{what} of {method}" for method in methods for what in OF_METHOD]
    rest = ["cosine with the last item", "highest cosine with one of the last", "log popularity"]
    rest += ["log length of the history", "had before", "times had"]
    return [*FEATURES[:OF_HOPS], *own, *rest]


def candidates(
    methods: Sequence[Recommender],
    evidence: Evidence,
    histories: torch.Tensor,
    depth: int,
    *,
    users: np.ndarray | None = None,
    think: int | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
) -> Candidates:
    """The best `depth` items of each method and all that the hops bring, with their features.

    Arguments beside `depth` are those of `Recommender.recommend`.
    """
    options = {"users": users, "think": think, "exclude": exclude, "allow": allow}
    rankings = [method.recommend(histories, depth, **options) for method in methods]
    past = histories.cpu().numpy()
    pieces = evidence.gather(past, users)
    found = pieces.items.astype(np.int64)
    lists = [np.where(denied(found, exclude, allow), -1, found)]
    lists += [ranking.items.cpu().numpy() for ranking in rankings]
    items = _union(lists)
    columns = [_looked_up(items, lists[0], pieces.features()[..., :OF_HOPS])]
    for ranking, listed in zip(rankings, lists[1:], strict=True):
        columns.append(_looked_up(items, listed, _of_method(ranking)))
    columns.append(_of_items(items, past, evidence))
    return Candidates(items, np.concatenate(columns, 2, dtype=np.float32), rankings)


def _union(lists: Sequence[np.ndarray]) -> np.ndarray:
    """int64 (B, C): every item of the lists (B, n) once a row, -1 on the right."""
    together = np.concatenate(lists, 1)
    order = np.argsort(together, 1, kind="stable")
    ordered = np.take_along_axis(together, order, 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    ordered = -np.sort(-ordered, 1)
    return ordered[:, : max(1, int((ordered >= 0).sum(1).max(initial=0)))]


def _looked_up(items: np.ndarray, listed: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Features (B, C, F) of the items, from those (B, n, F) of a list (B, n); 0 where not in it."""
    order = np.argsort(listed, 1, kind="stable")
    ordered = np.take_along_axis(listed, order, 1)
    found = np.zeros((*items.shape, features.shape[2]), np.float32)
    for row in range(len(items)):
        place = np.searchsorted(ordered[row], items[row]).clip(max=ordered.shape[1] - 1)
        same = (ordered[row, place] == items[row]) & (items[row] >= 0)
        found[row, same] = features[row, order[row, place[same]]]
    return found


def _of_method(ranking: Ranking) -> np.ndarray:
    """(B, k, 4) as `OF_METHOD` says."""
    scores = ranking.scores.float().cpu().numpy()
    there = ranking.items.cpu().numpy() >= 0
    scores = np.where(there, scores, 0)
    best = scores[:, :1]
    mean = scores.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    rank = np.broadcast_to(1 / np.arange(1, scores.shape[1] + 1), scores.shape)
    return np.stack([scores - best, scores - mean, rank, there], 2) * there[..., None]


def _of_items(items: np.ndarray, past: np.ndarray, evidence: Evidence) -> np.ndarray:
    """(B, C, 6): text, popularity, length of the history, and how often the user had the item."""
    vectors = evidence.vectors
    lengths = (past >= 0).sum(1)
    places = lengths[:, None] - 1 - np.arange(LATEST)
    latest = np.take_along_axis(past, np.maximum(places, 0), 1)  # (B, L), the last one first
    cosines = np.full((len(items), items.shape[1], LATEST), -1, np.float32)
    for row in range(len(items)):
        cosines[row] = vectors[items[row]] @ vectors[latest[row]].T
    cosines[np.broadcast_to((places < 0)[:, None], cosines.shape)] = -1
    times = (items[:, :, None] == past[:, None, :]).sum(2)
    columns = (
        cosines[..., 0],
        cosines.max(2),
        np.log1p(evidence.popularity[items]),
        np.broadcast_to(np.log1p(lengths)[:, None], items.shape),
        times > 0,
        times,
    )
    return np.stack(columns, 2).astype(np.float32) * (items >= 0)[..., None]
