"""Rows -> codes on the CPU, all levels in one pass: the Numba backend of two ops."""

import numba
import numpy as np
import torch

from . import checks, simd, threads
from .compiled import OPTIONS
from .cpu_search import (
    BF16,
    TILE,
    block_rows,
    make_scratch,
    pack_codebook,
    padded_width,
    search_block,
    squared_distance,
)

_RANGE = 8192  # most rows handed to a thread at a time

subtract = simd.subtract
_f32, _i64 = numba.float32, numba.int64
_SIGNATURE = _i64(
    # x, and the rows
    _f32[:, :],
    _i64,
    _i64,
    # _pack(): exact, centre, norms, words, bias; and whether the words are pairs of bf16
    _f32[:, :, ::1],
    _f32[:, ::1],
    numba.float64[:, ::1],
    _f32[:, :, :, ::1],
    _f32[:, ::1],
    numba.bool_,
    # outputs; residual or distance may have no rows
    _i64[:, ::1],
    _f32[:, ::1],
    _f32[::1],
    _i64,
)


@numba.njit(_SIGNATURE, **OPTIONS)
def _quantize_range(
    x, start, stop, exact, centre, norms, words, bias, pairs,
    codes, residual, distance, block,
):  # fmt: skip
    """Quantize rows [start, stop); return the first row that is not finite, or -1."""
    levels, size, padded = exact.shape
    width = x.shape[1]
    scratch = make_scratch(block, size, padded)
    rows = np.zeros((block, padded), np.float32)
    index = np.empty(block, np.int64)

    for first in range(start, stop, block):
        count = min(block, stop - first)
        for b in range(count):
            for d in range(width):
                rows[b, d] = x[first + b, d]
        for level in range(levels):
            book = (exact[level], words[level], bias[level], centre[level],
                    norms[level, 0], norms[level, 1])  # fmt: skip
            bad = search_block(rows, width, count, book, pairs, scratch, index)
            if bad >= 0:
                return first + bad
            for b in range(count):
                codes[first + b, level] = index[b]
                if residual.shape[0]:
                    row = rows.ctypes.data + b * padded * 4
                    subtract(row, exact.ctypes.data + (level * size + index[b]) * padded * 4, width)
        for b in range(count):
            if residual.shape[0]:
                for d in range(width):
                    residual[first + b, d] = rows[b, d]
            if distance.shape[0]:
                distance[first + b] = squared_distance(rows[b], exact[0, index[b]])
    return -1


def _pack(codebooks):
    """(L, K, D) codebooks as `search_block` reads them, in bf16 where it pays, else in float32."""
    levels, size, width = codebooks.shape
    exact = np.zeros((levels, size, padded_width(width)), np.float32)
    exact[:, :, :width] = codebooks.detach().float().numpy()
    centre = exact.mean(1)  # of rough precision: any point will do
    tiles, steps = -(-size // TILE), -(-width // 2) if BF16 else width
    words = np.empty((levels, tiles, steps, TILE), np.float32)
    bias, norms = np.empty((levels, tiles * TILE), np.float32), np.empty((levels, 2))
    for level in range(levels):
        norms[level] = pack_codebook(
            exact[level], width, centre[level], BF16, words[level], bias[level]
        )
    return exact, centre, norms, words, bias, BF16


def quantize(x, codebooks, *, want):
    """codes (N, L) int64 and, as `want` says, the "residual" (N, D) or the "distance" (N,)."""
    n, width = x.shape
    packed = _pack(codebooks)
    codes = torch.empty((n, len(codebooks)), dtype=torch.int64)
    residual = torch.empty((n if want == "residual" else 0, width), dtype=torch.float32)
    distance = torch.empty(n if want == "distance" else 0, dtype=torch.float32)
    values, block = x.float().numpy(), block_rows(width)
    outputs = (codes.numpy(), residual.numpy(), distance.numpy(), block)

    def run(start, stop):
        return _quantize_range(values, start, stop, *packed, *outputs)

    together = block * max(1, min(_RANGE, n // 4) // block)  # rows
    bad = [row for row in threads.over_ranges(run, n, together) if row >= 0]
    if bad:
        raise checks.not_finite(min(bad))
    return codes, residual if want == "residual" else distance
