"""trie_topk on the CPU: each beam's children are walked once; a sorted list keeps the best k."""

import math

import numba
import numpy as np
import torch

from .. import threads
from ..compiled import OPTIONS
from . import reference

_CHUNK_WORK = 1 << 15  # logits weighed before a second thread is worth waking
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE = tuple(1.0 / math.factorial(i) for i in range(14))
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = _INVERSE[2:]


@numba.njit(**OPTIONS)
def _exponentials(values, count, highest):
    """values[:count] = exp(values - highest), for values <= highest, itself finite.

    Written out (ln 2 split in two, Taylor to x^13: within 2 units in the last place) because calls
    to libm keep the loop from being vectorized.
    """
    bits = values.view(np.int64)
    for i in range(count):
        value = max(values[i] - highest, -700.0)  # exp(-700) adds nothing to a sum of 1 or more
        whole = np.floor(value * 1.4426950408889634 + 0.5)
        r = (value - whole * _LN2_HIGH) - whole * _LN2_LOW
        p = _C13
        p = p * r + _C12
        p = p * r + _C11
        p = p * r + _C10
        p = p * r + _C9
        p = p * r + _C8
        p = p * r + _C7
        p = p * r + _C6
        p = p * r + _C5
        p = p * r + _C4
        p = p * r + _C3
        p = p * r + _C2
        p = p * r + 1.0
        values[i] = p * r + 1.0
        bits[i] += np.int64(whole) << np.int64(52)


@numba.njit(fastmath={"reassoc"}, **OPTIONS)
def _log_sum_exp(values, count, highest):
    """log(sum(exp(values[:count]))), where highest is their finite maximum; overwrites them."""
    _exponentials(values, count, highest)
    total = 0.0
    for i in range(count):
        total += values[i]
    return highest + math.log(total)


@numba.njit(**OPTIONS)
def _prepare(raw, values, count):
    """values[:count] = raw[:count] in float64. Returns the highest; NaN when one is NaN or +inf."""
    highest = -np.inf
    strange = False
    for i in range(count):
        value = np.float64(raw[i])
        values[i] = value
        strange |= not value < np.inf
        highest = max(highest, value)
    return np.nan if strange else highest


@numba.njit(**OPTIONS)
def _children(nodes, child_start):
    """How many children the beams have together; a beam on no node has none."""
    total = 0
    for b in range(nodes.shape[0]):
        for w in range(nodes.shape[1]):
            node = nodes[b, w]
            if 0 <= node < child_start.shape[0] - 1:
                total += child_start[node + 1] - child_start[node]
    return total


@numba.njit(
    numba.bool_(
        numba.float32[:, :, :],
        numba.int64[:, :],
        numba.float32[:, :],
        numba.int64[:],
        numba.int64[:],
        numba.int64[:],
        numba.bool_[:, :],
        numba.bool_,
        numba.int64,
        numba.int64,
        numba.float32[:, ::1],
        numba.int64[:, ::1],
        numba.int64[:, ::1],
        numba.int64[:, ::1],
    ),
    **OPTIONS,
)
def _search(
    logits, nodes, priors, child_start, tokens, child_node, allowed,
    whole, first, last, scores, parents, out_tokens, out_nodes,
):  # fmt: skip
    """Fill the outputs of users [first, last); whether there is something it cannot accept."""
    n_nodes = child_start.shape[0] - 1
    n_edges = child_node.shape[0]
    width = nodes.shape[1]
    vocabulary, k = logits.shape[2], scores.shape[1]
    raw = np.empty(vocabulary, np.float32)
    values = np.empty(vocabulary, np.float64)
    edges = np.empty(vocabulary, np.int64)
    for b in range(first, last):
        found = 0
        for w in range(width):
            node = nodes[b, w]
            if node == -1:
                continue
            if node < 0 or node >= n_nodes:
                return True
            start, stop = child_start[node], child_start[node + 1]
            if start < 0 or stop > n_edges or stop - start > vocabulary or stop < start:
                return True
            count = kept = 0
            for edge in range(start, stop):
                child = child_node[edge]
                if child < 0 or child >= n_nodes:
                    return True
                may = not allowed.shape[0] or allowed[b, child]
                if whole and not may:
                    continue
                token = tokens[edge]
                if token < 0 or token >= vocabulary:
                    return True
                raw[count] = logits[b, w, token]
                edges[count] = edge if may else -1  # it counts in the norm alone
                count += 1
                kept += may
            if kept == 0:
                continue
            highest = _prepare(raw, values, count)
            prior = np.float64(priors[b, w])
            if not (highest < np.inf and prior < np.inf):
                return True
            if whole:
                top = _prepare(logits[b, w], values, vocabulary)
                if not top < np.inf:
                    return True
                norm = _log_sum_exp(values, vocabulary, top) if top > -np.inf else 0.0
            else:
                norm = _log_sum_exp(values, count, highest) if highest > -np.inf else 0.0
            # Later candidates lose ties, so only a strictly higher score enters a full list.
            entry = scores[b, k - 1] if found == k else np.float32(-np.inf)
            if not np.float32(prior + (highest - norm)) > entry:
                continue
            for i in range(count):
                score = np.float32(prior + (np.float64(raw[i]) - norm))
                if not score > entry or edges[i] < 0:
                    continue
                place = min(found, k - 1)
                while place > 0 and scores[b, place - 1] < score:
                    scores[b, place] = scores[b, place - 1]
                    parents[b, place] = parents[b, place - 1]
                    out_nodes[b, place] = out_nodes[b, place - 1]
                    place -= 1
                scores[b, place], parents[b, place], out_nodes[b, place] = score, w, edges[i]
                found = min(found + 1, k)
                if found == k:
                    entry = scores[b, k - 1]
        for i in range(found):
            edge = out_nodes[b, i]
            out_tokens[b, i] = tokens[edge]
            out_nodes[b, i] = child_node[edge]
        for i in range(found, k):
            scores[b, i], parents[b, i] = -np.inf, 0
            out_tokens[b, i], out_nodes[b, i] = 0, -1
    return False


_NO_MASK = np.empty((0, 0), np.bool_)


def run(logits, nodes, beam_scores, trie, k, allowed, normalize):
    batch, width, vocabulary = logits.shape
    inputs = (
        logits.float().numpy(),
        nodes.numpy(),
        beam_scores.numpy(),
        trie.child_start.numpy(),
        trie.child_token.numpy(),
        trie.child_node.numpy(),
        _NO_MASK if allowed is None else allowed.numpy(),
        normalize == "vocabulary",
    )
    scores = torch.empty((batch, k), dtype=torch.float32)
    parents, out_tokens, out_nodes = (torch.empty((batch, k), dtype=torch.int64) for _ in range(3))
    outputs = tuple(t.numpy() for t in (scores, parents, out_tokens, out_nodes))

    def search(first, last):
        return _search(*inputs, first, last, *outputs)

    whole = batch * width * vocabulary
    work = (
        whole if normalize == "vocabulary" else _children(nodes.numpy(), trie.child_start.numpy())
    )
    chunks = max(1, min(2 * torch.get_num_threads(), work // _CHUNK_WORK))
    step = max(1, -(-batch // chunks))
    if any(threads.over_ranges(search, batch, step)):
        return reference.run(logits, nodes, beam_scores, trie, k, allowed, normalize)
    return scores, parents, out_tokens, out_nodes
