"""codeword_sums in Triton: rows sorted by codeword, each codeword's rows added in order."""

import torch
import triton
import triton.language as tl

from .. import checks
from . import bad_index


@triton.jit
def _sums_kernel(
    x, order, start, sums, d, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One codeword and BLOCK_D dimensions a program: no atomics, so the order is fixed."""
    code = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, past = tl.load(start + code), tl.load(start + code + 1)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for at in range(first, past, BLOCK_N):
        place = at + tl.arange(0, BLOCK_N)
        row = tl.load(order + place, mask=place < past, other=0)
        inside = (place < past)[:, None] & (dims < d)[None, :]
        value = tl.load(
            x + row[:, None] * stride_n + dims[None, :] * stride_d, mask=inside, other=0.0
        )
        total += value.to(tl.float64)
    tl.store(sums + code * d + dims, tl.sum(total, 0).to(tl.float32), mask=dims < d)


def run(x, index, K, mask):
    live = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    wrong = live & ((index < -1) | (index >= K))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise bad_index(row, int(index[row]), K)
    live = live & (index >= 0)
    keys = torch.where(live, index, K)  # padding sorts behind the last codeword
    order = torch.sort(keys, stable=True).indices
    counts = torch.bincount(keys, minlength=K + 1)[:K]
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    width = x.shape[1]
    sums = torch.empty((K, width), dtype=torch.float32, device=x.device)
    block = min(64, triton.next_power_of_2(max(1, width)))
    if width:
        _sums_kernel[(K, triton.cdiv(width, block))](
            x, order, start, sums, width, *x.stride(), BLOCK_N=16, BLOCK_D=block
        )
    if not torch.isfinite(sums).all():  # a row is to blame, or the sum outgrew float32
        bad = ~torch.isfinite(x).all(1) & live
        if bad.any():
            raise checks.not_finite(int(bad.nonzero()[0]))
    return sums, counts
