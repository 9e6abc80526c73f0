"""Which codes may follow each prefix of the catalogue, as bit masks for the training losses."""

from __future__ import annotations

import numpy as np
import torch

from streamctl.tokenizer.tokens import Tokens
from streamctl.tokenizer.trie import PrefixTrie


class LegalCodes:
    """The legal continuations of every prefix of every item.

    Attributes:
        item_tokens: (N, m) int64, what it was made from.
        prefix: (N, m) int64, the row of `packed` for the prefix that each code of an item follows.
        last_choice: (N,) int64, the last level at which more codes than the item's own may follow.
        packed: (prefixes, ceil(K / 8)) uint8, bit c % 8 of byte c // 8: code c may follow.
        first: (V,) bool, True where an item begins with the token.
    """

    def __init__(self, item_tokens: torch.Tensor, tokens: Tokens):
        """Args: item_tokens: (N, m) int64, the tokens of every item."""
        self.item_tokens = item_tokens
        trie = PrefixTrie(item_tokens.cpu().numpy())
        prefix = trie.paths(torch.arange(len(item_tokens))).numpy()
        starts = [tokens.level_range(level)[0] for level in range(tokens.levels)]
        code = item_tokens.cpu().numpy() - np.array(starts)
        # Nodes are numbered level by level, so that those with children come first.
        packed = np.zeros((int(prefix.max()) + 1, -(-max(tokens.sizes) // 8)), np.uint8)
        np.bitwise_or.at(packed, (prefix, code >> 3), (1 << (code & 7)).astype(np.uint8))
        device = item_tokens.device
        choice = np.diff(trie.child_start)[prefix] > 1
        last = choice.shape[1] - 1 - choice[:, ::-1].argmax(1)
        self.prefix = torch.from_numpy(prefix).to(device)
        self.last_choice = torch.from_numpy(np.where(choice.any(1), last, 0)).to(device)
        self.packed = torch.from_numpy(packed).to(device)
        self.first = torch.zeros(tokens.size, dtype=torch.bool, device=device)
        self.first[item_tokens[:, 0]] = True
        self._bits = (1 << torch.arange(8, device=device)).to(torch.uint8)

    def after(self, prefix: torch.Tensor, codes: int) -> torch.Tensor:
        """(R,) rows of `packed` -> (R, codes) bool, True where the code may follow."""
        bits = self.packed[prefix][..., None] & self._bits
        return bits.flatten(1)[:, :codes] != 0
