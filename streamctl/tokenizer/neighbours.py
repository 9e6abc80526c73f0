"""Items alike, by the cosine of their vectors (FAISS, exact)."""

from __future__ import annotations

import numpy as np

from streamctl.runs import RunDir

VECTORS = "item_vectors.npy"  # the artifact of the tokenizer stage


def vectors(run: RunDir) -> np.ndarray:
    """The item vectors of a run's tokenizer stage: (N, D) float32, rows of length one.

    A row of zeros belongs to an item whose text says nothing.

    Raises:
        StreamctlError: the stage is missing, damaged or stale.
    """
    return unit(run.require("tokenizer").array(VECTORS))


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of highest cosine with each query, best first; equal ones in index order.

    Cosine and not distance: standardised text vectors of short texts are short too, and by
    distance the shortest would be everybody's neighbour.

    Args:
        vectors: (N, D) float32. queries: (Q, D) float32.
        k: how many; no more than N are returned.

    Returns:
        index (Q, min(k, N)) int64 and cosine (Q, min(k, N)) float32.
    """
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(unit(vectors))
    cosine, found = index.search(unit(queries), min(k, len(vectors)))
    order = np.lexsort((found, -cosine))
    return np.take_along_axis(found, order, 1), np.take_along_axis(cosine, order, 1)


def neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    """For each item the k items most alike, itself left out: (N, min(k, N - 1)) int64."""
    count = min(k, len(vectors) - 1)
    found, _ = nearest(vectors, vectors, count + 1)
    other = found != np.arange(len(vectors))[:, None]
    # An item with more than k exact copies may not find itself: then the last one goes.
    other[other.all(1), -1] = False
    return found[other].reshape(len(vectors), count)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) as float32 of length 1; a row of zeros stays."""
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
