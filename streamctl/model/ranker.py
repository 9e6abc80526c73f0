"""A state that ranks the whole catalogue: Eq. 14 with every item as a candidate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from streamctl.model.backbone import BackboneConfig, Encoder, RMSNorm, initialise

INITIAL_STD = 0.02  # of the item and code vectors; a norm follows them where they are read


class StateRanker(nn.Module):
    """History -> state s_0, whose products with the item vectors rank the catalogue.

    An item's vector is the sum of its code embeddings and of one of its own: codes share what
    items have in common, the own vector keeps what sets them apart. The same vectors are read
    by the encoder and ranked by the state. Attention is causal, so that one pass over a sequence
    gives the state after each of its items.

    Attributes:
        item_tokens: (N, m) int64 buffer, the tokens of every item.
    """

    item_tokens: torch.Tensor

    def __init__(self, shape: BackboneConfig, item_tokens: torch.Tensor):
        """An untrained ranker.

        Args:
            shape: of the encoder; `vocabulary` counts the tokens.
            item_tokens: (N, m) int64.
        """
        super().__init__()
        self.shape = shape
        self.items = nn.Embedding(len(item_tokens), shape.d_model)
        self.codes = nn.Embedding(shape.vocabulary, shape.d_model)
        self.norm = RMSNorm(shape)
        self.encoder = Encoder(shape)
        self.register_buffer("item_tokens", item_tokens, persistent=False)

    @classmethod
    def build(cls, shape: BackboneConfig, item_tokens: torch.Tensor, seed: int) -> StateRanker:
        """A ranker with its initial weights, which depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ranker = cls(shape, item_tokens)
        generator = torch.Generator().manual_seed(seed)
        for table in (ranker.items, ranker.codes):
            nn.init.normal_(table.weight, std=INITIAL_STD, generator=generator)
        initialise(ranker.encoder, shape, generator)
        return ranker

    def item_vectors(self) -> torch.Tensor:
        """(N, d): what is read and what is ranked."""
        return self.items.weight + self.codes(self.item_tokens).sum(1)

    def forward(self, history: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The state after each item.

        Args:
            history: (B, H) int64, oldest first; -1 on the right reaches no state to its left.
            vectors: (N, d) of `item_vectors`.

        Returns:
            (B, H, d).
        """
        _, x = self.norm(vectors[history.clamp(min=0)], None)
        return self.encoder(x, causal=True)

    @torch.no_grad()
    def states(self, history: torch.Tensor) -> torch.Tensor:
        """s_0 (B, d) float32 of each history (B, H), -1 on the right."""
        states = self(history, self.item_vectors())
        last = ((history >= 0).sum(1) - 1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last].float()


def states_of(
    ranker: StateRanker,
    lengths: np.ndarray,
    histories: Callable[[np.ndarray], np.ndarray],
    batch: int = 1024,
) -> np.ndarray:
    """States of many histories, those of one length together.

    Args:
        ranker: in evaluation mode.
        lengths: (E,) items of each history.
        histories: rows -> (B, H) int64.

    Returns:
        (E, d) float32.
    """
    device = ranker.item_tokens.device
    found = np.empty((len(lengths), ranker.shape.d_model), np.float32)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        for rows in np.split(members, np.arange(batch, len(members), batch)):
            history = torch.from_numpy(histories(rows)).to(device)
            found[rows] = ranker.states(history).cpu().numpy()
    return found
