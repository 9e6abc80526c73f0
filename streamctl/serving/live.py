"""Items and users of the run plus those that arrived while serving, as the models see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamctl.baselines.popularity import Popularity
from streamctl.ranking import Recommender
from streamctl.runs import RunDir
from streamctl.serving.store import Changes, Refused, Store
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer import vectors as item_vectors
from streamctl.tokenizer.neighbours import nearest, unit

if TYPE_CHECKING:
    from streamctl.retrieval.evidence import Evidence
    from streamctl.tokenizer.tokenizer import Tokenizer


class LiveCatalog:
    """Follows the store, and grows what the served methods know.

    Attributes:
        removed: int64, items that nobody may be shown.
        vectors: float32 (N, D), of all items, in rows of length one; D = 0 without a tokenizer.
    """

    def __init__(self, run: RunDir, store: Store):
        self.run, self.store = run, store
        self.removed = np.empty(0, np.int64)
        self.size = store.base  # items there ever were
        self._numbers: dict[str, int] = {}  # of users who took something or were forgotten
        self._newcomers = 0
        self._parts: list[Any] = []  # methods, and those inside them
        self._counting: list[Evidence | Popularity] = []
        self._mark: dict[str, int] = {}  # of the last changes that were taken over
        self._stage = run.stage("tokenizer")
        self._tokenizer: Tokenizer | None = None
        self.vectors = np.empty((store.base, 0), np.float32)
        self._codes = np.empty((0, 0), np.int64)  # of the live items; -1 for those that are gone
        if self._stage.complete:
            self._ids = SemanticIds.load(self._stage)
            self.vectors = item_vectors(run)
            self._codes = np.empty((0, self._ids.levels), np.int64)

    def serve(self, recommender: Recommender) -> None:
        """Have a method know what came since, now and from now on."""
        self.follow()
        while (past := self.store.changes({})) and past.mark != self._mark:
            self.follow()  # others wrote meanwhile
        new: list[Evidence | Popularity] = []
        for part in _inside(recommender):
            self._parts.append(part)
            counting = part if isinstance(part, Popularity) else getattr(part, "evidence", None)
            if counting is not None and not any(counting is one for one in new):
                new.append(counting)
        self._counting += new
        self._grow()
        for counting in new if past else ():
            self._learn(counting, past)

    def known(self, recommender: Recommender) -> int:
        """How many items a method can read: those of the run, or all."""
        parts = [part for part in _inside(recommender) if not hasattr(part, "methods")]
        grows = all(
            isinstance(part, Popularity) or hasattr(part, "policy") or hasattr(part, "evidence")
            for part in parts
        )
        return self.size if grows else self.store.base

    def owner(self, user_id: str | None) -> int:
        """Under which number a user's own rows and counts are known; -1: under none."""
        if user_id is None or user_id in self._numbers:
            return self._numbers.get(user_id, -1)
        known = self.store.number_in_log(user_id)
        return -1 if known is None else known

    def follow(self) -> None:
        """Take over what was written to the store, by whichever process."""
        while news := self.store.changes(self._mark):
            unread = [one for one in news.items if one[2] is None] if self._stage.complete else []
            if unread:  # they were added to a run with another tokenizer
                codes, vectors = self.tokenize([one[1] for one in unread])
                with self.store.writing():
                    for one, code, vector in zip(unread, codes, vectors, strict=True):
                        self.store.set_codes(one[0], self.free(code), vector)
            else:
                self._take_over(news)

    def _take_over(self, news: Changes) -> None:
        live = news.mark.get("items", 0)
        self.size = self.store.base + live
        self.vectors = _longer(self.vectors, self.size)
        self._codes = _longer(self._codes, live, -1)
        if self._stage.complete and news.items:
            numbers = np.array([one[0] for one in news.items])
            self._codes[numbers - self.store.base] = [one[2] for one in news.items]
            self.vectors[numbers] = np.stack([one[3] for one in news.items])
        self._grow()
        self.removed = np.union1d(self.removed, np.array(news.removed, np.int64))
        for counting in self._counting:
            self._learn(counting, news)
        self._mark = news.mark

    def _grow(self) -> None:
        """Whatever knows fewer items than there are learns the rest."""
        base = self.store.base
        for counting in self._counting:
            if counting.n_items < self.size:
                counting.add_items(self.vectors[counting.n_items :])
        for part in self._parts:
            if hasattr(part, "policy"):
                known = part.policy.item_tokens
                tokens = part.policy.tokens.item_tokens(self._codes.clip(min=0))
                new = torch.from_numpy(tokens[len(known) - base :]).to(known)
                part.policy.item_tokens = torch.cat([known, new])
                held = np.flatnonzero(part.trie.leaf[base:] >= 0)
                live = np.setdiff1d(np.flatnonzero(self._codes[:, 0] >= 0), held)
                part.trie.add(base + live, tokens[live])

    def _learn(self, counting: Evidence | Popularity, news: Changes) -> None:
        for user in news.forgotten:
            counting.forget(self._number(user))
        counting.append_all([(self._number(user), items) for user, items in news.taken])

    def _number(self, user: str) -> int:
        """Under which number a user's interactions are counted from now on."""
        number = self.owner(user)
        if number < 0:
            number, self._newcomers = self.store.log_users + self._newcomers, self._newcomers + 1
        self._numbers[user] = number
        return number

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """int64 (n, learned levels) codes and float32 (n, dim) unit vectors of new texts.

        Raises:
            StreamctlError: the run has no tokenizer, or its encoder cannot be loaded.
        """
        if self._tokenizer is None:
            from streamctl.tokenizer.tokenizer import Tokenizer  # for its sake sklearn: seconds

            self._tokenizer = Tokenizer.load(self.run.require("tokenizer"))
        return self._tokenizer.encode(list(texts)), unit(self._tokenizer.vectors(list(texts)))

    def free(self, codes: np.ndarray) -> list[int]:
        """The codes, with the last one moved to the nearest that no present item has."""
        learned, book = codes.tolist(), self._stage.array("codebooks.npy")[-1]
        taken = self.store.last_codes(learned[: self._ids.levels - 1])
        return self._ids.nearest_free(learned, book, taken)

    def similar(self, item: int, k: int) -> list[tuple[int, float]]:
        """(item, cosine of their texts) of the k items most alike to one, best first."""
        if not self.vectors.shape[1]:
            raise Refused("unknown", "id", "the run has no item vectors: streamctl tokenize")
        most = k + 1 + len(self.removed)
        [found], [cosines] = nearest(self.vectors, self.vectors[[item]], most)
        there = ~np.isin(found, [item, *self.removed])
        return list(zip(found[there].tolist(), cosines[there].tolist(), strict=True))[:k]


def _inside(recommender: Recommender) -> Iterator[Any]:
    """A method, and those that it ranks the candidates of."""
    yield recommender
    for method in getattr(recommender, "methods", ()):
        yield from _inside(method)


def _longer(rows: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    more = (0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, more, constant_values=value)
