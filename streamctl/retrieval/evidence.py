"""Evidence: the items that a user's history brings to mind, hop by hop, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from streamctl.kernels import compiled, threads
from streamctl.retrieval import gathering
from streamctl.retrieval.memory import Memory
from streamctl.retrieval.transitions import NEXT, UNIT, Transitions, pair_weights
from streamctl.tokenizer.neighbours import earlier_neighbours, unit

HOPS = ("next", "alike", "next of next", "next of alike", "others", "own")
SIZES = (32, 32, 32, 16, 32, 0)  # the most pieces that each hop brings; 0 leaves it out
_TOGETHER = 8  # histories that one thread takes at a time
_TEXT = 3
_FEW = 64  # histories that are gathered sooner in plain Python than the hops are compiled
_AT_ONCE = 20  # interactions are counted at once in the time that one is appended in


@dataclass(frozen=True)
class Pieces:
    """The evidence of B users, a row each, in the order in which the hops found it.

    Attributes:
        items: (B, C) int32, -1 where a user has fewer.
        hops: (B, C) int8, the index in `HOPS` of the hop that brought it, -1 for none.
        strengths: (B, C, 6) float32, what every hop says of it, 0 for nothing.
        ranks: (B, C, 6) int16, its place in each hop, from 1; 0 where it is not among the first.
        text: (B, C, 3) float32, cosines of its vector with the last item's, with the mean of the
            last items', and the highest with any of them.
        sums: (B, 6) float32, the strength of all that a hop found.
        popularity: (B, C + 1) float32, log(1 + count) of each piece and, last, of the last item,
            what the user asked about took left out.
    """

    items: np.ndarray
    hops: np.ndarray
    strengths: np.ndarray
    ranks: np.ndarray
    text: np.ndarray
    sums: np.ndarray
    popularity: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, index: np.ndarray) -> Pieces:
        """Some users only."""
        return Pieces(*(getattr(self, field.name)[index] for field in fields(self)))

    def features(self) -> np.ndarray:
        """What a weighing or a ranker reads of each piece: (B, C, F) float32, 0 for no piece.

        For each hop log strength, share of the hop, 1/rank, whether it says anything, and log of
        the hop's whole strength; then the three cosines and the two popularities.
        """
        says = self.strengths > 0
        sums = np.maximum(self.sums, 1e-9)[:, None]
        width = self.items.shape[1]
        parts = (
            np.log(np.maximum(self.strengths, 1e-5)) * says,
            self.strengths / sums,
            np.where(self.ranks > 0, 1 / np.maximum(self.ranks, 1), 0),
            says,
            np.broadcast_to(np.log(np.maximum(sums, 1e-5)), self.strengths.shape),
            self.text,
            self.popularity[:, :-1, None],
            np.broadcast_to(self.popularity[:, -1:, None], (len(self), width, 1)),
        )
        features = np.concatenate([part.astype(np.float32) for part in parts], 2)
        return features * (self.items >= 0)[..., None]


FEATURES = (
    *(
        f"{what} of {hop}"
        for what in ("log strength", "share", "1/rank", "presence", "log sum")
        for hop in HOPS
    ),
    "cosine with the last item",
    "cosine with the mean of the last items",
    "highest cosine with one of them",
    "log popularity",
    "log popularity of the last item",
)


class Evidence:
    """Everything that the hops read: counts, memory, text neighbours.

    Attributes:
        sizes: (6,) the most pieces of each hop.
        nearest: rows of the memory that vote.
        popularity: (N,) float64, how often each item was taken, by what each time is worth.
    """

    def __init__(
        self,
        sequences: tuple[np.ndarray, np.ndarray],
        vectors: np.ndarray,
        neighbours: np.ndarray,
        *,
        sizes: Sequence[int] = SIZES,
        nearest: int = 100,
        weights: np.ndarray | None = None,
    ):
        """Count and index the training sequences.

        Args:
            sequences: items int32 (T,) and offsets int64 (U + 1,), `Split.training_sequences()`.
            vectors: (N, D) float32, the items' text. neighbours: (N, K) int, each item's nearest.
            weights: float32 (T,), what each interaction is worth as an event, counted in whole
                1/1024; by default 1, as is all that comes later.
        """
        self._items, self._offsets = sequences
        self.sizes, self.nearest = tuple(sizes), nearest
        self.vectors = unit(vectors)
        self.neighbours = np.ascontiguousarray(neighbours, np.int32)
        self._worth = None if weights is None else np.round(weights * UNIT).astype(np.int64)
        self._count()
        self._live: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # what has grown since
        self._live_rows: dict[int, list[int]] = {}
        self._scratch: list[tuple[np.ndarray, ...]] = []

    def _count(self, idf: np.ndarray | None = None) -> None:
        items, offsets, count = self._items, self._offsets, len(self.vectors)
        self.transitions = Transitions.count(items, offsets, count, worth=self._worth)
        self.memory = Memory.index(items, offsets, count, idf=idf, worth=self._worth)
        # Sums of whole units, so that what is taken out again leaves nothing behind.
        units = np.bincount(items, self._worth, count).astype(np.float64)
        self.popularity = units if self._worth is None else units / UNIT

    @property
    def n_items(self) -> int:
        return len(self.popularity)

    def _taken(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """What was counted of a user: int32 items, oldest first, and int64 units each is worth;
        nothing of a stranger."""
        if user in self._live:
            return self._live[user]
        known = 0 <= user < len(self._offsets) - 1
        part = slice(*self._offsets[user : user + 2]) if known else slice(0)
        items = np.ascontiguousarray(self._items[part], np.int32)
        return items, np.full(len(items), UNIT) if self._worth is None else self._worth[part]

    def gather(self, histories: np.ndarray, users: np.ndarray | None = None) -> Pieces:
        """What each history brings to mind.

        Args:
            histories: int64 (B, H), oldest first, -1 on the right.
            users: int64 (B,), whose own pairs and rows are taken out exactly; -1, or None for
                all: strangers.
        """
        histories = np.ascontiguousarray(histories, np.int64)
        batch, most, hops = len(histories), sum(self.sizes), len(HOPS)
        users = np.full(batch, -1) if users is None else np.asarray(users)
        mine = [self._taken(int(user)) for user in users]
        filled = (
            np.full((batch, most), -1, np.int32),
            np.full((batch, most), -1, np.int8),
            np.zeros((batch, most, hops), np.float32),
            np.zeros((batch, most, hops), np.int16),
            np.zeros((batch, most, _TEXT), np.float32),
            np.zeros((batch, hops), np.float32),
            np.zeros((batch, most + 1), np.float32),
        )
        arguments = (
            np.asarray(self.sizes, np.int64), pair_weights(), *self.transitions.followers.arrays,
            self.transitions.totals, *self.memory.arrays, self.vectors, self.neighbours,
            self.popularity,
        )  # fmt: skip

        plain = batch <= _FEW and not compiled.ready()
        gather_one = gathering.gather_one if plain else gathering.compiled()

        def run(first: int, last: int) -> None:
            scratch = self._take()
            for row in range(first, last):
                gather_one(
                    histories[row], users[row], *mine[row], *arguments, *scratch,
                    *(array[row] for array in filled),
                )  # fmt: skip
            self._scratch.append(scratch)

        threads.over_ranges(run, batch, _TOGETHER)
        return Pieces(*filled)

    def _take(self) -> tuple[np.ndarray, ...]:
        """Arrays of zeros that one thread works in; whoever takes them leaves zeros."""
        items, rows = self.n_items, self.memory.room
        while self._scratch:
            scratch = self._scratch.pop()
            if scratch[0].shape[1] >= items and len(scratch[4]) >= rows:
                return scratch
        width = max(self.nearest, gathering.SPREAD, sum(self.sizes))
        return (
            np.zeros((len(HOPS), items), np.float32),
            np.zeros((len(HOPS), items), np.int32),
            np.zeros(items, np.int32),
            np.zeros(items, np.int8),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.int32),
            np.zeros(width, np.int32),
            np.zeros(self.nearest, np.int32),
        )

    def append(self, user: int, items: Sequence[int]) -> None:
        """A user took some more items, oldest first: counts and rows as training makes them.

        Args:
            user: 0 or more; numbers of training's users are theirs, others are new.
        """
        sequence, worth = self._taken(user)
        rows = self._rows(user)
        for item in items:
            self.popularity[item] += 1
            if len(sequence):
                self.transitions.add(sequence, int(item))
                rows.append(self.memory.add(user, sequence, int(item)))
                for step, row in enumerate(rows[-2 : -len(NEXT) - 1 : -1], 1):
                    self.memory.followed(row, step, int(item))
            sequence = np.append(sequence, np.int32(item))
        self._live[user] = sequence, np.append(worth, np.full(len(items), UNIT))

    def append_all(self, taken: Sequence[tuple[int, Sequence[int]]]) -> None:
        """As `append` of each in turn; where they are many, everything is counted anew."""
        if sum(len(items) for _, items in taken) * _AT_ONCE < len(self._items):
            for user, items in taken:
                self.append(user, items)
            return
        later: dict[int, list[int]] = {}
        for user, items in taken:
            later.setdefault(user, []).extend(items)
        grown = dict(self._live)
        for user, new in later.items():
            sequence, worth = self._taken(user)
            more = np.array(new, np.int32), np.full(len(new), UNIT)
            grown[user] = np.append(sequence, more[0]), np.append(worth, more[1])
        changed = np.array(sorted(grown))
        owners = np.repeat(np.arange(len(self._offsets) - 1), np.diff(self._offsets))
        same = ~np.isin(owners, changed)
        rows, worth = zip(*(grown[user] for user in changed.tolist()), strict=True)
        owners = np.concatenate([owners[same], np.repeat(changed, [len(row) for row in rows])])
        order = np.argsort(owners, kind="stable")
        sizes = np.bincount(owners, minlength=len(self._offsets) - 1)
        self._items = np.concatenate([self._items[same], *rows])[order]
        if self._worth is not None:
            self._worth = np.concatenate([self._worth[same], *worth])[order]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._live, self._live_rows = {}, {}
        self._count(self.memory.idf)

    def _rows(self, user: int) -> list[int]:
        """The memory's rows of a user, oldest first; those of training lie user by user."""
        rows, sequence = self._live_rows.setdefault(user, []), self._taken(user)[0]
        if not rows and 0 <= user < len(self._offsets) - 1 and len(sequence):
            first = int(self._offsets[user]) - self._users_before(user)  # one less than items each
            rows.extend(range(first, first + len(sequence) - 1))
        return rows

    def forget(self, user: int) -> None:
        """Take out a user's pairs and rows; what the user takes from now on counts again."""
        sequence, worth = self._taken(user)
        for place, (item, units) in enumerate(zip(sequence.tolist(), worth.tolist(), strict=True)):
            self.transitions.remove(sequence[:place], item, units)
            self.popularity[item] -= units / UNIT
        self.memory.forget(self._rows(user))
        self._live[user], self._live_rows[user] = (sequence[:0], worth[:0]), []

    def _users_before(self, user: int) -> int:
        """Users before this one who have rows: those with a sequence."""
        return int((np.diff(self._offsets[: user + 1]) > 0).sum())

    def add_items(self, vectors: np.ndarray) -> None:
        """New items at the end of the catalogue, which nobody took yet.

        Each is a neighbour of the items before it, and takes the last place among its neighbours'
        neighbours where it is nearer: the same, however many come in one call.

        Args:
            vectors: (A, D) float32.
        """
        first, count = self.n_items, len(vectors)
        self.vectors = np.concatenate([self.vectors, unit(vectors)])
        self.popularity = np.concatenate([self.popularity, np.zeros(count)])
        self.transitions.add_items(count)
        self.memory.add_items(count)
        near = earlier_neighbours(self.vectors, first, self.neighbours.shape[1])
        self.neighbours = np.concatenate([self.neighbours, near.astype(np.int32)])
        for item in range(first, first + count):
            for other in self.neighbours[item]:
                last = self.neighbours[other, -1]
                near, far = self.vectors[[item, last]] @ self.vectors[other]
                if near > far:
                    self.neighbours[other, -1] = item
