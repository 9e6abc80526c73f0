"""The definition of nearest_codeword, in float64 PyTorch."""

import torch

from .. import checks

# Rows at a time: bounds the float64 (rows, K) buffers near 32 MB; no row's result depends on it.
_BUFFER = 4 << 20


def run(x, codebook):
    n, k = x.shape[0], codebook.shape[0]
    index = torch.empty((n,), dtype=torch.int64, device=x.device)
    distance = torch.empty((n,), dtype=torch.float32, device=x.device)
    step = max(1, _BUFFER // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        block = x[rows].double()
        bad = ~torch.isfinite(block).all(1)
        if bad.any():
            raise checks.not_finite(start + int(bad.nonzero()[0]))
        found = squared_distances(block, codebook.double())
        best = found.amin(1)
        # min() may return any of several equal minima on CUDA; the contract is the lowest.
        index[rows] = (found == best[:, None]).int().argmax(1)
        distance[rows] = best.float()
    return index, distance


def squared_distances(x, codebook):
    """(N, K) float64, summed over d in order: the order in which the fast backends re-check."""
    total = x.new_zeros(x.shape[0], codebook.shape[0])  # (N, K)
    for d in range(x.shape[1]):
        difference = x[:, d, None] - codebook[None, :, d]
        total += difference * difference
    return total
