"""Memory: state and items of each training prefix, and what its user took next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse

from streamctl.errors import StreamctlError
from streamctl.retrieval.neighbours import unit

if TYPE_CHECKING:
    import faiss

Kind = Literal["flat", "ivf", "hnsw"]
STRANGER = -1  # the user of a row that belongs to nobody known
_ARRAYS = ("keys", "taken", "users", "recent")
_AGE = 0.8  # weight of an item of a basket against the one taken after it
_LINKS = 32  # neighbours that a node of the HNSW graph keeps
_LISTS_PER_ROOT = 4  # IVF: lists = 4 sqrt(rows), of which an eighth are read
_READ = 8


@dataclass(frozen=True)
class Found:
    """The nearest rows of each query, best first.

    Attributes:
        rows: (B, k) int64, -1 where the memory has too few.
        cosine: (B, k) float32, -inf where there is no row.
    """

    rows: np.ndarray
    cosine: np.ndarray


class Memory:
    """Rows (state, items, what was taken next), searched by the cosine of states or of items.

    States are compared by FAISS. Items are compared as baskets through an inverted index, which
    touches only the rows that share one: an item weighs the root of its inverse frequency, and
    0.8 times less for each item taken after it.

    Only interactions that train may be put in: a row made of a validation or test item would hand
    the answer to its own user. Rows of a user are never returned to that user.

    Attributes:
        keys: (R, d) float32 of length 1.
        taken: (R, F) int32, the next item and the ones after it, -1 where there are none.
        users: (R,) int64 dense user index, or STRANGER.
        recent: (R, P) int32, the last items of the prefix, latest first, -1 where it is shorter:
            what makes a row readable.
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
        self.keys = unit(keys)
        self.taken = np.asarray(taken, np.int32)
        self.users = np.asarray(users, np.int64)
        self.recent = np.asarray(recent, np.int32)
        self._index = _build(self.keys, kind)
        self._refresh()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """What rows and vectors take in memory; an HNSW graph comes on top (256 bytes a row)."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def _refresh(self) -> None:
        known = self.users[self.users >= 0]
        self._owned = np.bincount(known) if len(known) else np.zeros(1, np.int64)
        taken = self.taken[:, 0]
        count = max(int(self.recent.max(initial=-1)), int(self.taken.max(initial=-1))) + 1
        times = np.bincount(taken[taken >= 0], minlength=count)
        self._rarity = np.sqrt(np.log((len(self) + 1) / (times + 1)))
        self._rows_of = self.baskets(self.recent).T.tocsr()  # (items, R)

    def baskets(self, recent: np.ndarray) -> scipy.sparse.csr_matrix:
        """Weighted items as rows of length 1.

        Args:
            recent: (B, P) int, latest first, -1 where there is none or one of no known rarity.

        Returns:
            (B, items) float32.
        """
        known = (recent >= 0) & (recent < len(self._rarity))
        row, age = np.nonzero(known)
        items = recent[row, age]
        shape = (len(recent), len(self._rarity))
        weights = (_AGE**age * self._rarity[items]).astype(np.float32)
        return _unit_rows(scipy.sparse.csr_matrix((weights, (row, items)), shape=shape))

    def search_items(
        self,
        baskets: scipy.sparse.csr_matrix,
        k: int,
        *,
        users: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> Found:
        """As `search`, by the cosine of baskets (B, items); rows that share nothing stay away."""
        shared = (_unit_rows(baskets) @ self._rows_of).tocsr()
        rows = np.full((baskets.shape[0], k), -1, np.int64)
        cosine = np.full((baskets.shape[0], k), -np.inf, np.float32)
        for place in range(len(rows)):
            part = slice(shared.indptr[place], shared.indptr[place + 1])
            found, near = shared.indices[part], shared.data[part]
            keep = near > 0
            if users is not None and users[place] >= 0:
                keep &= self.users[found] != users[place]
            if known is not None:
                keep &= ~np.isin(found, known[place])
            found, near = found[keep], near[keep]
            best = np.lexsort((found, -near))[:k]
            rows[place, : len(best)], cosine[place, : len(best)] = found[best], near[best]
        return Found(rows, cosine)

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
        added = unit(keys)
        self._index.add(added)
        self.keys = np.concatenate([self.keys, added])
        self.taken = np.concatenate([self.taken, np.asarray(taken, np.int32)])
        self.users = np.concatenate([self.users, np.asarray(users, np.int64)])
        self.recent = np.concatenate([self.recent, np.asarray(recent, np.int32)])
        self._refresh()

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


def _unit_rows(rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    length = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    return (scipy.sparse.diags(1 / np.maximum(length, 1e-12)) @ rows).astype(np.float32).tocsr()


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
