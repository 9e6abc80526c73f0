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
        thoughts: where the think tokens come from if they are not the model's own; the first
            `think` of them are used, all if nobody says how many.
        narrow: find no more items than the beam is wide, as an evaluation of a beam must; otherwise
            it is as wide as items are asked for.
    """

    policy: Policy  # on its device
    trie: PrefixTrie  # what it may recommend
    think: int = 0  # l, think tokens before the codes; 0 answers at once
    thoughts: Thoughts | None = None
    decoder: Literal["slow", "direct"] = "slow"  # direct never thinks
    beam: int = 50
    seed: int = 0  # of the random order of items that share their codes
    narrow: bool = False

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

        Items that a narrow beam does not find are -1.
        """
        count = min(k, self.beam) if self.narrow else k
        histories = histories.to(self.policy.item_tokens.device)
        length, given = self.think if think is None else think, None
        if self.thoughts is not None:
            given = self.thoughts(histories, users)
            given = given[:, :length] if length or think is not None else given
        ranking = recommend(
            self.policy, self.trie, histories, count, think=length, beam=self.beam,
            decoder=self.decoder, thoughts=given, exclude=exclude, allow=allow, seed=self.seed,
        )  # fmt: skip
        short = 0, k - ranking.items.shape[1]
        items = F.pad(ranking.items, short, value=-1)
        return Ranking(items, F.pad(ranking.scores, short, value=-torch.inf))


def random_thoughts(tokens: Tokens, users: int, length: int, seed: int) -> Thoughts:
    """Uniform think tokens, fixed for each user by the seed."""
    low, high = tokens.think_range
    rng = np.random.default_rng(derive_seed(seed, "random thoughts"))
    drawn = torch.from_numpy(rng.integers(low, high, size=(users, length)))
    return lambda history, users: drawn[torch.from_numpy(users)].to(history.device)
