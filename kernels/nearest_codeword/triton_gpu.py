"""nearest_codeword in Triton: one level of the residual quantizer's search."""

from ..triton_quantize import quantize


def run(x, codebook):
    codes, distance = quantize(x, codebook[None], want="distance")
    return codes[:, 0], distance
