"""The definition of residual_quantize: nearest_codeword's reference, level after level."""

import torch

from ..nearest_codeword import reference as nearest


def run(x, codebooks):
    residual = x.float()
    codes = torch.empty((x.shape[0], len(codebooks)), dtype=torch.int64, device=x.device)
    for level, codebook in enumerate(codebooks):
        codes[:, level], _ = nearest.run(residual, codebook)
        residual = residual - codebook.float()[codes[:, level]]
    return codes, residual.contiguous()
