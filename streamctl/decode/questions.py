"""Questions to the memory: what of a user is compared with the training prefixes of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import torch

from streamctl.retrieval.baskets import Found, Weighing, unit_rows
from streamctl.retrieval.memory import Memory

ViewName = Literal["items", "taste", "latest", "alike", "state", "follow"]


@dataclass(frozen=True)
class View:
    """How a history is read for a question.

    Attributes:
        asks: the question in words, for whoever reads a thought.
        weighing: of the items, the user's and the memory's alike; None compares states.
        alike: weight that an item hands to each of those most like it by their texts.
        found: length of what the look-ups before this one found, beside the user's own items.
    """

    asks: str
    weighing: Weighing | None = None
    alike: float = 0.0
    found: float = 0.0


SHARP, BROAD = Weighing(0.5, 20), Weighing(0.8, 20)
VIEWS: dict[ViewName, View] = {
    "items": View("what others took who had these lately", SHARP),
    "taste": View("what others took who had these at any time", BROAD),
    "latest": View("what came right after the last two", Weighing(0.5, 2)),
    "alike": View("what others took who had these or things like these", BROAD, alike=0.3),
    "state": View("what others took whom the model describes alike"),
    "follow": View("what others took who also had what was found so far", BROAD, found=0.5),
}
_TOP = 10  # items found that join a question


class LookAlikes:
    """The items most like each item by their texts."""

    def __init__(self, neighbours: np.ndarray):
        """neighbours: (N, J) int64."""
        self.neighbours = neighbours
        self._spreads: dict[tuple[int, float], scipy.sparse.csr_matrix] = {}

    def spread(self, items: int, weight: float) -> scipy.sparse.csr_matrix:
        """(items, items): each item itself, and `weight` of each of those like it."""
        if (items, weight) not in self._spreads:
            count = min(items, len(self.neighbours))
            row = np.repeat(np.arange(count), self.neighbours.shape[1])
            other = self.neighbours[:count].ravel()
            kept = other < items
            entries = (np.full(kept.sum(), weight, np.float32), (row[kept], other[kept]))
            spread = scipy.sparse.csr_matrix(entries, shape=(items, items))
            own = scipy.sparse.identity(items, dtype=np.float32, format="csr")
            self._spreads[items, weight] = (spread + own).tocsr()
        return self._spreads[items, weight]


@dataclass(frozen=True)
class Asker:
    """The users of a batch, as questions can be asked about them.

    Attributes:
        memory: whom the questions go to.
        look_alikes: of the catalogue.
        state: (B, d) float32 of the ranker.
        recent: (B, H) int64 histories, latest first, -1 for none.
        users: (B,) int64, whose own rows are left out; None for strangers.
    """

    memory: Memory
    look_alikes: LookAlikes
    state: torch.Tensor
    recent: np.ndarray
    users: np.ndarray | None

    def ask(
        self,
        name: ViewName,
        k: int,
        known: np.ndarray | None = None,
        evidence: torch.Tensor | None = None,
    ) -> Found:
        """The k rows nearest to the users in this view.

        Args:
            known: (B, j) int64 rows that are not to be found again.
            evidence: (B, N) of the look-ups before, for a view that follows them.
        """
        view = VIEWS[name]
        if view.weighing is None:
            query = self.state.cpu().numpy()
            return self.memory.search(query, k, users=self.users, known=known)
        index = self.memory.by_items(view.weighing)
        basket = index.weigh(self.recent)
        if view.alike:
            basket = basket @ self.look_alikes.spread(basket.shape[1], view.alike)
        if view.found and evidence is not None:
            basket = basket + view.found * _strongest(evidence, basket.shape[1])
        return index.search(basket, k, self.memory.users, users=self.users, known=known)


def _strongest(evidence: torch.Tensor, items: int) -> scipy.sparse.csr_matrix:
    """The items of most evidence (B, N) as baskets of length 1."""
    weights, found = evidence[:, :items].topk(min(_TOP, items, evidence.shape[1]), dim=1)
    row = np.repeat(np.arange(len(found)), found.shape[1])
    entries = (weights.cpu().numpy().ravel(), (row, found.cpu().numpy().ravel()))
    return unit_rows(scipy.sparse.csr_matrix(entries, shape=(len(found), items)))


def latest_first(history: np.ndarray) -> np.ndarray:
    """(B, H) histories, oldest first and -1 on the right, as baskets: latest first."""
    lengths = (history >= 0).sum(1)[:, None]
    places = lengths - 1 - np.arange(history.shape[1])
    return np.where(places >= 0, np.take_along_axis(history, places.clip(min=0), 1), -1)
