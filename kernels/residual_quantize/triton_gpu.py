"""residual_quantize in Triton: the residual is updated in place between levels."""

import torch

from .. import triton_search


def run(x, codebooks, mask):
    n, width = x.shape
    codes = torch.full((n, len(codebooks)), -1, dtype=torch.int64, device=x.device)
    residual = torch.zeros((n, width), dtype=torch.float32, device=x.device)
    rows, live = triton_search.live_rows(x, mask)
    if not len(live):
        return codes, residual
    rows = slice(None) if rows is None else rows
    left = live.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for level, codebook in enumerate(codebooks):
        codebook = codebook.float().contiguous()
        found = triton_search.nearest(left, codebook)
        triton_search.subtract(left, codebook, found)
        codes[rows, level] = found
    residual[rows] = left
    return codes, residual
