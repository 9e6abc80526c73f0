"""Named inputs of codeword_sums, shared by the tests and the benchmark."""

from typing import NamedTuple

import torch

from . import codeword_sums

# A float64 sum rounded to float32; the order of its terms may move it across a rounding boundary.
TOLERANCE = {"rtol": 2.0**-22, "atol": 1e-12}


class Case(NamedTuple):
    """One call's arguments."""

    x: torch.Tensor  # (N, D)
    index: torch.Tensor  # (N,)
    K: int
    mask: torch.Tensor | None = None  # (N,)


def call(case, backend):
    """The op on this case."""
    return codeword_sums(case.x, case.index, case.K, mask=case.mask, backend=backend)


def random_case(n, d, k, seed=0, dtype=torch.float32):
    """Gaussian rows, assigned at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return Case(x.to(dtype), torch.randint(k, (n,), generator=generator), k)


def cases(dtype=torch.float32):
    """Small cases by name: odd sizes, padding, unused codewords, layouts."""
    plain = random_case(90, 13, 7, dtype=dtype)
    mask = torch.arange(90) % 4 != 2
    poisoned = plain.x.clone()
    poisoned[~mask] = torch.nan
    skipped = torch.where(mask, plain.index, -1)
    junk = torch.where(mask, plain.index, 10**12)
    return {
        "plain": plain,
        "many-parts": random_case(20_000, 3, 5, dtype=dtype),
        "one-codeword": random_case(33, 4, 1, dtype=dtype),
        "mostly-unused": random_case(10, 4, 300, dtype=dtype),
        "no-rows": random_case(0, 4, 3, dtype=dtype),
        "one-row": random_case(1, 1, 1, dtype=dtype),
        "mask": Case(poisoned, junk, 7, mask),
        "index-minus-one": Case(poisoned, skipped, 7),
        "transposed": plain._replace(x=plain.x.T.contiguous().T),
        "strided-index": plain._replace(index=plain.index.repeat_interleave(2)[::2]),
    }
