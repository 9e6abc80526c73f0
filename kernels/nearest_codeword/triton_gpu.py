"""nearest_codeword in Triton: one level of the residual quantizer's search."""

from ..triton_quantize import quantize


def run(x, codebook, mask):
    codes, distance = quantize(x, codebook[None], mask, want="distance")
    return codes[:, 0], distance
