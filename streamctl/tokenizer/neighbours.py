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


def neighbours(vectors: np.ndarray, k: int) -> tuple[np.ndarray, dict[str, Any]]:
    """For each item the k items most alike by cosine, itself left out.

    Cosine and not distance: standardised text vectors of short texts are short too, and by
    distance the shortest would be everybody's neighbour.

    Args:
        vectors: (N, D) float32 of any length.

    Returns:
        (N, min(k, N - 1)) int64, best first, equal ones in index order; and how they were found:
        "index", `flat` (exact) up to 100,000 vectors or `ivf`, and "recall", the share of the exact
        ones.
    """
    rows, count = unit(vectors), min(k, len(vectors) - 1)
    index, report = _index(rows)
    out = np.empty((len(rows), count), np.int64)
    for start in range(0, len(rows), ROWS):
        found, _ = _sorted(*index.search(rows[start : start + ROWS], count + 1))
        own = np.arange(start, start + len(found))[:, None]
        # Where lists held too little: any other items.
        found = np.where(found < 0, (own + 1 + np.arange(count + 1)) % len(rows), found)
        other = found != own
        # An item with more than k exact copies may not find itself: then the last one goes.
        other[other.all(1), -1] = False
        order = np.argsort(~other, axis=1, kind="stable")[:, :count]
        out[start : start + ROWS] = np.take_along_axis(found, order, 1)
    return out, report


def _index(rows: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """A FAISS index of unit rows; of an inverted file so many lists are searched, twice as many at
    each try, as the wanted recall takes."""
    import faiss

    flat = faiss.IndexFlatIP(rows.shape[1])
    if len(rows) <= EXACT:
        flat.add(rows)
        return flat, {"index": "flat", "recall": 1.0}
    lists = int(2 * len(rows) ** 0.5)
    index = faiss.IndexIVFFlat(flat, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.train(rows)
    index.add(rows)
    sample = rows[:: len(rows) // SAMPLE][:SAMPLE]
    _, exact = faiss.knn(sample, rows, 10, metric=faiss.METRIC_INNER_PRODUCT)
    index.nprobe = 4
    while True:
        _, found = index.search(sample, 10)
        recall = float((found[:, :, None] == exact[:, None]).any(1).mean())
        if recall >= RECALL or index.nprobe >= lists:
            return index, {"index": "ivf", "recall": recall}
        index.nprobe = min(lists, 2 * index.nprobe)


def nearest(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of highest cosine with each query, exactly; equal ones in index order.

    Args:
        rows, queries: (N, D) and (Q, D) float32, all of length one.

    Returns:
        index (Q, min(k, N)) int64 and cosine (Q, min(k, N)) float32.
    """
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
        found, _ = nearest(vectors[:start], queries, k + SPARE)
        for row, query in enumerate(queries):
            candidates = np.append(found[row], np.arange(start, start + row))
            cosine = (vectors[candidates].astype(np.float64) * query).sum(1)
            out[start - first + row] = candidates[np.lexsort((candidates, -cosine))[:k]]
    return out


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) as float32 of length 1; a row of zeros stays."""
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
