"""residual_quantize on the CPU: rows stay in cache while all levels are searched."""

from ..cpu_quantize import quantize


def run(x, codebooks):
    return quantize(x, codebooks, want="residual")
