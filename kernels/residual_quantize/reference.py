"""The definition of residual_quantize: nearest_codeword's reference, level after level."""

import torch

from ..nearest_codeword import reference as nearest


def run(x, codebooks, mask):
    residual = x.float()
    if mask is not None:
        residual = residual.masked_fill(~mask[:, None], 0.0)
    codes = torch.full((x.shape[0], len(codebooks)), -1, dtype=torch.int64, device=x.device)
    for level, codebook in enumerate(codebooks):
        codes[:, level], _ = nearest.run(residual, codebook, mask)
        chosen = codebook.float()[codes[:, level].clamp_min(0)]
        if mask is not None:
            chosen = chosen.masked_fill(~mask[:, None], 0.0)
        residual = residual - chosen
    return codes, residual.contiguous()
