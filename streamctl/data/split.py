"""The split: which part of each user's sequence is for training, validation and test.

Leave-one-out by default: the last item tests, the one before validates, all prefixes train. A log
that was split at moments, or came in parts of its own, has `cuts` for each user instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from streamctl.data.log import InteractionLog
from streamctl.errors import StreamctlError

HELD_OUT = 2  # interactions at the end of each user that never train: valid and test target


@dataclass(frozen=True)
class Examples:
    """(history, target) pairs as windows into the log; nothing is copied until it is asked for.

    Attributes:
        items: int32 (T,) the log's flat items.
        offsets: int64 (U + 1,) the log's user boundaries.
        users: int64 (E,), dense index of each example's user.
        start, end: int64 (E,); example e's history is items[start:end], oldest first, at most
            `Split.history` items of that user, and its target is items[end].
    """

    items: np.ndarray
    offsets: np.ndarray
    users: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.end)

    @property
    def targets(self) -> np.ndarray:
        """int64 (E,): the item to predict."""
        return self.items[self.end].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (E,): items of history."""
        return self.end - self.start

    def histories(self, index: np.ndarray) -> np.ndarray:
        """int64 (B, H): histories oldest first, padded on the right with -1.

        Args:
            index: int (B,) examples; H is the longest history among them.
        """
        start, lengths = self.start[index], self.lengths[index]
        steps = np.arange(lengths.max(initial=0))
        inside = steps < lengths[:, None]
        positions = np.where(inside, start[:, None] + steps, 0)
        return np.where(inside, self.items[positions].astype(np.int64), -1)

    def seen(self, index: np.ndarray) -> list[np.ndarray]:
        """For each example, int64: every item its user took before the target, to be masked.

        Unlike the history this reaches back to the user's first interaction.
        """
        first, last = self.offsets[self.users[index]], self.end[index]
        return [self.items[a:b].astype(np.int64) for a, b in zip(first, last, strict=True)]

    def subset(self, index: np.ndarray) -> Examples:
        """The examples at `index` (int (B,) or bool (E,)), in that order."""
        return Examples(
            self.items, self.offsets, self.users[index], self.start[index], self.end[index]
        )


class Split:
    """The three views of a log.

    Args:
        log: without `cuts` every user has at least 3 interactions.
        history: items of history a model sees, the latest ones.
        n_items: size of the catalogue; by default the largest item index + 1.

    Attributes:
        valid_from, test_from: int64 (U,) where in the log's items each user's validation and test
            begin; what comes before `valid_from` trains.

    Raises:
        StreamctlError: a user has fewer than 3 interactions.
    """

    def __init__(self, log: InteractionLog, history: int = 20, n_items: int | None = None):
        if log.cuts is not None:
            self.valid_from, self.test_from = log.cuts.T
        else:
            if log.n_users and log.lengths.min() <= HELD_OUT:
                user = log.user_ids[int(log.lengths.argmin())]
                raise StreamctlError(
                    f"user {user!r} has {log.lengths.min()} interactions; leave-one-out needs 3",
                    run="`streamctl data prepare` with --min-user 3 or more",
                )
            self.valid_from, self.test_from = log.offsets[1:] - 2, log.offsets[1:] - 1
        self.log = log
        self.history = history
        self.n_items = int(log.items.max(initial=-1)) + 1 if n_items is None else n_items

    @cached_property
    def train(self) -> Examples:
        """Every prefix, one item of history or more, of what trains of each user."""
        return self._targets(self.log.offsets[:-1], self.valid_from)

    @cached_property
    def valid(self) -> Examples:
        """What is to be predicted to validate: one example a user under leave-one-out, else each
        interaction with something before it."""
        return self._targets(self.valid_from, self.test_from)

    @cached_property
    def test(self) -> Examples:
        """What is to be predicted to test, as `valid`."""
        return self._targets(self.test_from, self.log.offsets[1:])

    def training_sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """The interactions that may train: all that counts, neighbours and models may look at.

        Returns:
            int32 (T',) items, oldest first, and int64 (U + 1,) offsets; user u has
            items[offsets[u]:offsets[u + 1]], under leave-one-out the first n - 2 interactions.
        """
        kept = self.valid_from - self.log.offsets[:-1]
        return self.log.items[self._trains()], np.concatenate([[0], np.cumsum(kept)])

    def training_weights(self) -> np.ndarray | None:
        """float32 (T',): what each of `training_sequences` is worth, or None: all the same."""
        return None if self.log.weights is None else self.log.weights[self._trains()]

    def popularity(self) -> np.ndarray:
        """(N,): how often each item occurs among the interactions that train.

        int64, or, where kinds of events have weights, float64 sums of these.
        """
        items, _ = self.training_sequences()
        return np.bincount(items, self.training_weights(), minlength=self.n_items)

    def count(self, first: np.ndarray, last: np.ndarray) -> int:
        """How many targets lie in [first, last) of each user (int64 (U,)) behind its first item."""
        return int(np.maximum(last - np.maximum(first, self.log.offsets[:-1] + 1), 0).sum())

    def _trains(self) -> np.ndarray:
        """bool (T,)."""
        return np.arange(len(self.log)) < np.repeat(self.valid_from, self.log.lengths)

    def _targets(self, first: np.ndarray, last: np.ndarray) -> Examples:
        """The examples whose target lies in [first, last) of its user and is not its first item."""
        first = np.maximum(first, self.log.offsets[:-1] + 1)
        counts = np.maximum(last - first, 0)
        user = np.repeat(np.arange(self.log.n_users), counts)
        within = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = first[user] + within
        start = np.maximum(self.log.offsets[user], end - self.history)
        return Examples(self.log.items, self.log.offsets, user.astype(np.int64), start, end)
