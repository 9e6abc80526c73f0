"""Exact top-k: beams widened until nothing that they dropped could have been among the k best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamctl.decode.beam import search_after
from streamctl.decode.items import best_items, legal_nodes, of_rows
from streamctl.decode.think import greedy_thought
from streamctl.model.policy import DecoderName, Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.trie import PrefixTrie

WIDTH = 64  # of the first beam
WIDER = 4  # times as wide is the next one
LOGITS = 1 << 24  # held at once


@torch.no_grad()
def exact_top(
    policy: Policy,
    trie: PrefixTrie,
    history: torch.Tensor,
    k: int,
    *,
    think: int = 0,
    decoder: DecoderName = "slow",
    thoughts: torch.Tensor | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> tuple[Ranking, np.ndarray]:
    """The true k best items of the whole catalogue, in fp32: what no beam alone can guarantee.

    Each further code can only lower a prefix's probability, so that a beam has found the k best
    once no prefix that it dropped was likelier than the k-th item. Arguments are those of
    `decode.recommend`; a thought of the model's own is greedy, and scores are conditioned on it.

    Returns:
        the ranking, and int64 (B,): how wide each user's beam had to be.
    """
    device = policy.item_tokens.device
    history = torch.as_tensor(history, device=device)
    items = torch.full((len(history), k), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(history), k), -torch.inf, device=device)
    needed = np.zeros(len(history), np.int64)
    lengths = (history >= 0).sum(1)
    left, width = torch.argsort(lengths, stable=True), max(k, WIDTH)
    while len(left):
        unsure = []
        for rows in left.split(max(1, LOGITS // (width * policy.tokens.size))):
            encoded = policy.encode(history[rows, : int(lengths[rows].max())])
            if decoder == "direct":
                thought = None
            elif thoughts is None:
                thought = greedy_thought(policy, encoded, think, decoder)
            else:
                thought = thoughts[rows].to(device)
            hidden, past = policy.prompt(encoded, thought, decoder)
            legal = legal_nodes(trie, rows, exclude, allow)
            leaves, value, _, dropped = search_after(
                policy, trie, hidden[:, -1:], past, encoded, width, legal, decoder
            )
            barred, wanted = of_rows(rows, exclude), of_rows(rows, allow)
            items[rows], scores[rows] = best_items(trie, leaves, value, k, barred, wanted, seed)
            needed[rows.cpu().numpy()] = width
            unsure.append(rows[scores[rows, -1] < dropped])
        left, width = torch.cat(unsure), WIDER * width
    return Ranking(items, scores), needed
