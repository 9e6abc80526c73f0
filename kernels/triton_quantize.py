"""Rows -> codes on the GPU: the Triton backend of two ops.

Three passes, each over the rows that the one before left open: all levels with TF32 scores, with
three-product TF32 scores, and level by level with the float64 sums that define the op. Rows too
wide for the chip take the last one alone.
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


def _exactly(x, packed, want_distance):
    """Codes, and residual or distance, by the float64 sums that define the op."""
    codes, kept = [], []
    for part in x.split(_CHUNK):
        left, found = part.float().contiguous(), []
        for codebook in packed.plain:
            index = torch.empty(len(left), dtype=torch.int64, device=x.device)
            triton_search.in_order_kernel[(len(left),)](
                left, codebook.T.contiguous(), index, packed.size, packed.width,
                BLOCK_K=min(1024, triton.next_power_of_2(packed.size)), enable_fp_fusion=False,
            )  # fmt: skip
            found.append(index)
            left = left - codebook[index]
        codes.append(torch.stack(found, 1))
        kept.append(left.double().square().sum(1).float() if want_distance else left)
    return torch.cat(codes), torch.cat(kept)


def quantize(x, codebooks, *, want):
    """codes (N, L) int64 and, as `want` says, the "residual" (N, D) or the "distance" (N,)."""
    n, d = x.shape
    want_distance = want == "distance"
    found = torch.empty((n, len(codebooks)), dtype=torch.int64, device=x.device)
    left = torch.empty((n,) if want_distance else (n, d), dtype=torch.float32, device=x.device)
    if not n:
        return found, left
    packed, again = _PackedCodebooks(codebooks), torch.arange(n, device=x.device)
    on_chip = d <= triton_search.widest(x.device)
    if on_chip:
        found, left, still_open = _on_chip(x, packed, "tf32", want_distance)
        again = still_open.nonzero()[:, 0]
    if len(again):
        part = x[again]
        # A row that is not finite has no score to trust, so it is among the open ones.
        finite = torch.isfinite(part).all(1)
        if not finite.all():
            raise checks.not_finite(int(again[(~finite).nonzero()[0]]))
        if on_chip:
            found[again], left[again], still_open = _on_chip(part, packed, "tf32x3", want_distance)
            again = again[still_open.nonzero()[:, 0]]
    if len(again):
        found[again], left[again] = _exactly(x[again], packed, want_distance)
    return found, left
