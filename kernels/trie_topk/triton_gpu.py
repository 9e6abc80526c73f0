"""trie_topk in Triton: a program a beam scores its children; a sort a user keeps the best k."""

import torch
import triton
import triton.language as tl

from . import reference


@triton.jit
def _children_kernel(
    logits, nodes, priors, start, tokens, children, allowed, scores, errors,
    vocabulary, n_nodes, n_edges, most, width,
    stride_b, stride_w, stride_v, stride_ab, stride_an,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores[beam, i] = the score of the beam's i-th child, -inf where there is none."""
    beam = tl.program_id(0).to(tl.int64)
    user = beam // width
    row = logits + user * stride_b + (beam % width) * stride_w
    node = tl.load(nodes + beam)
    alive = node >= 0
    first = tl.load(start + tl.maximum(node, 0))
    past = tl.where(alive, tl.load(start + tl.maximum(node, 0) + 1), first)
    prior = tl.load(priors + beam).to(tl.float64)
    # Which it is does not matter, for the reference says what is wrong; that the numbers differ
    # keeps the compiler from spilling.
    error = tl.where((first < 0) | (past > n_edges) | (past < first), 1, 0)
    error = tl.where(past - first > vocabulary, 1, error)
    past = tl.where(error > 0, first, past)

    # First walk: the maximum and the sum of exponentials, rescaled as the maximum rises.
    highest = tl.full((), float("-inf"), tl.float64)
    total = tl.zeros((), tl.float64)
    legal = tl.zeros((), tl.int32)
    unordered = tl.zeros((), tl.int32)
    for at in range(first, past, BLOCK):
        edge = at + tl.arange(0, BLOCK)
        inside = edge < past
        token = tl.load(tokens + edge, mask=inside, other=0).to(tl.int64)
        child = tl.load(children + edge, mask=inside, other=0)
        stray = inside & ((child < 0) | (child >= n_nodes))
        error = tl.where(tl.max(stray.to(tl.int32), 0) > 0, 3, error)
        inside = inside & (child >= 0) & (child < n_nodes)
        may = inside
        if MASKED:
            flag = tl.load(allowed + user * stride_ab + child * stride_an, mask=inside, other=0)
            may = inside & (flag != 0)
            if WHOLE:
                inside = may
        stray = inside & ((token < 0) | (token >= vocabulary))
        error = tl.where(tl.max(stray.to(tl.int32), 0) > 0, 2, error)
        inside = inside & (token >= 0) & (token < vocabulary)
        value = tl.load(row + token * stride_v, mask=inside, other=float("-inf")).to(tl.float64)
        strange = inside & ((value != value) | (value == float("inf")))
        unordered += tl.sum(strange.to(tl.int32), 0)
        legal += tl.sum(may.to(tl.int32), 0)
        if not WHOLE:
            peak = tl.maximum(highest, tl.max(value, 0))
            base = tl.where(peak > float("-inf"), peak, 0.0)
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(value - base), 0)
            highest = peak
    if WHOLE:
        for column in range(0, tl.where(legal > 0, vocabulary, 0), BLOCK):
            every = (column + tl.arange(0, BLOCK)).to(tl.int64)
            there = every < vocabulary
            value = tl.load(row + every * stride_v, mask=there, other=float("-inf"))
            value = value.to(tl.float64)
            odd = (value != value) | (value == float("inf"))
            error = tl.where(tl.max(odd.to(tl.int32), 0) > 0, 4, error)
            peak = tl.maximum(highest, tl.max(value, 0))
            base = tl.where(peak > float("-inf"), peak, 0.0)
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(value - base), 0)
            highest = peak
    refused = (unordered > 0) | (prior != prior) | (prior == float("inf"))
    refused = (legal > 0) & refused
    error = tl.where(refused, 4, error)
    tl.store(errors + beam, error)
    norm = tl.where(total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), 0.0)

    # Second walk: the scores (none after an error: the run is about to be refused).
    past = tl.where(error > 0, first, past)
    out = scores + beam * most
    for shift in range(0, most, BLOCK):
        place = (shift + tl.arange(0, BLOCK)).to(tl.int64)
        edge = first + place
        inside = edge < past
        token = tl.load(tokens + edge, mask=inside, other=0).to(tl.int64)
        if MASKED:
            child = tl.load(children + edge, mask=inside, other=0)
            may = tl.load(allowed + user * stride_ab + child * stride_an, mask=inside, other=0)
            inside = inside & (may != 0)
        value = tl.load(row + token * stride_v, mask=inside, other=float("-inf")).to(tl.float64)
        score = (prior + (value - norm)).to(tl.float32)
        tl.store(out + place, tl.where(inside, score, float("-inf")), mask=place < most)


def run(logits, nodes, beam_scores, trie, k, allowed, normalize):
    batch, width, vocabulary = logits.shape
    device = logits.device
    start, tokens, children = (part.contiguous() for part in trie)
    n_nodes = len(start) - 1
    nodes, beam_scores = nodes.contiguous(), beam_scores.contiguous()
    scores = torch.full((batch, k), -torch.inf, device=device)
    parent, token = (torch.zeros((batch, k), dtype=torch.int64, device=device) for _ in range(2))
    node = torch.full((batch, k), -1, dtype=torch.int64, device=device)
    if not nodes.numel():
        return scores, parent, token, node
    low, high = nodes.aminmax()
    if low < -1 or high >= n_nodes:
        return reference.run(logits, nodes, beam_scores, trie, k, allowed, normalize)

    # The widest beam decides the width of the score table: at most V, whatever the catalogue.
    at = nodes.clamp_min(0)
    fan_out = torch.where(nodes >= 0, start[at + 1] - start[at], 0)
    most = min(vocabulary, max(1, int(fan_out.max())))
    table = torch.empty((batch, width * most), dtype=torch.float32, device=device)
    errors = torch.empty(batch * width, dtype=torch.int32, device=device)
    masked = allowed is not None
    mask = allowed.view(torch.uint8) if masked else errors
    _children_kernel[(batch * width,)](
        logits, nodes, beam_scores, start, tokens, children, mask, table, errors,
        vocabulary, n_nodes, len(children), most, width, *logits.stride(),
        *(allowed.stride() if masked else (0, 0)),
        MASKED=masked, WHOLE=normalize == "vocabulary", BLOCK=256,
    )  # fmt: skip
    if errors.any():
        return reference.run(logits, nodes, beam_scores, trie, k, allowed, normalize)

    # A stable sort, since topk does not promise the lower of equal scores first.
    ranked, place = table.sort(dim=1, descending=True, stable=True)
    ranked, place = ranked[:, :k], place[:, :k]
    found = ranked > -torch.inf
    beam = torch.where(found, place // most, 0)
    edge = torch.where(found, start[nodes.gather(1, beam).clamp_min(0)] + place % most, 0)
    kept = ranked.shape[1]
    scores[:, :kept] = ranked
    parent[:, :kept] = beam
    if len(children):
        token[:, :kept] = torch.where(found, tokens[edge].long(), 0)
        node[:, :kept] = torch.where(found, children[edge], -1)
    return scores, parent, token, node
