"""The decoding engine: think, then search the catalogue's trie for the best items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamctl import kernels
from streamctl.decode.items import best_items, legal_nodes, together
from streamctl.decode.think import greedy_thought
from streamctl.device import autocast
from streamctl.errors import UsageError
from streamctl.model.frozen import Branches
from streamctl.model.past import Past
from streamctl.model.policy import DecoderName, Encoded, Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.trie import PrefixTrie


@torch.no_grad()
def recommend(
    policy: Policy,
    trie: PrefixTrie,
    history: torch.Tensor,
    k: int,
    *,
    think: int = 0,
    beam: int = 50,
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
        beam: prefixes kept a level; raised to k.
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
    order = torch.argsort(lengths, stable=True)
    for rows in order.split(together(trie, exclude, allow)) if len(order) else ():
        legal = legal_nodes(trie, rows, exclude, allow)
        with autocast(device, enabled=not exact):
            encoded = policy.encode(history[rows, : int(lengths[rows].max())])
            if thoughts is None:
                thought = greedy_thought(policy, encoded, think, decoder)
            else:
                thought = thoughts[rows.to(thoughts.device)].to(device)
            hidden, past = policy.prompt(encoded, thought, decoder)
            leaves, value = search_after(
                policy, trie, hidden[:, -1:], past, encoded, max(beam, k), legal, decoder
            )
        barred = None if exclude is None else [exclude[row] for row in rows.tolist()]
        wanted = None if allow is None else [allow[row] for row in rows.tolist()]
        items[rows], scores[rows] = best_items(trie, leaves, value, k, barred, wanted, seed)
    return Ranking(items, scores)


def search_after(
    policy: Policy,
    trie: PrefixTrie,
    hidden: torch.Tensor,
    past: Past | Branches,
    encoded: Encoded,
    beam: int,
    legal: torch.Tensor | None = None,
    decoder: DecoderName = "slow",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search over the codes that follow BOS.

    Args:
        hidden: (B, 1, d), the states at BOS. past: what is before the first code, shared.
        legal: (B, nodes) bool, the nodes that lead to a wanted item; None for all.

    Returns:
        leaves (B, beam) int64, -1 where fewer, and their scores (B, beam).
    """
    device = hidden.device
    score = torch.zeros(hidden.shape[:2], device=device)
    node = torch.full_like(score, trie.root, dtype=torch.int64)
    feed = node[..., None]  # of the level before; the first follows BOS
    csr = trie.on(device)
    normalize = "legal" if policy.config.softmax == "catalogue" else "vocabulary"
    for level in range(policy.tokens.levels):
        if level:
            states, past = policy.extend(encoded, feed, decoder, past)
            hidden = states[:, :, -1]
        logits = policy.logits(hidden).float()
        score, parent, token, node = kernels.trie_topk(
            logits, node, score, csr, beam, allowed=legal, normalize=normalize
        )
        past = past.reorder(parent)
        feed = token[..., None]
    return node, score
