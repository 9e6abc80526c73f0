"""Exact nearest-codeword search over blocks of rows: shared by the Numba backends of two ops.

For a row x and any centre m, with x' = x - m and c' = c - m (m is the mean codeword: it keeps the
numbers small), argmin_k ||x - c_k||^2 = argmax_k s_k, s_k = x' . c'_k - ||c'_k||^2 / 2. `simd`
computes s_k fast but rounded: in bf16 where the machine can, else float32. `_margin` bounds the
error of any s_k by delta, so a codeword whose rounded score lies more than 2 delta below the best
cannot be nearest. If one codeword remains it is the answer; otherwise the few that remain are
compared by the float64 sums that define the op. The index is therefore exact, equal to the
reference's, whatever the precision of the fast pass.
"""

import math

import numba
import numpy as np

from . import simd
from .compiled import OPTIONS

LANES, ROWS, TILE, VECTORS = simd.LANES, simd.ROWS, simd.TILE, simd.VECTORS
_LANE_BYTES = 4 * LANES
_scan_f32, _scan_bf16 = simd.scan_f32, simd.scan_bf16
_pack_f32, _pack_bf16, sole_leader = simd.pack_f32, simd.pack_bf16, simd.sole_leader
BF16 = simd.HAS_BF16_DOT

# Sums may be reordered and vectorized; NaN and Inf keep their meaning, since they are tested for.
_REORDER = {"reassoc", "contract", "nsz"}
_HUGE = 1e37  # past this, float32 scores may overflow: every codeword is compared in float64
_SLAB = 128 << 10  # bytes of packed codewords that a block of rows is scanned against at a time
_PAD = np.float32(-3e38)  # bias of the codewords that fill up the last tile: never the best


@numba.njit(**OPTIONS)
def _pack_row(row, centre, rounded, packed, norms, width, bf16):
    """`simd.pack_*`, on addresses: norms[:] = upper bounds of ||x'|| and ||x' - packed x'||."""
    if bf16:
        _pack_bf16(row, centre, rounded, packed, norms.ctypes.data, width)
    else:
        _pack_f32(row, centre, rounded, packed, norms.ctypes.data, width)
    # What float32 sums of squares may lack: relative rounding, and squares that underflow.
    loose = 1 + (width + 8) * 2.0**-22
    tiny = 2.0**-63 * math.sqrt(width)
    norm = math.sqrt(np.float64(norms[0])) * loose + tiny
    # fl(row - centre) itself is off by half a unit in the last place.
    return norm, math.sqrt(np.float64(norms[1])) * loose + tiny + 2.0**-24 * norm


@numba.njit(fastmath=_REORDER, **OPTIONS)
def squared_distance(row, codeword):
    """Float64, summed in any order."""
    total = 0.0
    for d in range(row.shape[0]):
        difference = np.float64(row[d]) - np.float64(codeword[d])
        total += difference * difference
    return total


@numba.njit(**OPTIONS)
def pack_codebook(exact, width, centre, bf16, words, bias):
    """Lay one codebook out for `simd`; return bounds of max ||c'|| and max ||c' - packed c'||.

    exact: (K, padded width) float32. words: (tiles, steps, TILE) float32, each one a float32 or a
    pair of bf16. bias: (tiles * TILE,) = -||c'||^2 / 2.
    """
    size, padded = exact.shape
    steps = words.shape[1]
    longest, slipped = 0.0, 0.0
    rounded = np.zeros(padded + 2 * LANES, np.float32)
    packed = np.zeros(padded, np.float32)
    norms = np.zeros(2, np.float32)
    words[:] = 0
    bias[:] = _PAD
    for k in range(size):
        row = exact.ctypes.data + k * padded * 4
        norm, slip = _pack_row(
            row, centre.ctypes.data, rounded.ctypes.data, packed.ctypes.data, norms, width, bf16
        )
        for s in range(steps):
            words[k // TILE, s, k % TILE] = packed[s]
        bias[k] = -0.5 * squared_distance(exact[k], centre)
        longest, slipped = max(longest, norm), max(slipped, slip)
    return longest, slipped


@numba.njit(**OPTIONS)
def _margin(norm, slip, longest, slipped, width, tag_bits):
    """Twice a bound on |rounded score - true score|, over all codewords; inf if it may overflow."""
    size = 0.5 * longest * longest + (norm + slip) * (longest + slipped)  # of any partial sum
    if not size < _HUGE:
        return np.inf
    unit = 2.0**-23
    delta = slip * longest + (norm + slip) * slipped  # rounding the operands (Cauchy-Schwarz)
    delta += ((width + 4) * unit + 2.0**tag_bits * unit) * 1.01 * size  # the sum, and the tags
    delta += (width + 4) * 2.0**-50 * (norm + longest) ** 2  # the reference's own rounding
    delta += (width + 4) * 2.0**-124 * (1.0 + norm + longest)  # flushed subnormals
    return 2.0 * delta * (1 + 1e-6)


@numba.njit(**OPTIONS)
def _squared_distance_in_order(row, codeword, width):
    """Float64, summed over d in order without fused multiply-adds: bit for bit the reference's."""
    total = 0.0
    for d in range(width):
        difference = np.float64(row[d]) - np.float64(codeword[d])
        total += difference * difference
    return total


@numba.njit(**OPTIONS)
def _settle(row, exact, width, best, second, margin, tag_mask, candidates, distances):
    """The nearest of the codewords within `margin`."""
    size = exact.shape[0]
    tags = best.view(np.int32)
    top = best.max()
    floor = np.float32(np.float64(top) - margin)
    everything = not margin < np.inf
    found = 0
    for lane in range(LANES):
        if (
            everything or not second[lane] < floor
        ):  # more than one of this lane's codewords: take them all
            for k in range(lane, size, LANES):
                candidates[found] = k
                found += 1
        elif not best[lane] < floor:
            k = (tags[lane] & tag_mask) * LANES + lane
            if k < size:
                candidates[found] = k
                found += 1
    least = np.inf
    for i in range(found):
        distances[i] = squared_distance(row, exact[candidates[i]])
        least = min(least, distances[i])
    # Two float64 sums of the same non-negative terms differ by (D + 3) roundings at most.
    least *= 1 + (width + 4) * 2.0**-50
    index, shortest = np.int64(-1), np.inf
    for i in range(found):
        if distances[i] <= least:
            k = candidates[i]
            distance = _squared_distance_in_order(row, exact[k], width)
            if index < 0 or distance < shortest or (distance == shortest and k < index):
                index, shortest = k, distance
    return index


@numba.njit(**OPTIONS)
def search_block(rows, width, count, book, bf16, scratch, index):
    """index[b] = the nearest of the book's codewords to rows[b], for b < count.

    rows: (B, padded width) float32, zero beyond `width`; B a multiple of ROWS. book: (exact, words,
    bias, centre, longest, slipped) of one level. scratch: from `make_scratch`.
    Returns the first b whose row is not finite, or -1.
    """
    exact, words, bias, centre, longest, slipped = book
    packed, rounded, norms, best, second, margins, candidates, distances = scratch
    padded = exact.shape[1]
    tiles, steps = words.shape[0], words.shape[1]
    tag_bits = 0
    while (1 << tag_bits) < tiles * VECTORS:
        tag_bits += 1
    tag_mask = np.int32((1 << tag_bits) - 1)

    groups = -(-count // ROWS)
    for b in range(count):
        norm, slip = _pack_row(
            rows.ctypes.data + b * padded * 4, centre.ctypes.data, rounded.ctypes.data,
            packed.ctypes.data + b * padded * 4, norms, width, bf16,
        )  # fmt: skip
        margins[b] = _margin(norm, slip, longest, slipped, width, tag_bits)
    best[: groups * ROWS] = -np.inf
    second[: groups * ROWS] = -np.inf
    stride = packed.shape[1] * 4
    slab = max(1, _SLAB // (4 * steps * TILE))
    keep = np.int32(~tag_mask)
    codes, start = words.ctypes.data, bias.ctypes.data
    top, runner_up = best.ctypes.data, second.ctypes.data
    for first in range(0, tiles, slab):
        last = min(tiles, first + slab)
        for g in range(groups):
            at = g * ROWS * _LANE_BYTES
            x = packed.ctypes.data + g * ROWS * stride
            if bf16:
                _scan_bf16(
                    x, stride, codes, start, top + at, runner_up + at, steps, first, last, keep
                )
            else:
                _scan_f32(
                    x, stride, codes, start, top + at, runner_up + at, steps, first, last, keep
                )

    tags = best.view(np.int32)
    for b in range(count):
        lane = np.int64(-1)
        if margins[b] < np.inf:
            lane = sole_leader(top + b * _LANE_BYTES, runner_up + b * _LANE_BYTES, margins[b])
        elif not np.isfinite(rows[b]).all():
            return b
        if lane >= 0:
            index[b] = (tags[b, lane] & tag_mask) * LANES + lane
        else:
            index[b] = _settle(
                rows[b],
                exact,
                width,
                best[b],
                second[b],
                margins[b],
                tag_mask,
                candidates,
                distances,
            )
    return -1


@numba.njit(**OPTIONS)
def make_scratch(block, size, padded):
    """The buffers of `search_block` for blocks of `block` rows of `padded` width."""
    return (
        np.zeros((block, padded), np.float32),
        np.zeros(padded + 2 * LANES, np.float32),
        np.empty(2, np.float32),
        np.empty((block, LANES), np.float32),
        np.empty((block, LANES), np.float32),
        np.empty(block, np.float64),
        np.empty(size + LANES, np.int64),
        np.empty(size + LANES, np.float64),
    )


def padded_width(width):
    """Rows and codewords are padded with zeros to whole vectors."""
    return -(-width // LANES) * LANES


def block_rows(width):
    """Rows of a block: their float32 and packed copies stay in the L2 cache."""
    return ROWS * max(1, min(16, (256 << 10) // (8 * width * ROWS)))
