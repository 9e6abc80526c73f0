"""A thought in words, and how the ranking moved as it grew."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from streamctl.ranking import Ranking, Recommender
from streamctl.retrieval.evidence import HOPS, Evidence
from streamctl.retrieval.reasons import reasons

PIECES = 8  # of a thought that are told one by one
SHOWN = 10  # items of each ranking


def pairs_of(ranking: Ranking, row: int, k: int) -> list[tuple[int, float]]:
    """(item, score) of one user's best k."""
    items, scores = ranking.items[row, :k].tolist(), ranking.scores[row, :k].tolist()
    return [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]


def explained(
    recommender: Recommender, history: torch.Tensor, ranking: Ranking, row: int, *, users: int,
    exclude: np.ndarray, allow: np.ndarray | None, pieces: int = PIECES,
) -> list[dict[str, Any]]:  # fmt: skip
    """One user's thought, step by step.

    A step has the `item` that came to mind and the `text` why, with `{item}` and `{via}` for
    titles; `via`, `hop`, `weight`; and the `ranking` if thinking had stopped there. All rankings
    are made in one batch.

    Args:
        history: int64 (H,), -1 on the right. ranking: what was answered; `row` is this user's.
        pieces: how many are told one by one, the heaviest first.
    """
    history = history[history >= 0]
    thought = ranking.thought.row(row)
    there = int((thought.items >= 0).sum())
    told = min(there, pieces)
    items, hops = thought.items[0, :told].tolist(), thought.hops[0, :told].tolist()
    thinker, choice = _thinker(recommender), {"exclude": exclude, "allow": allow}
    lengths = list(range(1, told + 1))
    after = lengths and thinker.growing(history[None], SHOWN, lengths, user=users, **choice)
    why = reasons(thinker.evidence, history.numpy(), items, hops, users)
    steps = [
        {
            "text": why[place].text,
            "item": items[place],
            "via": why[place].via,
            "hop": HOPS[hops[place]],
            "weight": float(thought.weights[0, place]),
            "ranking": pairs_of(after, place, SHOWN),
        }
        for place in range(told)
    ]
    last = {"item": None, "via": None, "hop": None, "ranking": pairs_of(ranking, row, SHOWN)}
    if there > told:
        text = f"and {there - told} more, lighter ones"
        steps.append({**last, "text": text, "weight": float(thought.weights[0, told:].sum())})
    elif steps and thinker is recommender:
        steps[-1]["ranking"] = last["ranking"]
    if thinker is not recommender:
        steps.append({**last, "text": "a ranker put all candidates in order", "weight": None})
    return steps


def unthinking(
    recommender: Recommender, history: torch.Tensor, *, users: int, exclude: np.ndarray,
    allow: np.ndarray | None,
) -> list[tuple[int, float]]:  # fmt: skip
    """What one user's answer would be without the thought; arguments as those of `explained`."""
    alone = {"users": np.array([users]), "exclude": [exclude], "allow": [allow]}
    history = history[history >= 0]
    ranking = _thinker(recommender).recommend(history[None], SHOWN, think=0, **alone)
    return pairs_of(ranking, 0, SHOWN)


def _thinker(recommender: Recommender) -> Recommender:
    """What thinks: a ranker behind it has another last word."""
    while not hasattr(recommender, "growing"):
        recommender = recommender.methods[0]
    return recommender


def grounds(
    evidence: Evidence, history: np.ndarray, items: list[int], user: int
) -> list[dict[str, Any]]:
    """What speaks for items that a method found without a thought: steps as those of `explained`.

    Items for which no hop does are left out; `weight` and `ranking` are None.
    """
    pieces = evidence.gather(history[None], np.array([user]))
    hops = dict(zip(pieces.items[0].tolist(), pieces.hops[0].tolist(), strict=True))
    items = [item for item in items if item in hops]
    why = reasons(evidence, history, items, [hops[item] for item in items], user)
    return [
        {"item": item, "hop": HOPS[hops[item]], "text": one.text, "via": one.via}
        | {"weight": None, "ranking": None}
        for item, one in zip(items, why, strict=True)
    ]
