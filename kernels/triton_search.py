"""Nearest-codeword search on the GPU: the Triton kernels that `triton_quantize` runs for two ops.

The arithmetic is that of `cpu_search`: rounded scores x' . c' - ||c'||^2 / 2, about each level's
mean codeword, with a bound on their error. Here the products run on the tensor cores, in TF32 or
in three TF32 products that make almost a float32 one. A row whose second best score comes within
twice the bound of the best (or whose bound is infinite or NaN) is left open for the next pass.
"""

import torch
import triton
import triton.language as tl

from .dispatch import interpreting

INTERPRETED = interpreting()
TILE = 128  # codebooks are padded to a multiple of this, and of every BLOCK_K below
LEAST_TILE = 32  # the smallest BLOCK_K


def widest(device):
    """The dimensions up to which the smallest of _CONFIGS keeps its rows on the chip."""
    if device.type != "cuda":
        return 64  # the interpreter, where both ways are tested
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return 256 if shared >= 196_608 else 128 if shared >= 98_304 else 32


def _config(rows, codes, warps, stages):
    return triton.Config({"BLOCK_N": rows, "BLOCK_K": codes}, num_warps=warps, num_stages=stages)


# Wide rows fill the shared memory, so they need narrow tiles; what does not fit is passed over.
_CONFIGS = [
    _config(64, LEAST_TILE, 4, 1),
    _config(64, LEAST_TILE, 4, 3),
    _config(64, 64, 4, 2),
    _config(128, LEAST_TILE, 8, 2),
    _config(128, 64, 8, 2),
    _config(128, 64, 8, 3),
    _config(128, TILE, 8, 2),
]


@triton.jit
def _to_tf32(value):
    """Float32 rounded to TF32's 10 fraction bits: what a tensor core multiplies exactly."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _length(squares, width):
    """An upper bound of the root of a sum of `width` squares, rounded or flushed to 0."""
    return tl.sqrt(squares) * (1 + (width + 16) * 2.0**-22) + 2.0**-62 * width


@triton.jit
def _margin(norm, slip, longest, slipped, width, terms, tag_bits):
    """Twice a bound on the error of any score, infinite where scores may overflow.

    norm, longest bound ||x'|| and ||c'||; slip, slipped what rounding took from the operands
    (Cauchy-Schwarz); `terms` products are summed in float32 that may truncate; the low `tag_bits`
    bits of a score carry the number of its tile. The float64 sums that define the op err too.
    """
    size = 0.5 * longest * longest + (norm + slip) * (longest + slipped)  # of any partial sum
    delta = slip * longest + (norm + slip) * slipped
    delta += ((terms + 8) * 2.0**-23 + (1 << tag_bits) * 2.0**-23) * 1.01 * size
    delta += (width + 4) * 2.0**-50 * (norm + longest) * (norm + longest)
    delta += (width + 4) * 2.0**-124 * (1.0 + norm + longest)
    return tl.where(size < 1e37, 2.0001 * delta, float("inf"))


@triton.jit
def _tag(score, tag_bits):
    """The number of the tile that a score carries in its low bits."""
    return score.to(tl.int32, bitcast=True) & ((1 << tag_bits) - 1)


@triton.jit
def _distance(left, at):
    """Float64 squared distances of rows (BLOCK_N, WIDTH) to the codewords at these addresses."""
    difference = left.to(tl.float64) - tl.load(at).to(tl.float64)
    return tl.sum(difference * difference, 1)


@triton.jit
def _levels_kernel(
    x, words, exact, bias, centre, norms, codes, left_over, open_rows,
    n, k, d, levels, padded, tag_bits, stride_n, stride_d,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """All levels of BLOCK_N rows, which stay on the chip: x is read once, the rest written once."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, WIDTH)
    inside = (rows < n)[:, None] & (dims < d)[None, :]
    at = rows[:, None] * stride_n + dims[None, :] * stride_d
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, WIDTH)
    lanes = tl.arange(0, BLOCK_K)[None, :]
    sure = rows < n
    keep = -(1 << tag_bits)
    for level in range(levels):
        moved = left - tl.load(centre + level * WIDTH + dims)[None, :]
        norm = _length(tl.sum(moved * moved, 1), d)
        longest = tl.load(norms + 2 * level)
        slipped = tl.load(norms + 2 * level + 1)
        if PRECISION == "tf32":
            near = _to_tf32(moved)
            lost = moved - near
            # The subtraction of the centre itself is off by half a unit in the last place.
            slip = _length(tl.sum(lost * lost, 1), d) + 2.0**-24 * norm
            margin = _margin(norm, slip, longest, slipped, d, d, tag_bits)
        else:
            # A float32 is two TF32 up to 2^-20; the product of the two low parts is left out.
            near = moved
            slip, slipped = 2.0**-19 * norm, slipped + 2.0**-19 * longest
            margin = _margin(norm, slip, longest, slipped, d, 3 * d, tag_bits)

        top = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
        second = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
        for tile in range(padded // BLOCK_K):
            code = level * padded + tile * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
            word = tl.load(words + code[None, :] * WIDTH + dims[:, None])  # (WIDTH, BLOCK_K)
            score = tl.dot(near, word, input_precision=PRECISION) + tl.load(bias + code)[None, :]
            tagged = (score.to(tl.int32, bitcast=True) & keep) | tile
            score = tagged.to(tl.float32, bitcast=True)
            second = tl.maximum(second, tl.minimum(top, score))
            top = tl.maximum(top, score)
        best = tl.max(top, 1)
        lane = tl.argmax(top, 1)
        others = tl.where(lanes == lane[:, None], second, top)
        runner_up = tl.max(others, 1)
        # An open row's code may be anything, but within the codebook.
        chosen = tl.minimum(_tag(best, tag_bits) * BLOCK_K + lane, k - 1)
        base = exact + (level * padded + tl.zeros_like(chosen)).to(tl.int64)[:, None] * WIDTH
        clear = runner_up < best - margin
        if PRECISION == "tf32x3":
            # Two codewords that stand out from the rest are compared in float64, in any order.
            lane_2 = tl.argmax(others, 1)
            rival = tl.minimum(_tag(runner_up, tag_bits) * BLOCK_K + lane_2, k - 1)
            # Of a lane that holds both, the third best is not known.
            unseen = tl.where((lane == lane_2)[:, None], runner_up[:, None], second)
            third = tl.max(tl.where(lanes == lane_2[:, None], unseen, others), 1)
            distance = _distance(left, base + chosen[:, None] * WIDTH + dims[None, :])
            to_rival = _distance(left, base + rival[:, None] * WIDTH + dims[None, :])
            # Two float64 sums of the same non-negative terms differ by so much at most.
            apart = tl.abs(distance - to_rival) > (d + 4) * 2.0**-50 * (distance + to_rival)
            chosen = tl.where(clear | (distance < to_rival), chosen, rival)
            clear = clear | ((third < best - margin) & apart)
        sure = sure & clear
        tl.store(codes + rows * levels + level, chosen.to(tl.int64), mask=rows < n)
        left -= tl.load(base + chosen[:, None] * WIDTH + dims[None, :])
    if DISTANCE:
        wide = left.to(tl.float64)
        tl.store(left_over + rows, tl.sum(wide * wide, 1).to(tl.float32), mask=rows < n)
    else:
        tl.store(left_over + rows[:, None] * d + dims[None, :], left, mask=inside)
    tl.store(open_rows + rows, (sure == 0).to(tl.int8), mask=rows < n)


# The fastest configuration for each key is remembered on disk.
levels_kernel = (
    _levels_kernel
    if INTERPRETED
    else triton.autotune(
        _CONFIGS, key=["WIDTH", "k", "levels", "PRECISION", "DISTANCE"], cache_results=True
    )(_levels_kernel)
)


@triton.jit
def in_order_kernel(x, codebook, index, k, d, BLOCK_K: tl.constexpr):
    """One row a program: float64 distances summed over d in order; the lowest index on ties.

    x: (N, D) and codebook: (D, K), transposed, both contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    least = tl.full((), float("inf"), tl.float64)
    chosen = tl.zeros((), tl.int64)
    for first in range(0, k, BLOCK_K):
        code = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        at_word = codebook + code
        total = tl.zeros((BLOCK_K,), tl.float64)
        for dim in range(0, d):
            value = tl.load(x + row * d + dim).to(tl.float64)
            word = tl.load(at_word, mask=code < k, other=0.0)
            at_word += k
            difference = value - word.to(tl.float64)
            total += difference * difference
        total = tl.where(code < k, total, float("inf"))
        best = tl.min(total, 0)
        at = tl.min(tl.where(total == best, code, k), 0)
        chosen = tl.where(best < least, at, chosen)
        least = tl.minimum(least, best)
    tl.store(index + row, chosen)
