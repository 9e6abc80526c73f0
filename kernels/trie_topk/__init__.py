"""trie_topk: one step of beam search whose continuations are the children of trie nodes."""

from typing import NamedTuple

import torch

from .. import checks
from ..dispatch import KernelError, implementation

__all__ = ["CsrTrie", "trie_topk"]

NORMALIZE = ("legal", "vocabulary")


class CsrTrie(NamedTuple):
    """A prefix trie as flat arrays: node n's children are edges child_start[n]:child_start[n+1].

    child_start: (n_nodes + 1,) int64, rising from 0 to n_edges.
    child_token: (n_edges,) int64, sorted within a node: the token of each edge.
    child_node: (n_edges,) int64: the node each edge leads to.
    """

    child_start: torch.Tensor
    child_token: torch.Tensor
    child_node: torch.Tensor


def trie_topk(
    logits, nodes, beam_scores, trie, k, *, allowed=None, normalize="legal", backend=None
):
    """The k best continuations of each user's beams that stay inside the trie.

        score(beam w, child c) = beam_scores[w] + log_softmax(logits[w])[token of c]

    The cost depends on the beams and their children, not on the size of the catalogue: the trie's
    arrays are checked by shape and dtype only.

    logits: (B, W, V) float32 or bfloat16, raw. -inf excludes a token; NaN or +inf raises.
    nodes: (B, W) int64, the trie node each beam stands on; -1 is a dead beam.
    beam_scores: (B, W) float32, the log-probability of each beam so far.
    trie: CsrTrie on the same device. k: int >= 1, continuations to keep for each user.
    allowed: optional bool over trie nodes, (n_nodes,) or (B, n_nodes): children whose node is
        False are left out of the result. They still count in the normalisation: a filter must not
        move probability from the branches that it thins to their remaining children.
    normalize: "legal", log-softmax over the node's children alone; or "vocabulary", over all V
        tokens, illegal ones dropped afterwards (as transformers' prefix_allowed_tokens_fn does to
        normalised scores).
    backend: as in nearest_codeword.
    Returns scores (B, k) float32 in falling order, parent (B, k) int64 (which beam), token (B, k)
    int64 and node (B, k) int64. Equal scores: the lower beam, then the lower token first. Where
    fewer than k exist: score -inf, node -1, parent and token 0 (safe to gather with).
    Scores are computed in float64 and rounded to float32 once.
    Raises KernelError for wrong shapes, dtypes or devices, nodes or tokens out of range, NaN or
    +inf among the scores that count, and a backend that cannot run.
    """
    logits = checks.tensor("logits", logits, ("B", "W", "V"), checks.FLOATS)
    batch, width, _ = logits.shape
    device = logits.device
    nodes = checks.tensor("nodes", nodes, (batch, width), (torch.int64,), device)
    beam_scores = checks.tensor(
        "beam_scores", beam_scores, (batch, width), (torch.float32,), device
    )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise KernelError(f"k must be an int >= 1, got {k!r}")
    if normalize not in NORMALIZE:
        raise KernelError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    if not isinstance(trie, CsrTrie):
        raise KernelError(f"trie must be a CsrTrie, got {type(trie).__qualname__}")
    start = checks.tensor("trie.child_start", trie.child_start, ("n + 1",), (torch.int64,), device)
    token = checks.tensor("trie.child_token", trie.child_token, ("edges",), (torch.int64,), device)
    node = checks.tensor(
        "trie.child_node", trie.child_node, (token.shape[0],), (torch.int64,), device
    )
    if start.shape[0] < 1:
        raise KernelError("trie.child_start must hold n_nodes + 1 offsets, got none")
    if allowed is not None:
        n_nodes = start.shape[0] - 1
        shape = (n_nodes,) if getattr(allowed, "ndim", 1) == 1 else (batch, n_nodes)
        allowed = checks.tensor("allowed", allowed, shape, (torch.bool,), device)
        allowed = allowed.expand(batch, n_nodes)
    trie = CsrTrie(start, token, node)
    run = implementation(__name__, backend, device.type)
    return run(logits, nodes, beam_scores, trie, k, allowed, normalize)
