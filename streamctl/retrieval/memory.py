"""Memory: state and items of each training prefix, and what its user took next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from streamctl.errors import StreamctlError
from streamctl.retrieval.baskets import BasketIndex, Found, Weighing
from streamctl.retrieval.growing import Growing
from streamctl.tokenizer.neighbours import unit

if TYPE_CHECKING:
    import faiss

Kind = Literal["flat", "ivf", "hnsw"]
STRANGER = -1  # the user of a row that belongs to nobody known
_ARRAYS = ("keys", "taken", "users", "recent")
_LINKS = 32  # neighbours that a node of the HNSW graph keeps
_LISTS_PER_ROOT = 4  # IVF: lists = 4 sqrt(rows), of which an eighth are read
_READ = 8


class Memory:
    """Rows (state, items, what was taken next), searched by the cosine of states or of items.

    States are compared by FAISS. Items are compared as baskets through inverted indexes, one for
    each way of weighing (`by_items`); an item's rarity is the root of its inverse frequency among
    the rows that the memory began with.

    Only interactions that train may be put in: a row made of a validation or test item would hand
    the answer to its own user. Rows of a user are never returned to that user.

    Attributes:
        kind: "flat" compares with every row; "ivf" reads the lists nearest to the query, "hnsw"
            walks a graph: both miss some rows and are many times faster on millions.
    """

    def __init__(
        self,
        keys: np.ndarray,
        taken: np.ndarray,
        users: np.ndarray,
        recent: np.ndarray,
        kind: Kind = "flat",
    ):
        """Index the rows.

        Args:
            keys: (R, d) float, of any length above zero. taken: (R, F). users: (R,).
            recent: (R, P).
            kind: of the index.

        Raises:
            ValueError: the arrays differ in their number of rows.
        """
        if not len(keys) == len(taken) == len(users) == len(recent):
            raise ValueError("a memory's arrays have one entry a row")
        self.kind: Kind = kind
        self._keys = Growing(unit(keys))
        self._taken = Growing(np.asarray(taken, np.int32))
        self._users = Growing(np.asarray(users, np.int64))
        self._recent = Growing(np.asarray(recent, np.int32))
        self._index = _build(self.keys, kind)
        self._rarity = self._rarities()
        self._rarest = np.sqrt(np.log(len(self) + 1))  # of an item that nobody took
        self._baskets: dict[Weighing, BasketIndex] = {}
        self._owned = np.bincount(self.users[self.users >= 0], minlength=1)

    @property
    def keys(self) -> np.ndarray:
        """(R, d) float32 of length 1."""
        return self._keys.rows

    @property
    def taken(self) -> np.ndarray:
        """(R, F) int32, the next item and the ones after it, -1 where there are none."""
        return self._taken.rows

    @property
    def users(self) -> np.ndarray:
        """(R,) int64 dense user index, or STRANGER."""
        return self._users.rows

    @property
    def recent(self) -> np.ndarray:
        """(R, P) int32, the last items of the prefix, latest first, -1 where it is shorter."""
        return self._recent.rows

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """What rows, vectors and lists take in memory; an HNSW graph adds 256 bytes a row."""
        lists = sum(index.bytes for index in self._baskets.values())
        return lists + sum(getattr(self, name).nbytes for name in _ARRAYS)

    def _rarities(self) -> np.ndarray:
        """(items,) float64, by how many rows took each item next."""
        taken = self.taken[:, 0]
        count = max(int(self.recent.max(initial=-1)), int(self.taken.max(initial=-1))) + 1
        times = np.bincount(taken[taken >= 0], minlength=count)
        return np.sqrt(np.log((len(self) + 1) / (times + 1)))

    def by_items(self, weighing: Weighing) -> BasketIndex:
        """The index of this way of weighing, made when it is first asked for."""
        if weighing not in self._baskets:
            self._baskets[weighing] = BasketIndex(self.recent, self._rarity, weighing)
        return self._baskets[weighing]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        users: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> Found:
        """The k nearest rows of other users that have not been found before.

        Args:
            queries: (B, d) float32.
            k: rows wanted for each.
            users: (B,) int64; rows of the query's own user are left out. None: strangers.
            known: (B, j) int64 rows to leave out, too.
        """
        queries = unit(queries)
        own = np.zeros(len(queries), np.int64)
        if users is not None:
            inside = (users >= 0) & (users < len(self._owned))
            own[inside] = self._owned[users[inside]]
        # As many more as could be dropped again; heavy users are searched apart from the rest.
        extra = own + (0 if known is None else known.shape[1])
        rows = np.full((len(queries), k), -1, np.int64)
        cosine = np.full((len(queries), k), -np.inf, np.float32)
        budget = 2 ** np.ceil(np.log2(np.maximum(extra, 1))).astype(np.int64)
        for size in np.unique(budget):
            part = np.flatnonzero(budget == size)
            near, found = self._index.search(queries[part], min(k + int(size), len(self)))
            keep = found >= 0
            if users is not None:
                strange = users[part] < 0
                keep &= (self.users[found] != users[part, None]) | strange[:, None]
            if known is not None:
                keep &= ~_contained(found, known[part])
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            kept = np.take_along_axis(keep, order, 1)
            width = order.shape[1]
            rows[part, :width] = np.where(kept, np.take_along_axis(found, order, 1), -1)
            scores = np.take_along_axis(near, order, 1)
            cosine[part, :width] = np.where(kept, scores, -np.inf)
        return Found(rows, cosine)

    def append(
        self, keys: np.ndarray, taken: np.ndarray, users: np.ndarray, recent: np.ndarray
    ) -> None:
        """Add rows, found by the next search: nothing is trained again.

        Args: as for the constructor, with this memory's d, F and P.
        """
        added, users = unit(keys), np.asarray(users, np.int64)
        taken, recent = np.asarray(taken, np.int32), np.asarray(recent, np.int32)
        self._index.add(added)
        for array, rows in (
            (self._keys, added), (self._taken, taken), (self._users, users),
            (self._recent, recent),
        ):  # fmt: skip
            array.extend(rows)
        known = users[users >= 0]
        more = int(known.max(initial=-1)) + 1 - len(self._owned)
        self._owned = np.pad(self._owned, (0, max(0, more)))
        np.add.at(self._owned, known, 1)
        new = max(int(recent.max(initial=-1)), int(taken.max(initial=-1))) + 1
        if new > len(self._rarity):
            more = np.full(new - len(self._rarity), self._rarest)
            self._rarity = np.append(self._rarity, more)
        for index in self._baskets.values():
            index.append(recent, self._rarity)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `load` needs; the index is built again from the keys."""
        return {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def load(cls, folder: Path, kind: Kind = "flat") -> Memory:
        """A memory whose arrays lie in `folder` as NAME.npy.

        Raises:
            StreamctlError: a file is missing or no such array.
        """
        try:
            arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS]
            return cls(*arrays, kind=kind)
        except (OSError, ValueError) as error:
            raise StreamctlError(
                f"the memory cannot be read: {error}", where=folder, run="streamctl evidence"
            ) from error


def _build(keys: np.ndarray, kind: Kind) -> faiss.Index:
    import faiss

    rows, width = keys.shape
    inner = faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _LINKS, inner)
        index.hnsw.efSearch = 256
    elif kind == "ivf":
        lists = max(1, min(int(_LISTS_PER_ROOT * rows**0.5), rows // 39))  # 39 rows train a list
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, inner)
        index.nprobe = max(1, lists // _READ)
        index.train(keys)
    else:
        index = faiss.IndexFlatIP(width)
    index.add(keys)
    return index


def _contained(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether found[b, i] is among known[b]: (B, k) bool."""
    sorted_ = np.sort(known, axis=1)
    # Rows are shifted apart so that one sorted array serves all of them.
    span = int(max(found.max(initial=0), known.max(initial=0))) + 2
    base = np.arange(len(found))[:, None] * span
    flat = (sorted_ + base).ravel()
    place = np.searchsorted(flat, (found + base).ravel()).clip(max=max(len(flat) - 1, 0))
    hit = flat[place] == (found + base).ravel() if len(flat) else np.zeros(found.size, bool)
    return hit.reshape(found.shape)
