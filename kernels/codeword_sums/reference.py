"""The definition of codeword_sums, in float64 PyTorch."""

import torch

from .. import checks
from . import bad_index


def run(x, index, K, mask):
    live = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    wrong = live & ((index < -1) | (index >= K))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise bad_index(row, int(index[row]), K)
    live = live & (index >= 0)
    rows, index = x[live].double(), index[live]
    if not torch.isfinite(rows).all():
        bad = ~torch.isfinite(x).all(1) & live
        raise checks.not_finite(int(bad.nonzero()[0]))
    # A stable sort and a running difference would lose digits; one-hot products would not fit.
    # index_add_ runs in row order on the CPU, and CUDA has a deterministic one on request.
    sums = torch.zeros(K, x.shape[1], dtype=torch.float64, device=x.device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        sums.index_add_(0, index, rows)
    finally:
        torch.use_deterministic_algorithms(before)
    return sums.float(), torch.bincount(index, minlength=K)
