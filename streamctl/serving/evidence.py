"""One answer of the evidence thinker with its reasons: who had these, and what they took."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from streamctl.data import load_data
from streamctl.device import resolve_device
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.runs import RunDir
from streamctl.training.evidence import load_thinker

SHOWN = 3  # reasons a look-up, and items of each


def answer(
    run: RunDir,
    *,
    user: str | None = None,
    items: list[str] | None = None,
    k: int = 10,
    exclude_seen: bool = True,
    device: str = "auto",
) -> dict[str, Any]:
    """Recommend for a user of the log, or for a history.

    Args:
        run: its `evidence` stage is complete.
        user: an id of the log; the history is everything but the test item, as in evaluation.
        items: ids, oldest first, instead.
        k: items wanted.
        exclude_seen: leave the history out of the answer.

    Returns:
        history, look_ups (each a list of {"had", "took"}) and items with scores, all JSON.

    Raises:
        StreamctlError: no such user or item, or the stage is missing.
    """
    catalog, split = load_data(run)
    thinker = load_thinker(run, resolve_device(device))
    index = -1
    if user is not None:
        names = split.log.user_ids
        if user not in names:
            raise StreamctlError(f"no user {user!r} in the log; {close_matches(user, names)}")
        index = list(names).index(user)
        row = np.array([index])
        history = split.test.histories(row)
    else:
        if not items:
            raise UsageError("a history needs at least one item")
        history = np.array([[catalog.index(item) for item in items][-split.history :]])
    shown = torch.from_numpy(history).to(thinker.vectors.device)
    users = np.array([index])
    trace = thinker.think(thinker.ranker.states(shown), shown, users)
    exclude = [history[0]] if exclude_seen else None
    ranking = thinker.rank(shown, k, users=users, exclude=exclude)

    def item(place: int) -> dict[str, str]:
        return {"id": catalog.ids[place], "title": catalog.titles[place]}

    return {
        "history": [item(place) for place in history[0]],
        "look_ups": [
            [
                {"had": [item(place) for place in had[:SHOWN]], "took": item(took)}
                for had, took in thinker.reasons(look_up, 0, SHOWN)
            ]
            for look_up in trace.look_ups
        ],
        "items": [
            item(place) | {"score": score}
            for place, score in zip(
                ranking.items[0].tolist(), ranking.scores[0].tolist(), strict=True
            )
            if place >= 0
        ],
    }
