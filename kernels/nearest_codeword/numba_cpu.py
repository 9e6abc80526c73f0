"""nearest_codeword on the CPU: one level of the residual quantizer's search."""

from ..cpu_quantize import quantize


def run(x, codebook, mask):
    codes, distance = quantize(x, codebook[None], mask, want="distance")
    return codes[:, 0], distance
