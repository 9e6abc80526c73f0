"""A policy as a recommender: beam search, with its own thoughts, given ones or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from streamctl.decode.beam import recommend
from streamctl.device import derive_seed
from streamctl.model.policy import Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.tokens import Tokens
from streamctl.tokenizer.trie import PrefixTrie

Thoughts = Callable[[torch.Tensor, np.ndarray], torch.Tensor]  # (history, users) -> (B, l)


@dataclass(frozen=True)
class PolicyRecommender:
    """`ranking.Recommender` over one of a policy's decoders.

    Attributes:
        policy, trie: the model, on its device, and the catalogue it may recommend.
        think: l, think tokens before the codes; 0 answers at once.
        thoughts: where the think tokens come from if they are not the model's own.
        decoder: "slow", or "direct" (which never thinks).
        beam: width of the search over codes.
        seed: of the random order of items that share their codes.
        mode, margin, exact: how thoughts are found, when they end early, and the precision, as in
            `decode.recommend`.
    """

    policy: Policy
    trie: PrefixTrie
    think: int = 0
    thoughts: Thoughts | None = None
    decoder: Literal["slow", "direct"] = "slow"
    beam: int = 50
    seed: int = 0
    mode: Literal["greedy", "joint", "marginal"] = "greedy"
    margin: float | None = None
    exact: bool = False

    def recommend(
        self,
        histories: torch.Tensor,
        k: int,
        *,
        users: np.ndarray | None = None,
        think: int | None = None,
        exclude: Sequence[np.ndarray] | None = None,
        allow: Sequence[np.ndarray | None] | None = None,
    ) -> Ranking:
        """The k best items for each history; `users` is only needed for given thoughts.

        The beam is at least k wide.
        """
        histories = histories.to(self.policy.item_tokens.device)
        ranking, _ = recommend(
            self.policy,
            self.trie,
            histories,
            k,
            think=self.think if think is None else think,
            beam=self.beam,
            decoder=self.decoder,
            thoughts=None if self.thoughts is None else self.thoughts(histories, users),
            exclude=exclude,
            allow=allow,
            seed=self.seed,
            mode=self.mode,
            margin=self.margin,
            exact=self.exact,
        )
        return ranking

    def grow(self, items: np.ndarray, codes: np.ndarray, vectors: np.ndarray) -> None:
        """Know items that joined the catalogue: in histories by their codes, and in the trie.

        Args:
            items: int64 (n,) their indexes, from the number of items known on.
            codes: int64 (n, m). vectors: float32 (N, D), unit rows of all items, these too.
        """
        known = self.policy.item_tokens
        tokens = self.policy.tokens.item_tokens(codes)
        grown = F.pad(known, (0, 0, 0, max(0, len(vectors) - len(known))))
        grown[torch.from_numpy(items).to(known.device)] = torch.from_numpy(tokens).to(known)
        self.policy.item_tokens = grown
        held = np.flatnonzero(self.trie.leaf >= 0)  # by another method with the same trie
        new = ~np.isin(items, held)
        self.trie.add(items[new], tokens[new])


def random_thoughts(tokens: Tokens, users: int, length: int, seed: int) -> Thoughts:
    """Uniform think tokens, fixed for each user by the seed."""
    low, high = tokens.think_range
    rng = np.random.default_rng(derive_seed(seed, "random thoughts"))
    drawn = torch.from_numpy(rng.integers(low, high, size=(users, length)))
    return lambda history, users: drawn[torch.from_numpy(users)].to(history.device)
