"""residual_quantize takes nearest_codeword's cases, all levels of them."""

from ..nearest_codeword.cases import Case, cases, random_case
from . import residual_quantize

# Codes compare exactly, and so do residuals: each level rounds once, the same everywhere.
TOLERANCE = {"rtol": 0.0, "atol": 0.0}

__all__ = ["TOLERANCE", "Case", "call", "cases", "random_case"]


def call(case, backend):
    """The op on this case."""
    return residual_quantize(case.x, case.codebooks, backend=backend)
