"""Named inputs of every kernel, and whether a backend gives what the reference gives.

Shared by tests/test_kernels.py and the benchmarks. `OPS[name]` has an op's `cases(dtype)`, its
`call(case, backend)` and the `tolerance` of its floats; integers are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from streamctl.kernels import CsrTrie, nearest_codeword, residual_quantize, trie_topk

from streamctl.tokenizer.trie import PrefixTrie

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Rows(NamedTuple):
    """Arguments of the two quantizing ops; nearest_codeword takes the first codebook."""

    x: torch.Tensor  # (N, D)
    codebooks: torch.Tensor  # (L, K, D)


class Beams(NamedTuple):
    """Arguments of trie_topk."""

    logits: torch.Tensor
    nodes: torch.Tensor
    beam_scores: torch.Tensor
    trie: CsrTrie
    k: int
    options: dict


def random_rows(n, d, levels, k, seed=0, dtype=torch.float32):
    """Gaussian rows and codebooks whose levels shrink as residuals do; codewords near rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    codebooks = torch.randn(levels, k, d, generator=generator)
    shrink = 0.7 ** torch.arange(levels)[:, None, None]
    return Rows(x.to(dtype), (codebooks * shrink).to(dtype))


def rows_cases(dtype=torch.float32):
    """Small cases by name: odd sizes, ties, layouts, padding, hard scales."""
    plain = random_rows(70, 24, 3, 40, dtype=dtype)
    grid = Rows((plain.x * 2).round(), (plain.codebooks * 2).round())  # many exact ties
    wide = torch.zeros(70, 48, dtype=dtype)
    wide[:, ::2] = plain.x
    twins = plain.codebooks.clone()
    twins[:, 20:] = twins[:, :20]
    return {
        "plain": plain,
        "odd-sizes": random_rows(37, 19, 2, 101, dtype=dtype),
        "wide": random_rows(9, 130, 1, 67, dtype=dtype),
        "one-codeword": random_rows(11, 5, 2, 1, dtype=dtype),
        "one-dimension": random_rows(50, 1, 2, 33, dtype=dtype),
        "one-row": random_rows(1, 16, 4, 16, dtype=dtype),
        "no-rows": random_rows(0, 8, 2, 4, dtype=dtype),
        "grid-ties": grid,
        "equal-codewords": Rows(plain.x, twins),
        "zero-codebook": Rows(plain.x, torch.zeros_like(plain.codebooks)),
        "strided-columns": Rows(wide[:, ::2], plain.codebooks),
        "transposed": Rows(
            plain.x.T.contiguous().T, plain.codebooks.transpose(1, 2).contiguous().transpose(1, 2)
        ),
        "far-from-zero": Rows(plain.x + 1000, plain.codebooks + 1000),
        "tiny-scale": Rows(plain.x * 1e-25, plain.codebooks * 1e-25),
        "huge-scale": Rows(plain.x * 1e18, plain.codebooks * 1e18),
        "mixed-scale": Rows(plain.x * 1e10, plain.codebooks * 1e-10),
    }


def random_items(count, levels, codes, seed=0):
    """Distinct-ish random rows of codes (count, levels); level l's tokens follow level l - 1's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(codes, (count, levels), generator=generator)
    return drawn + torch.arange(levels) * codes


def random_beams(items, users, beams, depth, vocabulary, k, seed=0, dtype=torch.float32, **options):
    """Beams on random nodes at `depth` of the trie of `items`, with random logits."""
    trie = PrefixTrie(items.numpy()).on("cpu")
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(users, beams, dtype=torch.int64)
    for _ in range(depth):
        first, past = trie.child_start[nodes], trie.child_start[nodes + 1]
        step = torch.rand(users, beams, generator=generator) * (past - first)
        nodes = trie.child_node[first + step.long().clamp_max(past - first - 1)]
    logits = torch.randn(users, beams, vocabulary, generator=generator) * 3
    scores = torch.randn(users, beams, generator=generator)
    return Beams(logits.to(dtype), nodes, scores, trie, k, options)


def beams_cases(dtype=torch.float32):
    """Small cases by name: odd sizes, dead beams, ties, masks, more asked for than exists."""
    items = random_items(60, 3, 7)
    make = lambda *args, **options: random_beams(items, *args, dtype=dtype, **options)  # noqa: E731
    dead = make(3, 5, 1, 23, 4)
    dead.nodes[0] = -1
    dead.nodes[1, ::2] = -1
    tied = make(2, 3, 0, 21, 9)
    tied.logits.zero_()
    tied.beam_scores.zero_()
    excluded = make(2, 4, 1, 21, 6)
    excluded.logits[:, :, ::2] = -torch.inf
    excluded.beam_scores[0, 0] = -torch.inf
    n_nodes = len(tied.trie.child_start) - 1
    some = torch.rand(2, n_nodes, generator=torch.Generator().manual_seed(5)) < 0.5
    narrow = make(2, 3, 1, 21, 5)
    return {
        "root": make(2, 1, 0, 21, 5),
        "first-level": make(3, 5, 1, 23, 7),
        "last-level": make(2, 5, 2, 21, 3),
        "leaves": make(2, 2, 3, 21, 2),
        "dead-beams": dead,
        "ties": tied,
        "excluded-tokens": excluded,
        "more-than-exist": make(2, 2, 2, 21, 40),
        "one-of-one": random_beams(torch.zeros(1, 1).long(), 1, 1, 0, 1, 1, dtype=dtype),
        "no-users": make(0, 2, 0, 21, 3),
        "no-beams": make(2, 0, 0, 21, 3),
        "allowed": make(2, 4, 1, 21, 5, allowed=some[0]),
        "allowed-by-user": make(2, 4, 1, 21, 5, allowed=some),
        "vocabulary": make(3, 5, 1, 23, 7, normalize="vocabulary"),
        "vocabulary-allowed": make(2, 4, 1, 21, 5, allowed=some, normalize="vocabulary"),
        "strided": narrow._replace(
            logits=narrow.logits.transpose(1, 2).contiguous().transpose(1, 2),
            nodes=narrow.nodes.T.contiguous().T,
        ),
    }


class Op(NamedTuple):
    """What is asked of an op."""

    cases: Callable[..., dict[str, Any]]
    call: Callable[[Any, str], tuple[torch.Tensor, ...]]
    tolerance: dict[str, float]


OPS = {
    # A distance is a float64 sum rounded to float32, in any order of terms.
    "nearest_codeword": Op(
        rows_cases,
        lambda case, backend: nearest_codeword(case.x, case.codebooks[0], backend=backend),
        {"rtol": 2.0**-22, "atol": 0.0},
    ),
    # Each level rounds once, the same everywhere.
    "residual_quantize": Op(
        rows_cases,
        lambda case, backend: residual_quantize(*case, backend=backend),
        {"rtol": 0.0, "atol": 0.0},
    ),
    # Scores are float64 rounded once, and libraries' exp and log may differ in the last place.
    "trie_topk": Op(
        beams_cases,
        lambda case, backend: trie_topk(*case[:5], **case.options, backend=backend),
        {"rtol": 1e-6, "atol": 1e-6},
    ),
}


def to_device(value, device):
    """A case, or any part of one, with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(to_device(part, device) for part in value))
    return value


def assert_equal(got, expected, tolerance):
    """Integers exactly, floats within the tolerance; raises AssertionError that says where."""
    for ours, theirs in zip(got, expected, strict=True):
        integer = not theirs.is_floating_point()
        limits = {"rtol": 0.0, "atol": 0.0} if integer else tolerance
        torch.testing.assert_close(ours, theirs, **limits, equal_nan=False)
