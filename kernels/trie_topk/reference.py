"""The definition of trie_topk, in float64 PyTorch, on the list of all legal (beam, child) pairs.

The other backends ask it what is wrong with what they cannot accept.
"""

import torch

from ..dispatch import KernelError


def run(logits, nodes, beam_scores, trie, k, allowed, normalize):
    batch, width, vocabulary = logits.shape
    n_nodes = trie.child_start.shape[0] - 1
    device = logits.device
    flat = nodes.reshape(-1)
    _within("nodes", flat, -1, n_nodes)

    # Expand every live beam's edges: `beam` and `edge` are parallel lists in (beam, child) order.
    alive = flat >= 0
    first = trie.child_start[flat.clamp_min(0)] if n_nodes else torch.zeros_like(flat)
    past = trie.child_start[flat.clamp_min(0) + 1] if n_nodes else torch.zeros_like(flat)
    counts = torch.where(alive, past - first, 0)
    wrong = (first < 0) | (past > len(trie.child_node)) | (counts < 0) | (counts > vocabulary)
    if (alive & wrong).any():
        raise KernelError(
            "trie.child_start must rise from 0 to the number of edges, with at most V children a"
            f" node; it does not at node {int(flat[alive & wrong][0])}"
        )
    beam = torch.repeat_interleave(torch.arange(batch * width, device=device), counts)
    offset = torch.arange(len(beam), device=device) - (counts.cumsum(0) - counts)[beam]
    edge = first[beam] + offset
    token, node = trie.child_token[edge].long(), trie.child_node[edge]
    _within("trie tokens", token, 0, vocabulary)
    _within("trie.child_node", node, 0, n_nodes)
    keep = torch.ones_like(beam, dtype=torch.bool)
    if allowed is not None:
        keep = allowed[beam // width, node]
    # A beam none of whose children is allowed takes no part.
    used = torch.bincount(beam[keep], minlength=batch * width) > 0
    keep, beam, token, node = (part[used[beam]] for part in (keep, beam, token, node))

    table = logits.reshape(-1, vocabulary).double()  # (B * W, V)
    logit = table[beam, token]
    prior = beam_scores.reshape(-1).double()
    counted = torch.cat([logit, prior[used]])
    if normalize == "vocabulary":
        counted = torch.cat([counted, table[used].flatten()])
    if (counted.isnan() | (counted == torch.inf)).any():
        raise KernelError("logits and beam_scores must not hold NaN or +inf where they count")
    if normalize == "vocabulary":
        norm = torch.logsumexp(table, 1)
    else:
        highest = torch.full_like(prior, -torch.inf).scatter_reduce(0, beam, logit, "amax")
        weight = (logit - highest[beam]).exp().nan_to_num(0.0)
        norm = highest + torch.zeros_like(prior).index_add(0, beam, weight).log()
    score = (prior[beam] + (logit - norm[beam])).float()
    score = score.masked_fill((logit == -torch.inf) | ~keep, -torch.inf)

    scores = torch.full((batch, k), -torch.inf, device=device)
    parents, tokens = (torch.zeros(batch, k, dtype=torch.int64, device=device) for _ in range(2))
    children = torch.full((batch, k), -1, dtype=torch.int64, device=device)
    for b in range(batch):
        mine = ((beam // width == b) & (score > -torch.inf)).nonzero()[:, 0]
        order = score[mine].sort(descending=True, stable=True).indices[:k]
        best = mine[order]
        n = len(best)
        scores[b, :n], parents[b, :n] = score[best], beam[best] % width
        tokens[b, :n], children[b, :n] = token[best], node[best]
    return scores, parents, tokens, children


def _within(name, values, low, high):
    if values.numel() and (values.min() < low or values.max() >= high):
        value = int(values.max() if values.max() >= high else values.min())
        raise KernelError(f"{name} must lie in [{low}, {high}), got {value}")
