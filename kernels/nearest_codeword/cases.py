"""Named inputs of nearest_codeword and residual_quantize, shared by the tests and the benchmark."""

from typing import NamedTuple

import torch

from . import nearest_codeword

# Indices compare exactly. A distance is a float64 sum rounded to float32, in any order of terms.
TOLERANCE = {"rtol": 2.0**-22, "atol": 0.0}


class Case(NamedTuple):
    """One call's arguments; codebooks has a level per row of codes, nearest_codeword takes [0]."""

    x: torch.Tensor  # (N, D)
    codebooks: torch.Tensor  # (L, K, D)


def call(case, backend):
    """The op on this case."""
    return nearest_codeword(case.x, case.codebooks[0], backend=backend)


def random_case(n, d, levels, k, seed=0, dtype=torch.float32):
    """Gaussian rows and codebooks whose levels shrink as residuals do; codewords near rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    codebooks = torch.randn(levels, k, d, generator=generator)
    shrink = 0.7 ** torch.arange(levels)[:, None, None]
    return Case(x.to(dtype), (codebooks * shrink).to(dtype))


def cases(dtype=torch.float32):
    """Small cases by name: odd sizes, ties, layouts, padding, hard scales."""
    plain = random_case(70, 24, 3, 40, dtype=dtype)
    grid = Case((plain.x * 2).round(), (plain.codebooks * 2).round())  # many exact ties
    wide = torch.zeros(70, 48, dtype=dtype)
    wide[:, ::2] = plain.x
    twins = plain.codebooks.clone()
    twins[:, 20:] = twins[:, :20]
    return {
        "plain": plain,
        "odd-sizes": random_case(37, 19, 2, 101, dtype=dtype),
        "wide": random_case(9, 130, 1, 67, dtype=dtype),
        "one-codeword": random_case(11, 5, 2, 1, dtype=dtype),
        "one-dimension": random_case(50, 1, 2, 33, dtype=dtype),
        "one-row": random_case(1, 16, 4, 16, dtype=dtype),
        "no-rows": random_case(0, 8, 2, 4, dtype=dtype),
        "grid-ties": grid,
        "equal-codewords": Case(plain.x, twins),
        "zero-codebook": Case(plain.x, torch.zeros_like(plain.codebooks)),
        "strided-columns": Case(wide[:, ::2], plain.codebooks),
        "transposed": Case(
            plain.x.T.contiguous().T, plain.codebooks.transpose(1, 2).contiguous().transpose(1, 2)
        ),
        "far-from-zero": Case(plain.x + 1000, plain.codebooks + 1000),
        "tiny-scale": Case(plain.x * 1e-25, plain.codebooks * 1e-25),
        "huge-scale": Case(plain.x * 1e18, plain.codebooks * 1e18),
        "mixed-scale": Case(plain.x * 1e10, plain.codebooks * 1e-10),
    }
