"""The definition of nearest_codeword, in float64 PyTorch."""

import torch

from .. import checks

# Rows at a time: bounds the float64 (rows, K) buffers near 32 MB; no row's result depends on it.
_BUFFER = 4 << 20


def run(x, codebook, mask):
    n, k = x.shape[0], codebook.shape[0]
    index = torch.full((n,), -1, dtype=torch.int64, device=x.device)
    distance = torch.zeros((n,), dtype=torch.float32, device=x.device)
    step = max(1, _BUFFER // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        block = x[rows].double()
        live = torch.ones(len(block), dtype=torch.bool, device=x.device)
        live = live if mask is None else mask[rows]
        if not torch.isfinite(block[live]).all():
            bad = ~torch.isfinite(block).all(1) & live
            raise checks.not_finite(start + int(bad.nonzero()[0]))
        best, which = squared_distances(block, codebook.double()).min(1)
        # min() may return any of several equal minima on CUDA; the contract is the lowest.
        which = _lowest_argmin(block, codebook, best) if x.is_cuda else which
        index[rows] = torch.where(live, which, -1)
        distance[rows] = torch.where(live, best, 0.0).float()
    return index, distance


def squared_distances(x, codebook):
    """(N, K) float64, summed over d in order: the order in which the fast backends re-check."""
    total = x.new_zeros(x.shape[0], codebook.shape[0])  # (N, K)
    for d in range(x.shape[1]):
        difference = x[:, d, None] - codebook[None, :, d]
        total += difference * difference
    return total


def _lowest_argmin(x, codebook, best):
    equal = squared_distances(x, codebook.double()) == best[:, None]
    return equal.int().argmax(1)
