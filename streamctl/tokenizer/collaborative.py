"""Item vectors from who took what together: an aid of the tokenizer beside the items' texts.

Counts of items taken within a few steps of each other, as positive pointwise mutual information
(contexts smoothed by the power 0.75: Levy, Goldberg and Dagan, 2015), reduced by a truncated SVD.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from streamctl.data.split import Split

WIDTH = 64  # of the vectors
_STEPS = 5  # two items further apart were not taken together
_SMOOTHING = 0.75


def taken_together(split: Split, seed: int) -> np.ndarray:
    """(N, at most 64) float32: rows of length one about their mean, 0 for items without company.

    Training interactions alone are counted, a pair d steps apart as 1/d, times what its later
    event is worth where kinds of events have weights.
    """
    count = split.n_items
    items, offsets = split.training_sequences()
    items, user = items.astype(np.int64), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    weights = split.training_weights()
    weights = np.ones(len(items)) if weights is None else weights.astype(np.float64)
    pairs = scipy.sparse.csr_matrix((count, count))
    for step in range(1, _STEPS + 1):
        same = user[step:] == user[:-step]
        before, after = items[:-step][same], items[step:][same]
        counts = weights[step:][same] / step
        pairs = pairs + scipy.sparse.csr_matrix((counts, (before, after)), shape=pairs.shape)
    pairs = (pairs + pairs.T).tocoo()
    vectors = np.zeros((count, min(WIDTH, count - 1)), np.float32)
    if not pairs.nnz:
        return vectors
    often = np.asarray(pairs.sum(1)).ravel()
    context = often**_SMOOTHING / (often**_SMOOTHING).sum()
    with np.errstate(divide="ignore"):
        information = np.log(pairs.data / (often[pairs.row] * context[pairs.col]))
    positive = (np.maximum(information, 0), (pairs.row, pairs.col))
    matrix = scipy.sparse.csr_matrix(positive, shape=pairs.shape)
    from sklearn.decomposition import TruncatedSVD  # a second that answering need not wait

    reduced = TruncatedSVD(vectors.shape[1], random_state=seed % 2**32).fit_transform(matrix)
    length = np.linalg.norm(reduced, axis=1)
    company = length > 0
    unit = reduced[company] / length[company, None]
    vectors[company] = unit - unit.mean(0)
    return vectors


def join(text: np.ndarray, together: np.ndarray, weight: float) -> np.ndarray:
    """Text vectors (n, dim), each turned to length sqrt(dim), and `weight` times the others.

    Args:
        together: (n, d) of `taken_together`; zeros for items that nobody has taken yet.

    Returns:
        (n, dim + d) float32.
    """
    unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-9)
    joined = np.concatenate([unit, weight * together], axis=1)
    return (joined * text.shape[1] ** 0.5).astype(np.float32)
