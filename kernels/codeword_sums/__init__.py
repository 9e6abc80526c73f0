"""codeword_sums: what k-means and EMA codebook updates need of an assignment."""

import torch

from .. import checks
from ..dispatch import KernelError, implementation

__all__ = ["codeword_sums"]


def codeword_sums(x, index, K, *, mask=None, backend=None):
    """Sum of the rows assigned to each codeword, and how many there are.

        sums[k] = sum of x[n] over index[n] = k;   counts[k] = how many

    Deterministic: float64 accumulation in an order that depends on the shapes alone, never on
    threads; rounded to float32 once.

    x: (N, D) float32 or bfloat16, any strides. index: (N,) int64 in [-1, K); rows with -1 (as
        nearest_codeword writes for padding) are left out. K: int >= 1.
    mask: optional (N,) bool; False rows are left out (their x and index are not read).
    backend: as in nearest_codeword.
    Returns sums (K, D) float32 and counts (K,) int64.
    Raises KernelError for wrong shapes, dtypes or devices, for an index outside [-1, K), for
    NaN or Inf, and for a backend that cannot run.
    """
    x = checks.tensor("x", x, ("N", "D"), checks.FLOATS)
    index = checks.tensor("index", index, (x.shape[0],), (torch.int64,), x.device)
    if isinstance(K, bool) or not isinstance(K, int) or K < 1:
        raise KernelError(f"K must be an int >= 1, got {K!r}")
    mask = checks.row_mask(mask, x.shape[0], x.device)
    return implementation(__name__, backend, x.device.type)(x, index, K, mask)


def bad_index(row, value, K):
    """The error for an index that names no codeword."""
    return KernelError(f"index must lie in [-1, {K}), got {value} in row {row}")
