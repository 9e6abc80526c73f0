"""The live users: those of the log and those who came since, with all that they took."""

from __future__ import annotations

import numpy as np

from streamctl.data.log import InteractionLog


class LiveUsers:
    """Users by id, and their items, oldest first.

    Questions may be asked from any thread; `take` belongs to the model's.

    Args:
        log: the run's.
    """

    def __init__(self, log: InteractionLog):
        self._log = log
        self.ids = list(log.user_ids)
        self._index = {user: number for number, user in enumerate(self.ids)}
        self._since: dict[int, np.ndarray] = {}

    def index(self, user_id: str) -> int | None:
        """A user's dense number; those who came since are counted on from the log's."""
        return self._index.get(user_id)

    def taken(self, user: int) -> np.ndarray:
        """int64 (n,): all that a user took, oldest first."""
        since = self._since.get(user, np.empty(0, np.int64))
        if user >= self._log.n_users:
            return since
        return np.concatenate([self._log.of(user).astype(np.int64), since])

    def take(self, user_id: str, items: np.ndarray) -> None:
        """Add what a user, known or new, has taken now.

        Args:
            items: int64 (n,), oldest first.
        """
        user = self._index.get(user_id, len(self.ids))
        self._since[user] = np.concatenate([self._since.get(user, np.empty(0, np.int64)), items])
        if user == len(self.ids):
            self.ids.append(user_id)
            self._index[user_id] = user

    def beginning(self, letters: str, limit: int) -> dict[str, object]:
        """Users whose ids begin so, evenly over all of them."""
        found = [user for user in self.ids if user.startswith(letters)] if letters else self.ids
        step = max(1, len(found) // limit)
        return {"users": found[::step][:limit], "total": len(found)}
