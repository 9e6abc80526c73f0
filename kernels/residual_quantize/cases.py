"""residual_quantize takes nearest_codeword's cases, all levels of them."""

from ..nearest_codeword.cases import Case, cases, random_case

# Codes compare exactly, and so do residuals: each level rounds once, the same everywhere.
TOLERANCE = {"rtol": 0.0, "atol": 0.0}

__all__ = ["TOLERANCE", "Case", "cases", "random_case"]
