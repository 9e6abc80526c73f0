"""nearest_codeword on the CPU: one level of the residual quantizer's search."""

from ..cpu_quantize import quantize


def run(x, codebook):
    codes, distance = quantize(x, codebook[None], want="distance")
    return codes[:, 0], distance
