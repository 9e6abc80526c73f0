"""Thinking as looking up evidence: the state asks the memory, moves, and asks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import torch

from streamctl.decode.ranking import Ranking
from streamctl.device import derive_seed
from streamctl.model.ranker import StateRanker
from streamctl.retrieval.memory import Memory

_TINY = 1e-12
_TOP = 10  # items of a look-up that join the next question
_STRIDE = 2_654_435_761  # a prime: users draw rows that lie far apart


@dataclass(frozen=True)
class EvidenceSettings:
    """How evidence is weighed; chosen on validation users.

    Attributes:
        by: what is compared with the memory: "items" the user had, or "state".
        neighbours: rows that one look-up returns.
        temperature: of the softmax over their cosines.
        decay: weight of the item after the next one, and again of the one after that.
        weight: w, by how much full evidence multiplies the odds of an item.
        move: how far the question goes towards what a look-up found, in its own lengths.
        repeat: added to the log-probability of an item of the history.
    """

    by: Literal["items", "state"] = "items"
    neighbours: int = 100
    temperature: float = 0.1
    decay: float = 0.0
    weight: float = 100.0
    move: float = 0.0
    repeat: float = 0.0


@dataclass(frozen=True)
class LookUp:
    """What one question to the memory found.

    Attributes:
        rows: (B, k) int64 rows of the memory, -1 where there was none.
        weights: (B, k) float32, a softmax over the rows; 0 where there is none.
    """

    rows: np.ndarray
    weights: torch.Tensor


@dataclass(frozen=True)
class EvidenceTrace:
    """The thought of each user: the look-ups in their order, and the states around them.

    Attributes:
        look_ups: l of them.
        states: (B, l + 1, d) float32, s_0 before the first look-up.
    """

    look_ups: tuple[LookUp, ...]
    states: torch.Tensor


class EvidenceThinker:
    """Ranks by the state's own opinion, raised where other users' choices speak for an item.

        score(item) = log softmax(s_l . v) + log(1 + w mean over i of E_i(item))

    where E_i is the distribution of what the users found by look-up i took next. A sum of the two
    distributions instead of their product helps a weak state only. A row is found once: every
    look-up brings new evidence.
    """

    def __init__(
        self,
        ranker: StateRanker,
        memory: Memory | None,
        settings: EvidenceSettings,
        *,
        look_ups: int,
        random: int | None = None,
    ):
        """A recommender.

        Args:
            ranker: in evaluation mode, on its device.
            memory: its keys are the ranker's states; None where nothing is looked up.
            look_ups: l; 0 answers from the state alone.
            random: a seed, to draw rows at random instead of the nearest ones: the control.
        """
        self.ranker, self.memory, self.settings = ranker, memory, settings
        self.look_ups, self.random = look_ups, random
        with torch.no_grad():
            self.vectors = ranker.item_vectors().float()

    @torch.no_grad()
    def think(
        self, start: torch.Tensor, history: torch.Tensor, users: np.ndarray | None = None
    ) -> EvidenceTrace:
        """Look up l times.

        Args:
            start: s_0 (B, d) float32.
            history: (B, H) int64, oldest first, -1 on the right.
            users: (B,) int64, whose own rows are left out; None for strangers.
        """
        states, found = [start], []
        known = np.empty((len(start), 0), np.int64)
        basket = None
        if self.look_ups and self.settings.by == "items":
            basket = self.memory.baskets(latest_first(history.cpu().numpy()))
        for number in range(self.look_ups):
            if self.random is not None:
                rows = self._drawn(len(start), users, number)
                cosine = np.where(rows >= 0, 0.0, -np.inf).astype(np.float32)
            else:
                k = self.settings.neighbours
                search, query = (
                    (self.memory.search, states[-1].cpu().numpy())
                    if basket is None
                    else (self.memory.search_items, basket)
                )
                nearest = search(query, k, users=users, known=known)
                rows, cosine = nearest.rows, nearest.cosine
            scores = torch.from_numpy(cosine).to(start.device) / self.settings.temperature
            look_up = LookUp(rows, torch.softmax(scores, 1).nan_to_num_(0.0))
            found.append(look_up)
            known = np.concatenate([known, rows], axis=1)
            if basket is None:
                states.append(self.moved(states[-1], look_up))
            else:
                states.append(states[-1])
                basket = self._filled(basket, look_up)
        return EvidenceTrace(tuple(found), torch.stack(states, 1))

    def _filled(self, basket: scipy.sparse.csr_matrix, look_up: LookUp) -> scipy.sparse.csr_matrix:
        """The basket (B, items) of length 1 with the items that were taken most, `move` long."""
        if not self.settings.move:
            return basket
        width = basket.shape[1]
        weights, items = self.evidence(look_up)[:, :width].topk(min(_TOP, width), dim=1)
        weights = self.settings.move * torch.nn.functional.normalize(weights, dim=1)
        row = np.repeat(np.arange(len(items)), items.shape[1])
        entries = (weights.cpu().numpy().ravel(), (row, items.cpu().numpy().ravel()))
        return (basket + scipy.sparse.csr_matrix(entries, shape=basket.shape)).tocsr()

    def _drawn(self, count: int, users: np.ndarray | None, number: int) -> np.ndarray:
        """Random rows (count, k) of others, fixed for each user by the seed."""
        rng = np.random.default_rng(derive_seed(self.random, "random evidence", number))
        first = rng.integers(0, len(self.memory), self.settings.neighbours)
        whom = np.zeros(count, np.int64) if users is None else users
        rows = (first + whom[:, None] * _STRIDE) % len(self.memory)
        if users is not None:
            rows[self.memory.users[rows] == users[:, None]] = -1
        return rows

    def moved(self, state: torch.Tensor, look_up: LookUp) -> torch.Tensor:
        """s + move |s| e / |e|, e the weighted vectors of the items taken next."""
        if not self.settings.move:
            return state
        items, weights = self._taken(look_up)
        thought = torch.einsum("bk,bkd->bd", weights, self.vectors[items])
        length = thought.norm(dim=1, keepdim=True).clamp(min=_TINY)
        return state + self.settings.move * state.norm(dim=1, keepdim=True) * thought / length

    def _taken(self, look_up: LookUp, after: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (B, k) that the rows' users took `after` further steps on, and their weights."""
        items = self.memory.taken[look_up.rows, after].astype(np.int64)
        there = torch.from_numpy((items >= 0) & (look_up.rows >= 0)).to(look_up.weights.device)
        chosen = torch.from_numpy(items.clip(min=0)).to(look_up.weights.device)
        return chosen, look_up.weights * there

    def evidence(self, look_up: LookUp) -> torch.Tensor:
        """E (B, N): the distribution of what the found users took; zeros where none was found."""
        found = look_up.weights.new_zeros(len(look_up.weights), len(self.vectors))
        share = 1.0
        for after in range(self.memory.taken.shape[1]):
            items, weights = self._taken(look_up, after)
            found.scatter_add_(1, items, share * weights)
            share *= self.settings.decay
            if not share:
                break
        return found / found.sum(1, keepdim=True).clamp(min=_TINY)

    def log_scores(self, history: torch.Tensor, trace: EvidenceTrace) -> torch.Tensor:
        """Scores (B, N) float32, before items are left out.

        Args:
            history: (B, H) int64, -1 on the right.
        """
        settings = self.settings
        scores = torch.log_softmax(trace.states[:, -1] @ self.vectors.T, 1)
        if trace.look_ups and settings.weight:
            found = sum(self.evidence(look_up) for look_up in trace.look_ups)
            scores = scores + torch.log1p(found * (settings.weight / len(trace.look_ups)))
        return repeats(scores, history, settings.repeat)

    @torch.no_grad()
    def rank(
        self,
        history: torch.Tensor,
        k: int,
        *,
        users: np.ndarray | None = None,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> Ranking:
        """The k best items of each history (`evaluation.evaluate.Recommender`)."""
        history = history.to(self.vectors.device)
        trace = self.think(self.ranker.states(history), history, users)
        scores = self.log_scores(history, trace)
        if exclude is not None:
            rows = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
            scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(exclude))] = -torch.inf
        best, items = scores.topk(min(k, scores.shape[1]), dim=1)
        return Ranking(items.masked_fill(best == -torch.inf, -1), best)

    def reasons(self, look_up: LookUp, user: int, count: int = 3) -> list[tuple[list[int], int]]:
        """The heaviest rows of one user's look-up: (what those users had, what they took next)."""
        order = torch.argsort(look_up.weights[user], descending=True)[:count].cpu().numpy()
        rows = [row for row in look_up.rows[user, order] if row >= 0]
        recent, taken = self.memory.recent, self.memory.taken
        return [([int(i) for i in recent[row] if i >= 0], int(taken[row, 0])) for row in rows]


def latest_first(history: np.ndarray) -> np.ndarray:
    """(B, H) histories, oldest first and -1 on the right, as baskets: latest first."""
    lengths = (history >= 0).sum(1)[:, None]
    places = lengths - 1 - np.arange(history.shape[1])
    return np.where(places >= 0, np.take_along_axis(history, places.clip(min=0), 1), -1)


def repeats(scores: torch.Tensor, history: torch.Tensor, bonus: float) -> torch.Tensor:
    """Scores (B, N) with `bonus` added once to each item of the history (B, H), -1 ignored."""
    seen = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    seen.scatter_(1, history % (scores.shape[1] + 1), True)  # -1 falls on the column that goes
    return scores + bonus * seen[:, :-1]
