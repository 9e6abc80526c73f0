"""Rows -> codes on the GPU: the Triton backend of two ops.

Three passes, each over the rows that the one before left open: all levels with TF32 scores, with
three-product TF32 scores, and level by level with the float64 sums that define the op.
"""

import torch
import triton

from . import checks, triton_search
from .triton_search import INTERPRETED, LEAST_TILE, TILE

_PASSES = ("tf32", "tf32x3")
_PAD = -3e38  # bias of the codewords that fill up the last tile: never the best
_CHUNK = 1 << 16  # rows searched level by level, whose residuals are copied at once


def _to_tf32(value):
    bits = value.view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32)


class _PackedCodebooks:
    """(L, K, D) codebooks about each level's mean codeword, padded to whole tiles."""

    def __init__(self, codebooks):
        levels, self.size, self.width = codebooks.shape
        padded = triton.cdiv(self.size, TILE) * TILE
        width = max(16, triton.next_power_of_2(self.width))
        device = codebooks.device
        self.plain = codebooks.float().contiguous()
        self.exact = torch.zeros(levels, padded, width, device=device)
        self.exact[:, : self.size, : self.width] = self.plain
        self.centre = torch.zeros(levels, width, device=device)
        self.centre[:, : self.width] = self.plain.mean(1, dtype=torch.float64)
        true = self.plain.double() - self.centre[:, None, : self.width].double()
        self.bias = torch.full((levels, padded), _PAD, device=device)
        self.bias[:, : self.size] = -0.5 * true.square().sum(2)
        self.words, self.norms = {}, {}
        for precision in _PASSES:
            words = torch.zeros_like(self.exact)
            words[:, : self.size, : self.width] = true.float()
            words = _to_tf32(words) if precision == "tf32" else words
            slip = words[:, : self.size, : self.width].double() - true
            bounds = [part.norm(dim=2).amax(1) for part in (true, slip)]
            self.words[precision] = words
            self.norms[precision] = (torch.stack(bounds, 1) * (1 + 1e-6)).float().contiguous()


def _on_chip(x, packed, precision, want_distance):
    """One pass over rows that fit on the chip: codes, residual or distance, and what stays open."""
    n, d = x.shape
    levels, padded, width = packed.exact.shape
    codes = torch.empty((n, levels), dtype=torch.int64, device=x.device)
    left = torch.empty((n,) if want_distance else (n, d), dtype=torch.float32, device=x.device)
    still_open = torch.empty(n, dtype=torch.int8, device=x.device)
    blocks = {"BLOCK_N": 16, "BLOCK_K": 32} if INTERPRETED else {}
    triton_search.levels_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK_N"]),)](
        x, packed.words[precision], packed.exact, packed.bias, packed.centre,
        packed.norms[precision], codes, left, still_open,
        n, packed.size, d, levels, padded, (padded // LEAST_TILE - 1).bit_length(), *x.stride(),
        WIDTH=width, PRECISION=precision, DISTANCE=want_distance, **blocks,
    )  # fmt: skip
    return codes, left, still_open


def _level_by_level(x, packed, want_distance, search):
    """The levels of `search(left, level) -> index, open rows`, a part of the rows at a time."""
    codes, kept, undecided = [], [], []
    for part in x.split(_CHUNK):
        left, found = part.float().contiguous(), []
        still_open = torch.zeros(len(part), dtype=torch.int8, device=x.device)
        for level, codebook in enumerate(packed.plain):
            index, more = search(left, level)
            still_open |= more
            found.append(index)
            left = left - codebook[index]
        if want_distance:
            left = left.double().square().sum(1).float()
        codes.append(torch.stack(found, 1))
        kept.append(left)
        undecided.append(still_open)
    return torch.cat(codes), torch.cat(kept), torch.cat(undecided)


WIDE_BLOCKS = (64, 128, 32)  # rows, codewords, dimensions; with 128 rows the registers spill


def _wide(packed, precision):
    blocks = (16, 32, 16) if INTERPRETED else WIDE_BLOCKS

    def search(left, level):
        n, d = left.shape
        _, padded, width = packed.exact.shape
        index = torch.empty(n, dtype=torch.int64, device=left.device)
        still_open = torch.empty(n, dtype=torch.int8, device=left.device)
        triton_search.wide_kernel[(triton.cdiv(n, blocks[0]),)](
            left, packed.words[precision][level], packed.bias[level], packed.centre[level],
            packed.norms[precision][level], index, still_open, n, d, padded, width,
            *blocks, PRECISION=precision, num_warps=8, num_stages=3,
        )  # fmt: skip
        return index, still_open

    return search


def _in_order(packed):
    def search(left, level):
        n, d = left.shape
        index = torch.empty(n, dtype=torch.int64, device=left.device)
        transposed = packed.plain[level].T.contiguous()
        triton_search.in_order_kernel[(n,)](
            left, transposed, index, packed.size, d,
            BLOCK_K=min(1024, triton.next_power_of_2(packed.size)), enable_fp_fusion=False,
        )  # fmt: skip
        return index, torch.zeros(n, dtype=torch.int8, device=left.device)

    return search


def quantize(x, codebooks, *, want):
    """codes (N, L) int64 and, as `want` says, the "residual" (N, D) or the "distance" (N,)."""
    n, d = x.shape
    want_distance = want == "distance"
    if not n:
        codes = torch.empty((0, len(codebooks)), dtype=torch.int64, device=x.device)
        return codes, x.new_empty((0,) if want_distance else (0, d), dtype=torch.float32)
    packed = _PackedCodebooks(codebooks)

    def one_pass(part, precision):
        if d <= triton_search.widest(x.device):
            return _on_chip(part, packed, precision, want_distance)
        return _level_by_level(part, packed, want_distance, _wide(packed, precision))

    found, left, still_open = one_pass(x, "tf32")
    again = still_open.nonzero()[:, 0]
    if len(again):
        part = x[again]
        # A row that is not finite has no score to trust, so it is among the open ones.
        finite = torch.isfinite(part).all(1)
        if not finite.all():
            raise checks.not_finite(int(again[(~finite).nonzero()[0]]))
        found[again], left[again], still_open = one_pass(part, "tf32x3")
        again = again[still_open.nonzero()[:, 0]]
    if len(again):
        exact = _level_by_level(x[again], packed, want_distance, _in_order(packed))
        found[again], left[again], _ = exact
    return found, left
