"""Exact nearest-codeword search on the GPU: shared by the Triton backends of two ops.

Three passes, each over the rows that the one before could not decide: scores on the tensor cores
(TF32), scores in float32, float64 sums in the order that defines the op. A pass decides a row
when its second best score is further from the best than the pass can err; see `margins`.
"""

import torch
import triton
import triton.language as tl

from . import checks

_CONFIGS = [
    triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_D": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_D": 32}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_D": 32}, num_warps=8, num_stages=3),
]
# Unit roundoff of an operand in each pass (TF32 keeps 10 fraction bits; truncation costs a whole
# unit), or None for the pass that needs no margin.
PASSES = {"tf32": 2.0**-10, "ieee": 2.0**-23}
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _scores_kernel(
    x, codebook, bias, margin, index, decided,
    n, k, d, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """index = the best by score x . c - ||c||^2 / 2; decided = by more than margin."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, k, BLOCK_K):
        codes = first + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, d, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            values = tl.load(
                x + rows[:, None] * stride_n + dims[None, :] * stride_d,
                mask=live[:, None] & (dims < d)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            words = tl.load(
                codebook + codes[None, :].to(tl.int64) * d + dims[:, None],
                mask=(codes < k)[None, :] & (dims < d)[:, None], other=0.0,
            )  # fmt: skip
            total = tl.dot(values, words, total, input_precision=PRECISION)
        total += tl.load(bias + codes, mask=codes < k, other=float("-inf"))[None, :]
        best = tl.max(total, 1)
        at = tl.argmax(total, 1)
        others = tl.where(tl.arange(0, BLOCK_K)[None, :] == at[:, None], float("-inf"), total)
        second = tl.maximum(tl.maximum(second, tl.max(others, 1)), tl.minimum(top, best))
        where = tl.where(best > top, first + at.to(tl.int32), where)
        top = tl.maximum(top, best)
    tl.store(index + rows, where.to(tl.int64), mask=live)
    sure = second < top - tl.load(margin + rows, mask=live, other=0.0)
    tl.store(decided + rows, sure.to(tl.int8), mask=live)


_tuned_scores_kernel = (
    _scores_kernel
    if INTERPRETED
    else triton.autotune(_CONFIGS, key=["k", "d", "PRECISION"], cache_results=True)(_scores_kernel)
)


@triton.jit
def _in_order_kernel(
    x, codebook, which, index, k, d, stride_n, stride_d, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One row a program: float64 distances summed over d in order; the lowest index on ties."""
    row = tl.load(which + tl.program_id(0)).to(tl.int64)
    least = tl.full((), float("inf"), tl.float64)
    chosen = tl.zeros((), tl.int64)
    for first in range(0, k, BLOCK_K):
        codes = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        total = tl.zeros((BLOCK_K,), tl.float64)
        for dim in range(0, d):
            value = tl.load(x + row * stride_n + dim * stride_d).to(tl.float64)
            word = tl.load(codebook + codes * d + dim, mask=codes < k, other=0.0)
            difference = value - word.to(tl.float64)
            total += difference * difference
        total = tl.where(codes < k, total, float("inf"))
        best = tl.min(total, 0)
        at = tl.min(tl.where(total == best, codes, k), 0)
        chosen = tl.where(best < least, at, chosen)
        least = tl.minimum(least, best)
    tl.store(index + row, chosen)


@triton.jit
def _distance_kernel(
    x, codebook, index, distance, n, d, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The squared distance to the chosen codeword, accumulated in float64."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    code = tl.load(index + rows, mask=rows < n, other=0)
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, d, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (dims < d)[None, :]
        at = x + rows[:, None] * stride_n + dims[None, :] * stride_d
        value = tl.load(at, mask=inside, other=0.0)
        word = tl.load(codebook + code[:, None] * d + dims[None, :], mask=inside, other=0.0)
        difference = value.to(tl.float64) - word.to(tl.float64)
        total += tl.sum(difference * difference, 1)
    tl.store(distance + rows, total.to(tl.float32), mask=rows < n)


@triton.jit
def _subtract_kernel(
    residual, codebook, index, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """residual -= the chosen codewords, in place."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (dims < d)[None, :]
    code = tl.load(index + rows, mask=rows < n, other=0)
    at = residual + rows[:, None] * d + dims[None, :]
    word = tl.load(codebook + code[:, None] * d + dims[None, :], mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) - word, mask=inside)


def margins(norm, codebook, unit):
    """Twice a bound on the error of any score, for rows of these norms (float64), as float32.

    A score is a dot product of operands rounded to `unit` (relative) plus a bias, summed in
    float32: |error| <= (2 unit + unit^2) ||x|| ||c|| + (D + 4) 2^-23 (||x|| ||c|| + ||c||^2 / 2),
    by Cauchy-Schwarz; the float64 sums that define the op err by far less.
    """
    width = codebook.shape[1]
    longest = codebook.double().norm(dim=1).max()
    size = norm * longest + 0.5 * longest * longest
    delta = 2.01 * unit * norm * longest + (width + 4) * 2.0**-23 * size
    delta = delta + (width + 4) * 2.0**-50 * (norm + longest) ** 2
    delta = delta + (width + 4) * 2.0**-124 * (1 + norm + longest)
    # Past 1e37 float32 scores may overflow: an infinite margin decides nothing.
    delta = torch.where(size < 1e37, 2 * delta * (1 + 1e-6), torch.inf)
    return delta.float()


def _scores(x, codebook, bias, norm, precision):
    n, d = x.shape
    index = torch.empty(n, dtype=torch.int64, device=x.device)
    decided = torch.empty(n, dtype=torch.int8, device=x.device)
    margin = margins(norm, codebook, PASSES[precision])
    arguments = (x, codebook, bias, margin, index, decided, n, codebook.shape[0], d, *x.stride())
    blocks = {"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_D": 16} if INTERPRETED else {}
    grid = lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),)  # noqa: E731
    _tuned_scores_kernel[grid](*arguments, PRECISION=precision, **blocks)
    return index, decided


def nearest(x, codebook):
    """Index (N,) int64 of each row's nearest codeword. x: finite, N >= 1; codebook: float32."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    bias = (-0.5 * codebook.double().square().sum(1)).float()
    index, decided = _scores(x, codebook, bias, norm, "tf32")
    open_rows = (decided == 0).nonzero()[:, 0]
    if len(open_rows):
        again, decided = _scores(x[open_rows], codebook, bias, norm[open_rows], "ieee")
        index[open_rows] = again
        open_rows = open_rows[decided == 0]
    if len(open_rows):
        k, d = codebook.shape
        _in_order_kernel[(len(open_rows),)](
            x, codebook, open_rows, index, k, d, *x.stride(),
            BLOCK_K=min(1024, triton.next_power_of_2(k)), enable_fp_fusion=False,
        )  # fmt: skip
    return index


def distances(x, codebook, index):
    """(N,) float32 squared distances to the chosen codewords."""
    n, d = x.shape
    distance = torch.empty(n, dtype=torch.float32, device=x.device)
    _distance_kernel[(triton.cdiv(n, 32),)](
        x, codebook, index, distance, n, d, *x.stride(), BLOCK_N=32, BLOCK_D=32
    )
    return distance


def subtract(residual, codebook, index):
    """residual (N, D) float32, contiguous, loses the chosen codewords in place."""
    n, d = residual.shape
    block = min(128, triton.next_power_of_2(d))
    _subtract_kernel[(triton.cdiv(n, 32), triton.cdiv(d, block))](
        residual, codebook, index, n, d, BLOCK_N=32, BLOCK_D=block
    )


def live_rows(x, mask):
    """The finite rows to work on: (their numbers or None for all, x without padding)."""
    rows = None if mask is None else mask.nonzero()[:, 0]
    kept = x if rows is None else x[rows]
    finite = torch.isfinite(kept).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise checks.not_finite(bad if rows is None else int(rows[bad]))
    return rows, kept
