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

LANES, ROWS, TILE, VECTORS = simd.LANES, simd.ROWS, simd.TILE, simd.VECTORS
_LANE_BYTES = 4 * LANES
_scan_f32, _scan_bf16 = simd.scan_f32, simd.scan_bf16
BF16 = simd.HAS_BF16_DOT

# Sums may be reordered and vectorized; NaN and Inf keep their meaning, since they are tested for.
_REORDER = {"reassoc", "contract", "nsz"}
_HUGE = 1e37  # past this, float32 scores may overflow: every codeword is compared in float64
_SLAB = 128 << 10  # bytes of packed codewords that a block of rows is scanned against at a time
_PAD = np.float32(-3e38)  # bias of the codewords that fill up the last tile: never the best

_options = {"nogil": True, "cache": True}


@numba.njit(**_options)
def _round_bf16(bits):
    """The float32 with these bits rounded to the nearest bf16 (ties to even), as float32 bits."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)


@numba.njit(fastmath=_REORDER, **_options)
def _norms(exact, centre, near):
    """||exact - centre|| and ||(exact - centre) - near||, in float64."""
    square = 0.0
    slip = 0.0
    for d in range(exact.shape[0]):
        value = np.float64(exact[d]) - np.float64(centre[d])
        off = value - np.float64(near[d])
        square += value * value
        slip += off * off
    return math.sqrt(square), math.sqrt(slip)


@numba.njit(**_options)
def pack_codebook(exact, bf16, words, bias, centre, near):
    """Lay one codebook (K, D) out for `simd`; return max ||c'|| and max ||c' - packed c'||.

    words: (tiles, steps, TILE) float32, each holding a float32 or a pair of bf16.
    bias: (tiles * TILE,) = -||c'||^2 / 2. centre (D,) is read. near: (D,) scratch.
    """
    size, width = exact.shape
    longest, slipped = 0.0, 0.0
    near_bits = near.view(np.uint32)
    bits = words.view(np.uint32)
    words[:] = 0
    bias[:] = _PAD
    for k in range(size):
        tile, column = k // TILE, k % TILE
        for d in range(width):
            near[d] = exact[k, d] - centre[d]
            if bf16:
                near_bits[d] = _round_bf16(near_bits[d])
                half = near_bits[d] if d % 2 else near_bits[d] >> np.uint32(16)
                bits[tile, d // 2, column] |= half
            else:
                bits[tile, d, column] = near_bits[d]
        norm, slip = _norms(exact[k], centre, near)
        bias[k] = -0.5 * norm * norm
        longest, slipped = max(longest, norm), max(slipped, slip)
    return longest, slipped


@numba.njit(**_options)
def _pack_row(row, centre, near, near_bits, packed, packed_bits, bf16):
    """Centre, round and pack a row for `simd`: `packed` (steps,) words; `near` is scratch."""
    width = row.shape[0]
    if bf16:
        for d in range(width):
            near[d] = row[d] - centre[d]
        for d in range(width):
            near_bits[d] = _round_bf16(near_bits[d])
        for s in range(width // 2):
            packed_bits[s] = near_bits[2 * s + 1] | (near_bits[2 * s] >> np.uint32(16))
        if width % 2:
            packed_bits[width // 2] = near_bits[width - 1] >> np.uint32(16)
    else:
        for d in range(width):
            near[d] = row[d] - centre[d]
            packed[d] = near[d]


@numba.njit(**_options)
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


@numba.njit(fastmath=_REORDER, **_options)
def squared_distance(row, codeword):
    """Float64, summed in any order."""
    total = 0.0
    for d in range(row.shape[0]):
        difference = np.float64(row[d]) - np.float64(codeword[d])
        total += difference * difference
    return total


@numba.njit(**_options)
def _squared_distance_in_order(row, codeword):
    """Float64, summed over d in order without fused multiply-adds: bit for bit the reference's."""
    total = 0.0
    for d in range(row.shape[0]):
        difference = np.float64(row[d]) - np.float64(codeword[d])
        total += difference * difference
    return total


@numba.njit(**_options)
def _settle(row, exact, best, second, floor, tag_mask, candidates, distances):
    """The nearest of the codewords that `floor` leaves: (index, how many were compared)."""
    size, width = exact.shape
    tags = best.view(np.int32)
    found = 0
    for lane in range(LANES):
        if not second[lane] < floor:  # more than one of this lane's codewords: take them all
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
            distance = _squared_distance_in_order(row, exact[k])
            if index < 0 or distance < shortest or (distance == shortest and k < index):
                index, shortest = k, distance
    return index, found


@numba.njit(fastmath=_REORDER, **_options)
def _leading_lane(best, second, margin):
    """(lane of the best score, or -1 if another comes within `margin`; the floor it sets)."""
    top = best[0]
    for lane in range(LANES):
        top = best[lane] if best[lane] > top else top
    floor = np.float32(np.float64(top) - margin)
    rivals, leader = 0, 0
    for lane in range(LANES):
        rivals += np.int32(not best[lane] < floor) + np.int32(not second[lane] < floor)
        leader += np.int32(best[lane] == top) * lane
    return (leader if rivals == 1 else -1), floor


@numba.njit(**_options)
def search_block(rows, live, count, book, bf16, scratch, index):
    """index[b] = the nearest of the book's codewords to rows[b], for b < count with live[b].

    rows: (B, D) float32, B a multiple of ROWS. book: (exact, words, bias, centre, longest,
    slipped) of one level. scratch: from `make_scratch`. Returns how many codewords had to be
    compared in float64, the caller's sign that bf16 is too coarse for its data; or -1 - b when
    rows[b] is not finite.
    """
    exact, words, bias, centre, longest, slipped = book
    packed, best, second, near, margins, candidates, distances = scratch
    size, width = exact.shape
    tiles, steps = words.shape[0], words.shape[1]
    near_bits = near.view(np.uint32)
    packed_bits = packed.view(np.uint32)
    tag_bits = 0
    while (1 << tag_bits) < tiles * VECTORS:
        tag_bits += 1
    tag_mask = np.int32((1 << tag_bits) - 1)

    groups = -(-count // ROWS)
    for b in range(count):
        if live[b]:
            _pack_row(rows[b], centre, near, near_bits, packed[b], packed_bits[b], bf16)
            norm, slip = _norms(rows[b], centre, near)
            margins[b] = _margin(norm, slip, longest, slipped, width, tag_bits)
    best[: groups * ROWS] = -np.inf
    second[: groups * ROWS] = -np.inf
    stride = packed.shape[1] * 4
    slab = max(1, _SLAB // (4 * steps * TILE))
    keep = np.int32(~tag_mask)
    for first in range(0, tiles, slab):
        last = min(tiles, first + slab)
        for g in range(groups):
            x = packed.ctypes.data + g * ROWS * stride
            top = best.ctypes.data + g * ROWS * _LANE_BYTES
            runner_up = second.ctypes.data + g * ROWS * _LANE_BYTES
            codes, start = words.ctypes.data, bias.ctypes.data
            if bf16:
                _scan_bf16(x, stride, codes, start, top, runner_up, steps, first, last, keep)
            else:
                _scan_f32(x, stride, codes, start, top, runner_up, steps, first, last, keep)

    compared = 0
    tags = best.view(np.int32)
    for b in range(count):
        if not live[b]:
            index[b] = -1
            continue
        lane, floor = _leading_lane(best[b], second[b], margins[b])
        if lane >= 0 and margins[b] < np.inf:
            index[b] = (tags[b, lane] & tag_mask) * LANES + lane
        else:
            if not margins[b] < np.inf:
                if not np.isfinite(rows[b]).all():
                    return -1 - b
                second[b] = np.inf  # so that all codewords are compared
            index[b], found = _settle(
                rows[b], exact, best[b], second[b], floor, tag_mask, candidates, distances
            )
            compared += found
    return compared


@numba.njit(**_options)
def make_scratch(block, size, width):
    """The buffers of `search_block` for blocks of `block` rows."""
    return (
        np.zeros((block, width + width % 2), np.float32),
        np.empty((block, LANES), np.float32),
        np.empty((block, LANES), np.float32),
        np.empty(width, np.float32),
        np.empty(block, np.float64),
        np.empty(size + LANES, np.int64),
        np.empty(size + LANES, np.float64),
    )


def block_rows(width):
    """Rows of a block: their float32 and packed copies stay in the L2 cache."""
    return ROWS * max(1, min(16, (256 << 10) // (6 * width * ROWS)))
