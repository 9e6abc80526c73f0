"""Item text -> vectors -> Semantic IDs, the vocabulary of their tokens, and the trie of them."""

from __future__ import annotations

from streamctl.tokenizer.neighbours import vectors
from streamctl.tokenizer.semantic_ids import SemanticIds
from streamctl.tokenizer.tokens import Tokens
from streamctl.tokenizer.trie import PrefixTrie

__all__ = ["PrefixTrie", "SemanticIds", "Tokens", "vectors"]
