"""codeword_sums on the CPU: float64 partial sums over fixed parts of x, added in order."""

import numba
import numpy as np
import torch

from .. import checks, threads
from . import bad_index

# Parts of x with sums of their own. Shapes alone decide how many, so that the order of additions,
# and with it every bit of the result, is the same on any number of threads.
_PARTS = 8
_PART_BYTES = 32 << 20  # what all parts' sums may take together
_PART_ROWS = 4096  # fewer rows than this are not worth a part


@numba.njit(
    numba.int64(
        numba.float32[:, :],
        numba.uint16[:, :],
        numba.int64[:],
        numba.bool_[:],
        numba.int64,
        numba.int64,
        numba.float64[:, ::1],
        numba.int64[::1],
    ),
    nogil=True,
    cache=True,
)
def _add_rows(x, x_bits, index, mask, start, stop, sums, counts):
    """Add rows [start, stop); return the first row with a bad index, or -1."""
    width = sums.shape[1]
    row = np.empty(width, np.float32)
    row_bits = row.view(np.uint32)
    for n in range(start, stop):
        if mask.shape[0] and not mask[n]:
            continue
        k = index[n]
        if k == -1:
            continue
        if k < 0 or k >= sums.shape[0]:
            return n
        if x_bits.shape[0]:
            for d in range(width):
                row_bits[d] = np.uint32(x_bits[n, d]) << np.uint32(16)
        else:
            for d in range(width):
                row[d] = x[n, d]
        for d in range(width):
            sums[k, d] += np.float64(row[d])
        counts[k] += 1
    return -1


def run(x, index, K, mask):
    n, width = x.shape
    parts = min(_PARTS, -(-n // _PART_ROWS), max(1, _PART_BYTES // (8 * K * max(1, width))))
    sums = np.zeros((max(1, parts), K, width))
    counts = np.zeros((max(1, parts), K), np.int64)
    values, bits = np.empty((0, width), np.float32), np.empty((0, width), np.uint16)
    if x.dtype == torch.bfloat16:
        bits = x.view(torch.int16).numpy().view(np.uint16)
    else:
        values = x.numpy()
    live = np.empty(0, np.bool_) if mask is None else mask.numpy()
    index = index.numpy()
    step = max(1, -(-n // max(1, parts)))

    def add(start, stop):
        part = start // step
        return _add_rows(values, bits, index, live, start, stop, sums[part], counts[part])

    bad = [row for row in threads.over_ranges(add, n, step) if row >= 0]
    if bad:
        raise bad_index(min(bad), int(index[min(bad)]), K)
    for part in range(1, parts):
        sums[0] += sums[part]
        counts[0] += counts[part]
    total = sums[0]
    if not np.isfinite(total).all():
        raise _first_not_finite(x, index, mask)
    return torch.from_numpy(total.astype(np.float32)), torch.from_numpy(counts[0])


def _first_not_finite(x, index, mask):
    # Float64 sums of finite float32 values are finite, so a row is to blame.
    live = torch.from_numpy(index >= 0) if mask is None else torch.from_numpy(index >= 0) & mask
    bad = ~torch.isfinite(x).all(1) & live
    return checks.not_finite(int(bad.nonzero()[0]))
