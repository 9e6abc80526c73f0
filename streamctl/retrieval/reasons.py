"""Why a piece of evidence came to mind, as a person would say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamctl.retrieval.evidence import Evidence
from streamctl.retrieval.gathering import (
    ALIKE,
    BACK,
    LAST,
    NEXT_,
    NEXT_ALIKE,
    NEXT_NEXT,
    OTHERS,
    SPREAD,
)
from streamctl.retrieval.memory import WIDTH


@dataclass(frozen=True)
class Reason:
    """Why an item was thought of.

    Attributes:
        text: a sentence in which `{item}` and `{via}` stand for titles.
        via: the item that it was reached from, if it was by one.
    """

    text: str
    via: int | None = None


def reasons(
    evidence: Evidence, history: np.ndarray, items: Sequence[int], hops: Sequence[int], user: int
) -> list[Reason]:
    """The reason of each item of a thought.

    Args:
        history: int64 (H,) oldest first. user: whose own interactions are no reason; -1: a
            stranger.
        items, hops: what was thought, and the hops that found it.
    """
    pieces = evidence.gather(history[None], np.array([user]))
    return [
        _one(evidence, history, int(item), hop, user, pieces.items[0], pieces.strengths[0])
        for item, hop in zip(items, hops, strict=True)
    ]


def _one(
    evidence: Evidence, history: np.ndarray, item: int, hop: int, user: int, pieces: np.ndarray,
    strengths: np.ndarray,
) -> Reason:  # fmt: skip
    recent = history[::-1]
    if hop == NEXT_:
        totals = np.maximum(evidence.transitions.totals[recent], 1)
        shares = _counts(evidence, recent, item) / np.sqrt(totals)
        via = int(recent[np.argmax(BACK ** np.arange(len(recent)) * shares)])
        users = _users(evidence, [via], item, user)
        said = {0: "{item} often follows {via}", 1: "after {via}, another user took {item}"}
        return Reason(said.get(users, f"after {{via}}, {users:,} users took {{item}}"), via)
    if hop == ALIKE:
        cosines = evidence.vectors[recent[:LAST]] @ evidence.vectors[item]
        via = int(recent[np.argmax(cosines)])
        if via == recent[0]:
            return Reason("{item} is similar to your last item, {via}", via)
        return Reason("{item} is similar to {via}, which you had before", via)
    if hop in (NEXT_NEXT, NEXT_ALIKE):
        first = strengths[:, NEXT_ if hop == NEXT_NEXT else ALIKE]
        start = np.argsort(-first, kind="stable")[:SPREAD]
        start = start[first[start] > 0]
        totals = np.maximum(evidence.transitions.totals[pieces[start]], 1)
        flow = first[start] * _counts(evidence, pieces[start], item) / totals
        if not flow.any():
            return Reason("{item} follows what others took after your items")
        via = int(pieces[start[np.argmax(flow)]])
        what = "others took" if hop == NEXT_NEXT else "is similar to what you had"
        return Reason(f"after {{via}}, which {what}, came {{item}}", via)
    if hop == OTHERS:
        users = _users(evidence, recent[:WIDTH], item, user)
        if users < 2:
            return Reason("a user with a history like yours took {item}")
        return Reason(f"{users:,} users with histories like yours took {{item}}")
    return Reason("you had {item} before")


def _counts(evidence: Evidence, before: np.ndarray, item: int) -> np.ndarray:
    """float64: how much `item` was counted after each of `before`."""
    counted = np.zeros(len(before))
    for place, first in enumerate(before.tolist()):
        followers, counts = evidence.transitions.followers.row(first)
        counted[place] = counts[followers == item].sum()
    return counted


def _users(evidence: Evidence, before: Sequence[int], item: int, user: int) -> int:
    """Users who had one of `before` and took `item` soon after, of the rows that are kept."""
    owners = [evidence.memory.takers(int(first), item) for first in before]
    return len({*np.concatenate(owners).tolist()} - {user})
