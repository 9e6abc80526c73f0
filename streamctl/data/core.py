"""The filter: users and items with too few interactions go, until none is left that has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamctl.data.columns import chunks
from streamctl.data.sources.raw import RawLog
from streamctl.errors import StreamctlError

LEAVE_ONE_OUT = 3  # history, valid and test: a user with less cannot be evaluated


@dataclass(frozen=True)
class Core:
    """What the filter leaves.

    Attributes:
        users, items: int64 interactions of each raw code that are left; 0 where it is gone.
    """

    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        """Interactions left."""
        return int(self.users.sum())


def find_core(raw: RawLog, min_user: int, min_item: int) -> tuple[Core, dict[str, int]]:
    """(what is left, what each filter removed).

    An interaction stays while its user and its item do, so that memory holds a count for each of
    these and not a mark for each interaction.

    Raises:
        StreamctlError: nothing is left.
    """
    users = np.bincount(raw.users[:0], minlength=len(raw.user_ids))
    items = np.bincount(raw.items[:0], minlength=len(raw.item_ids))
    for part in chunks(len(raw.users), raw.users, raw.items):
        users += np.bincount(raw.users[part], minlength=len(users))
        items += np.bincount(raw.items[part], minlength=len(items))
    removed = {
        "min_user": min_user,
        "min_item": min_item,
        "rounds": 0,
        "interactions_of_short_users": 0,
        "interactions_of_rare_items": 0,
        "short_users": 0,
        "rare_items": 0,
    }
    here = items > 0
    while True:
        removed["rounds"] += 1
        short = (users > 0) & (users < min_user)
        removed["short_users"] += int(short.sum())
        removed["interactions_of_short_users"] += int(users[short].sum())
        users[short] = 0
        if short.any():
            items = _count(raw.users, users > 0, raw.items, items > 0)
        rare = (items > 0) & (items < min_item)
        removed["rare_items"] += int(rare.sum())
        removed["interactions_of_rare_items"] += int(items[rare].sum())
        items[rare] = 0
        if not rare.any():
            break
        users = _count(raw.items, items > 0, raw.users, users > 0)
    core = Core(users, items)
    removed["users"] = len(raw.user_ids) - int(np.count_nonzero(users))
    removed["items"] = int(np.count_nonzero(here)) - int(np.count_nonzero(items))
    if not len(core):
        raise StreamctlError(
            f"no usable interactions are left of {len(raw.users):,}: users with fewer than "
            f"{min_user} took {removed['interactions_of_short_users']:,}, items with fewer than "
            f"{min_item} took {removed['interactions_of_rare_items']:,}",
            where=raw.files[0] if raw.files else None,
            run=f"--min-user {LEAVE_ONE_OUT} --min-item 1 (a user needs {LEAVE_ONE_OUT} "
            "interactions: history, valid, test)",
        )
    return core, removed


def _count(by: np.ndarray, kept: np.ndarray, codes: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """int64: rows of each code that is alive, among those whose `by` is kept."""
    counts = np.zeros(len(alive), np.int64)
    for part in chunks(len(codes), by, codes):
        counts += np.bincount(codes[part][kept[by[part]]], minlength=len(counts))
    return np.where(alive, counts, 0)
