"""Text neighbours: nearest items by cosine (FAISS: exact, or IVF for large catalogues)."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamctl.runs import RunDir

VECTORS = "item_vectors.npy"  # the artifact of the tokenizer stage
EXACT = 100_000  # vectors up to which every pair is compared
RECALL = 0.95  # of the exact neighbours, which an inverted file is made to find
SAMPLE = 500  # vectors on which that is measured
ROWS = 16_384  # queries at once
TOGETHER = 256  # new items at once: each is compared with those of the call before it, too
SPARE = 16  # candidates beyond the wanted ones


def vectors(run: RunDir) -> np.ndarray:
    """The item vectors of a run's tokenizer stage: (N, D) float32, rows of length one.

    A row of zeros belongs to an item whose text says nothing.

    Raises:
        StreamctlError: the stage is missing, damaged or stale.
    """
    return unit(run.require("tokenizer").array(VECTORS))


class VectorIndex:
    """Vectors to be searched by cosine.

    Cosine and not distance: standardised text vectors of short texts are short too, and by
    distance the shortest would be everybody's neighbour.

    Attributes:
        recall: share of the exact neighbours that are found; 1 up to 100,000 vectors.
    """

    def __init__(self, vectors: np.ndarray):
        """vectors: (N, D) float32 of any length."""
        import faiss

        rows = unit(vectors)
        self.recall = 1.0
        self._index = faiss.IndexFlatIP(rows.shape[1])
        if len(rows) <= EXACT:
            self._index.add(rows)
            return
        lists = int(2 * len(rows) ** 0.5)
        flat = self._index
        self._index = faiss.IndexIVFFlat(flat, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.max_points_per_centroid = 64
        self._index.train(rows)
        self._index.add(rows)
        self._tune(rows, lists)

    def _tune(self, rows: np.ndarray, lists: int) -> None:
        """Search as many lists as the wanted recall takes, twice as many at each try."""
        import faiss

        sample = rows[:: len(rows) // SAMPLE][:SAMPLE]
        _, exact = faiss.knn(sample, rows, 10, metric=faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = 4
        while True:
            found, _ = self.search(sample, 10)
            hits = (found[:, :, None] == exact.astype(np.int64)[:, None]).any(1)
            self.recall = float(hits.mean())
            if self.recall >= RECALL or self._index.nprobe >= lists:
                return
            self._index.nprobe = min(lists, 2 * self._index.nprobe)

    @property
    def kind(self) -> str:
        """`flat` (exact) or `ivf`."""
        return "ivf" if hasattr(self._index, "nprobe") else "flat"

    def report(self) -> dict[str, Any]:
        """Kind and recall@10."""
        return {"index": self.kind, "recall": self.recall}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k vectors of highest cosine with each query, best first; equal ones in index order.

        Args:
            queries: (Q, D) float32. k: how many; no more than N are returned.

        Returns:
            index (Q, min(k, N)) int64 and cosine (Q, min(k, N)) float32; where an inverted file
            finds fewer, -1 and the least float.
        """
        return _sorted(*self._index.search(unit(queries), min(k, self._index.ntotal)))


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`VectorIndex.search` in vectors that are asked once: exact, however many there are."""
    return _nearest(unit(vectors), unit(queries), k)


def _nearest(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in rows of length one, which are not copied."""
    import faiss

    count = min(k, len(rows))
    return _sorted(*faiss.knn(queries, rows, count, metric=faiss.METRIC_INNER_PRODUCT))


def _sorted(cosine: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, cosine) best first, equal ones in index order."""
    order = np.lexsort((found, -cosine))
    found = np.take_along_axis(found, order, 1).astype(np.int64)
    return found, np.take_along_axis(cosine, order, 1)


def earlier_neighbours(vectors: np.ndarray, first: int, k: int) -> np.ndarray:
    """For each item from `first` on the k most alike of the items before it: (N - first, k) int64.

    An item's neighbours do not depend on which others are asked for in the same call. FAISS rounds
    by how many that are, so it finds some more than k, and float64 puts them in order.

    Args:
        vectors: (N, D) float32 unit rows. first: k or more.
    """
    out = np.empty((len(vectors) - first, k), np.int64)
    for start in range(first, len(vectors), TOGETHER):
        queries = vectors[start : start + TOGETHER]
        found, _ = _nearest(vectors[:start], queries, k + SPARE)
        for row, query in enumerate(queries):
            candidates = np.append(found[row], np.arange(start, start + row))
            cosine = (vectors[candidates].astype(np.float64) * query).sum(1)
            out[start - first + row] = candidates[np.lexsort((candidates, -cosine))[:k]]
    return out


def neighbours(vectors: np.ndarray, k: int, index: VectorIndex | None = None) -> np.ndarray:
    """For each item the k items most alike, itself left out: (N, min(k, N - 1)) int64."""
    index = index or VectorIndex(vectors)
    count = min(k, len(vectors) - 1)
    out = np.empty((len(vectors), count), np.int64)
    for start in range(0, len(vectors), ROWS):
        found, _ = index.search(vectors[start : start + ROWS], count + 1)
        own = np.arange(start, start + len(found))[:, None]
        if index.kind == "ivf":  # lists that held too little: any other items
            found = np.where(found < 0, (own + 1 + np.arange(count + 1)) % len(vectors), found)
        other = found != own
        # An item with more than k exact copies may not find itself: then the last one goes.
        other[other.all(1), -1] = False
        order = np.argsort(~other, axis=1, kind="stable")[:, :count]
        out[start : start + ROWS] = np.take_along_axis(found, order, 1)
    return out


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) as float32 of length 1; a row of zeros stays."""
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
