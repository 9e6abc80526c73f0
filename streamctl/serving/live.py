"""The run's items and users with those that came since, as the models see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from streamctl.data import Split
from streamctl.ranking import Recommender
from streamctl.runs import RunDir
from streamctl.serving.store import Refused, Store
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer import vectors as item_vectors
from streamctl.tokenizer.neighbours import nearest, unit

if TYPE_CHECKING:
    from streamctl.tokenizer.tokenizer import Tokenizer


class LiveCatalog:
    """Follows the store, and grows what the served methods know.

    Attributes:
        removed: int64, items that nobody may be shown.
    """

    def __init__(self, run: RunDir, store: Store, split: Split):
        self.run, self.store = run, store
        self.removed = np.empty(0, np.int64)
        self._counts = np.bincount(split.log.items, minlength=store.base)
        self._n_users = split.log.n_users
        self._newcomers: dict[str, int] = {}
        self._served: list[Recommender] = []
        self._seen = {"version": -1, "number": 0, "removed": 0, "taken": 0, "forgotten": 0}
        self._stage = run.stage("tokenizer")
        self._tokenizer: Tokenizer | None = None
        self._live = np.empty(0, np.int64), np.empty((0, 0), np.int64)  # items and their codes
        self._vectors = np.empty((store.base, 0), np.float32)
        if self._stage.complete:
            self._ids = SemanticIds.load(self._stage)
            self._vectors = item_vectors(run)
            self._live = np.empty(0, np.int64), np.empty((0, self._ids.levels), np.int64)

    def serve(self, recommender: Recommender) -> None:
        """Have a method know what came since, now and from now on."""
        self.follow()
        self._served.append(recommender)
        self._grow(recommender, *self._live)
        self._learn(recommender, self.store.taken_since(0)[0])

    def known(self, recommender: Recommender) -> int:
        """How many items a method can read: those of the run, or all."""
        return len(self._counts) if hasattr(recommender, "grow") else self.store.base

    def owner(self, user: int, user_id: str | None) -> int:
        """Under which number a user's own rows and counts are known; -1: under none."""
        return user if user >= 0 or user_id is None else self._newcomers.get(user_id, -1)

    def follow(self) -> None:
        """Take over what was written to the store, by whichever process."""
        seen, store = self._seen, self.store
        version = store.version(), store.changes()
        if version == seen["version"]:
            return
        self.add(store.added_since(seen["number"]))
        gone, seen["removed"] = store.removed_since(seen["removed"])
        self.removed = np.union1d(self.removed, np.array(gone, np.int64))
        taken, seen["taken"] = store.taken_since(seen["taken"])
        for _, items in taken:
            np.add.at(self._counts, items, 1)
        for recommender in self._served:
            self._learn(recommender, taken)
        seen["number"], seen["version"] = store.last_number(), version

    def add(self, items: Sequence[tuple[int, str, str, list[int] | None, np.ndarray]]) -> None:
        """Make live items known to all methods: codes, vectors, the trie, neighbours.

        Args:
            items: as `Store.added_since` gives them; without codes they get theirs here.
        """
        last = self.store.base + self.store.last_number()
        self._counts = np.pad(self._counts, (0, last - len(self._counts)))
        self._vectors = np.pad(self._vectors, ((0, last - len(self._vectors)), (0, 0)))
        if not items or not self._stage.complete:
            return
        unread = [place for place, one in enumerate(items) if one[3] is None]
        if unread:
            codes, vectors = self.tokenize([items[place][2] for place in unread])
            with self.store.writing():
                for place, code, vector in zip(unread, codes, vectors, strict=True):
                    free = self.free(code)
                    self.store.set_codes(items[place][0], free, vector)
                    items[place] = (*items[place][:3], free, vector)
        numbers = np.array([one[0] for one in items])
        codes = np.array([one[3] for one in items])
        self._vectors[numbers] = np.stack([one[4] for one in items])
        self._live = (
            np.concatenate([self._live[0], numbers]),
            np.concatenate([self._live[1], codes]),
        )
        for recommender in self._served:
            self._grow(recommender, numbers, codes)

    def _grow(self, recommender: Recommender, items: np.ndarray, codes: np.ndarray) -> None:
        if len(items) and hasattr(recommender, "grow"):
            recommender.grow(items, codes, self._vectors)

    def _learn(self, recommender: Recommender, taken: list[tuple[str, list[int]]]) -> None:
        if taken and hasattr(recommender, "learn"):
            recommender.learn(taken)

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
        """The codes, with the last one moved to the nearest that no present item has.

        Under a prefix whose last level is full the item shares the codes that are its own.
        """
        codes = [int(code) for code in codes]
        prefix, last = (codes, 0) if self._ids.dedup else (codes[:-1], codes[-1])
        order = np.arange(self._ids.sizes[-1])
        if not self._ids.dedup:
            book = self._stage.array("codebooks.npy")[-1]
            order = np.argsort(((book - book[last]) ** 2).sum(axis=1), kind="stable")
        held = self.store.last_codes(prefix)
        return [*prefix, next((code for code in order.tolist() if code not in held), last)]

    def similar(self, item: int, k: int) -> list[tuple[int, float]]:
        """(item, cosine of their texts) of the k items most alike to one, best first."""
        if not self._vectors.shape[1]:
            raise Refused("unknown", "id", "the run has no item vectors: streamctl tokenize")
        most = k + 1 + len(self.removed)
        found, cosines = nearest(self._vectors, self._vectors[item : item + 1], most)
        gone = np.isin(found[0], self.removed) | (found[0] == item)
        pairs = zip(found[0][~gone].tolist(), cosines[0][~gone].tolist(), strict=True)
        return list(pairs)[:k]

    def popular(
        self, k: int, exclude: Sequence[int], allow: Sequence[int] | None
    ) -> list[tuple[int, float]]:
        """(item, interactions) of the k items that were taken most often."""
        counts = self._counts.astype(np.float64)
        if allow is not None:
            mask = np.full(len(counts), True)
            mask[list(allow)] = False
            counts[mask] = -1
        counts[list(exclude)] = -1
        counts[self.removed] = -1
        best = np.argsort(-counts, kind="stable")[:k]
        return [(item, float(counts[item])) for item in best.tolist() if counts[item] >= 0]
