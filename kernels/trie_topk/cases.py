"""Named inputs of trie_topk, shared by the tests and the benchmark."""

from typing import NamedTuple

import torch

from . import CsrTrie, trie_topk

# Scores are float64 rounded once, and libraries' exp and log may differ in the last place.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


class Case(NamedTuple):
    """One call's arguments."""

    logits: torch.Tensor
    nodes: torch.Tensor
    beam_scores: torch.Tensor
    trie: CsrTrie
    k: int
    options: dict


def call(case, backend):
    """The op on this case."""
    *arguments, options = case
    return trie_topk(*arguments, **options, backend=backend)


def build_trie(items):
    """A CsrTrie of rows of codes (N, m) int64, level by level; node 0 is the root."""
    prefix = torch.zeros(len(items), dtype=torch.int64)  # node of each row's prefix so far
    parents, tokens, total = [], [], 1
    for column in items.T:
        base = int(column.max()) + 1
        edges, prefix = torch.unique(prefix * base + column, return_inverse=True)  # sorted
        parents.append(edges // base)
        tokens.append(edges % base)
        prefix = prefix + total
        total += len(edges)
    counts = torch.bincount(torch.cat(parents), minlength=total)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return CsrTrie(start, torch.cat(tokens), torch.arange(1, total))


def random_items(count, levels, codes, seed=0):
    """Distinct-ish random rows of codes (count, levels); level l's tokens follow level l - 1's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(codes, (count, levels), generator=generator)
    return drawn + torch.arange(levels) * codes


def random_case(items, users, beams, depth, vocabulary, k, seed=0, dtype=torch.float32, **options):
    """Beams on random nodes at `depth` of the trie of `items`, with random logits."""
    trie = build_trie(items)
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(users, beams, dtype=torch.int64)
    for _ in range(depth):
        first, past = trie.child_start[nodes], trie.child_start[nodes + 1]
        step = torch.rand(users, beams, generator=generator) * (past - first)
        nodes = trie.child_node[first + step.long().clamp_max(past - first - 1)]
    logits = torch.randn(users, beams, vocabulary, generator=generator) * 3
    scores = torch.randn(users, beams, generator=generator)
    return Case(logits.to(dtype), nodes, scores, trie, k, options)


def cases(dtype=torch.float32):
    """Small cases by name: odd sizes, dead beams, ties, masks, more asked for than exists."""
    items = random_items(60, 3, 7)
    make = lambda *args, **options: random_case(items, *args, dtype=dtype, **options)  # noqa: E731
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
        "one-of-one": random_case(torch.zeros(1, 1).long(), 1, 1, 0, 1, 1, dtype=dtype),
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
