"""The decoding engine: think, then search the catalogue's trie for the best items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamctl import kernels
from streamctl.decode.items import best_items, legal_nodes, of_rows, together
from streamctl.decode.think import greedy_thought
from streamctl.device import autocast
from streamctl.errors import UsageError
from streamctl.model.candidates import branches
from streamctl.model.frozen import Branches
from streamctl.model.past import Past
from streamctl.model.policy import DecoderName, Encoded, Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.trie import PrefixTrie

WIDTH = 64  # of the first beam where the true best are wanted; the next one is four times as wide
LOGITS = 1 << 24  # held at once by a beam as wide as it needs to be


@torch.no_grad()
def recommend(
    policy: Policy,
    trie: PrefixTrie,
    history: torch.Tensor,
    k: int,
    *,
    think: int = 0,
    beam: int | None = 50,
    decoder: DecoderName = "slow",
    thoughts: torch.Tensor | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
    exact: bool = False,
) -> Ranking:
    """The k best items of each user.

    An item's score is log P(its codes | history, thought), each code normalised over the
    vocabulary (Eq. 11) or the trie's continuations, as the policy was trained (`softmax`). Items
    that share their codes share a score; their order is random, fixed by the seed.

    Args:
        history: (B, H) int64 items, oldest first, -1 on the right.
        think: l, think tokens before the codes, the likeliest one after the other.
        beam: prefixes kept a level; raised to k. None: as many as the true k best items need. Each
            further code can only lower a prefix's probability, so that a beam has found them once
            nothing that it dropped was likelier than the k-th item.
        decoder: "slow", or "direct", which never thinks.
        thoughts: (B, l) int64 given think tokens, used instead of the model's own.
        exclude: for each user, items that must not be recommended.
        allow: for each user the only items wanted, or None for all.
        exact: fp32 throughout; otherwise bf16 where the device has it.

    Raises:
        UsageError: a history without items.
    """
    device = policy.item_tokens.device
    history = torch.as_tensor(history, device=device)
    lengths = (history >= 0).sum(1)
    if len(history) and not bool(lengths.min() > 0):
        raise UsageError("a history needs an item or more")
    if decoder == "direct":
        think, thoughts = 0, None
    items = torch.full((len(history), k), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(history), k), -torch.inf, device=device)
    # Users of similar lengths side by side: little of a chunk is padding.
    left, width = torch.argsort(lengths, stable=True), max(k, WIDTH if beam is None else beam)
    while len(left):
        chunk, unsure = together(trie, exclude, allow), []
        if beam is None:
            chunk = max(1, min(chunk, LOGITS // (width * policy.tokens.size)))
        for rows in left.split(chunk):
            legal = legal_nodes(trie, rows, exclude, allow)
            with autocast(device, enabled=not exact):
                encoded = policy.encode(history[rows, : int(lengths[rows].max())])
                if thoughts is None:
                    thought = greedy_thought(policy, encoded, think)
                else:
                    thought = thoughts[rows.to(thoughts.device)].to(device)
                hidden, past = policy.prompt(encoded, thought, decoder)
                leaves, value, dropped = search_after(
                    policy, trie, policy.logits(hidden), past, encoded, width, legal, decoder
                )
            barred, wanted = of_rows(rows, exclude), of_rows(rows, allow)
            items[rows], scores[rows] = best_items(trie, leaves, value, k, barred, wanted, seed)
            if beam is None:
                unsure.append(rows[scores[rows, -1] < dropped])
        left, width = torch.cat(unsure) if unsure else left[:0], 4 * width
    return Ranking(items, scores)


def search_after(
    policy: Policy,
    trie: PrefixTrie,
    logits: torch.Tensor,
    past: Past | Branches,
    encoded: Encoded,
    beam: int,
    legal: torch.Tensor | None = None,
    decoder: DecoderName = "slow",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam search over the codes that follow BOS.

    Over the catalogue's softmax an only continuation is certain, so that nothing is read of a
    prefix that one item alone begins with.

    Args:
        logits: (B, 1, V) at BOS. past: what is before the first code, shared.
        legal: (B, nodes) bool, the nodes that lead to a wanted item; None for all.

    Returns:
        leaves (B, beam) int64, -1 where fewer, and their scores (B, beam); and (B,) what no prefix
        that was dropped is likelier than.
    """
    users, device = len(logits), logits.device
    score = torch.zeros(users, 1, device=device)
    node = token = row = torch.full_like(score, trie.root, dtype=torch.int64)  # rows of the past
    csr, shared = trie.on(device), trie.shared(device)
    catalogue = policy.config.softmax == "catalogue"
    normalize = "legal" if catalogue else "vocabulary"
    logits = logits.float()
    dropped = torch.full((users,), -torch.inf, device=device)
    for level in range(policy.tokens.levels):
        if level:
            open_ = node >= 0
            if catalogue:
                open_ &= shared[node.clamp(min=0)]
            branch, one, width = branches(node, open_)
            if width:
                past = past.reorder(row.gather(1, one))
                feed = token.gather(1, one)
                states, past = policy.extend(encoded, feed[..., None], decoder, past)
                logits = policy.logits(states[:, :, -1]).float()
            # A branch that is closed takes any row: what it leads to is certain.
            row = branch.clamp(max=max(width - 1, 0))
        score, parent, token, node = kernels.trie_topk(
            _rows(logits, row), node, score, csr, beam, allowed=legal, normalize=normalize
        )
        row = row.gather(1, parent)
        dropped = torch.maximum(dropped, score[:, -1])  # -inf while the beam has room
    return node, score, dropped


def _rows(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """(B, W, V) and (B, n) int64 -> (B, n, V)."""
    return logits.gather(1, row[..., None].expand(-1, -1, logits.shape[-1]))
