"""An array whose rows grow in place."""

from __future__ import annotations

import numpy as np


class Growing:
    """Rows with room for more, so that adding a few does not copy all of them.

    Attributes:
        rows: what there is, a view; views handed out before stay as they were.
    """

    def __init__(self, rows: np.ndarray):
        self._room = self.rows = rows

    def extend(self, rows: np.ndarray) -> None:
        """Add rows at the end; the room doubles when it is used up."""
        count = len(self.rows)
        total = count + len(rows)
        if total > len(self._room):
            room = np.empty((max(total, 2 * count), *self.rows.shape[1:]), self.rows.dtype)
            room[:count] = self.rows
            self._room = room
        self._room[count:total] = rows
        self.rows = self._room[:total]
