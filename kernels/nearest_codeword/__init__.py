"""nearest_codeword: exact nearest neighbour of every row among the rows of a codebook."""

from .. import checks
from ..dispatch import implementation

__all__ = ["nearest_codeword"]


def nearest_codeword(x, codebook, *, backend=None):
    """The nearest codeword of every row, and its squared Euclidean distance (Eq. 12's argmin).

        index[n] = argmin_k ||x[n] - codebook[k]||^2        (the lowest k on exact ties)

    Exact: the ordering is that of the float64 sums over d = 0, 1, ... of (x[n,d] - c[k,d])^2;
    faster arithmetic only proposes candidates within a proven error bound. A row's answer does
    not depend on the other rows, on threads or on chunk sizes. The (N, K) distances are never
    stored by the numba and triton backends.

    x: (N, D) float32 or bfloat16, any strides. codebook: (K, D) float32 or bfloat16, K >= 1.
    backend: "auto", "reference", "numba" or "triton"; None takes STREAMCTL_KERNELS.
    Returns index (N,) int64 and distance (N,) float32. Not differentiable.
    Raises KernelError for wrong shapes, dtypes or devices, for NaN or Inf, and for a backend
    that cannot run.
    """
    codebook = checks.codewords("codebook", codebook, ("K", "D"), None)
    x = checks.tensor("x", x, ("N", codebook.shape[1]), checks.FLOATS, codebook.device)
    return implementation(__name__, backend, x.device.type)(x, codebook)
