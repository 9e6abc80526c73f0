"""A state that ranks the whole catalogue: Eq. 14 with every item as a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from streamctl.model import fused
from streamctl.model.backbone import in_stream

INITIAL_STD = 0.02  # of the item and code vectors; a norm follows them where they are read
_EPS = 1e-6
_FURTHEST = 32  # distances between two items that attention tells apart
_REPEAT_START = -1.0
_REPEAT_SCALE = 20.0  # how much faster than a weight the repeat term learns


@dataclass(frozen=True)
class RankerShape:
    """Sizes of a ranker; `vocabulary` counts the code tokens."""

    vocabulary: int
    width: int
    heads: int
    layers: int
    dropout: float
    input_dropout: float


class Block(nn.Module):
    """Causal attention and a GELU network of four times the width, each after a norm."""

    def __init__(self, shape: RankerShape):
        super().__init__()
        width = shape.width
        self.heads, self.p = shape.heads, shape.dropout
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(width))
        self.wi = nn.Linear(width, 4 * width, bias=False)
        self.wo = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer.

        Args:
            x: (B, H, d), the residual stream.
            delta: (B, H, d), what the layer before adds to it; None before the first.
            bias: (heads, H, H) added to the attention scores, -inf where a key is later.

        Returns:
            the stream, and what this layer adds to it.
        """
        p = self.p * self.training
        x, normed = fused.residual_norm(x, delta, self.attention_norm, _EPS, p)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(normed).chunk(3, -1)
        )
        weights = fused.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, bias)
        mixed = self.out((weights @ v).transpose(1, 2).flatten(2))
        x, normed = fused.residual_norm(x, mixed, self.ffn_norm, _EPS, p)
        return x, self.wo(F.gelu(self.wi(normed)))


class StateRanker(nn.Module):
    """History -> state s_0, whose products with the item vectors rank the catalogue.

    An item's vector is the sum of its code embeddings and of one of its own: codes share what
    items have in common, the own vector keeps what sets them apart. The same vectors are read
    by the encoder and ranked by the state. Attention is causal, so that one pass over a sequence
    gives the state after each of its items. The logit of an item of the history carries a learned
    term: whether people take things twice is the shop's habit, and no state should spend itself on
    it.

    Attributes:
        item_tokens: (N, m) int64 buffer, the tokens of every item.
    """

    item_tokens: torch.Tensor

    def __init__(self, shape: RankerShape, item_tokens: torch.Tensor):
        """An untrained ranker, its weights drawn from torch's global generator.

        Args:
            item_tokens: (N, m) int64, below shape.vocabulary.
        """
        super().__init__()
        self.shape = shape
        self.items = nn.Embedding(len(item_tokens), shape.width)
        self.codes = nn.Embedding(shape.vocabulary, shape.width)
        for table in (self.items, self.codes):
            nn.init.normal_(table.weight, std=INITIAL_STD)
        self.distances = nn.Parameter(torch.zeros(_FURTHEST, shape.heads))
        self.item_norm = nn.Parameter(torch.ones(shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.raw_repeat = nn.Parameter(torch.tensor(_REPEAT_START / _REPEAT_SCALE))
        self.register_buffer("item_tokens", item_tokens, persistent=False)

    @classmethod
    def build(cls, shape: RankerShape, item_tokens: torch.Tensor, seed: int) -> StateRanker:
        """A ranker with its initial weights, which depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(shape, item_tokens)

    @property
    def repeat(self) -> torch.Tensor:
        """Scalar float32: added to the logit of an item that the history has."""
        return self.raw_repeat * _REPEAT_SCALE

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
        length = history.shape[1]
        x = in_stream(vectors[history.clamp(min=0)])
        x = fused.residual_norm(x, None, self.item_norm, _EPS, 0.0)[1]
        x = fused.dropout(x, self.shape.input_dropout * self.training)
        steps = torch.arange(length, device=history.device)
        back = steps[:, None] - steps  # (H, H): how far a key lies behind its query
        bias = self.distances[back.clamp(0, _FURTHEST - 1)].permute(2, 0, 1)
        bias = bias.masked_fill(back < 0, -torch.inf)
        delta = None
        for block in self.blocks:
            x, delta = block(x, delta, bias)
        p = self.shape.dropout * self.training
        return fused.residual_norm(x, delta, self.norm, _EPS, p)[1]

    @staticmethod
    def opinion(state: torch.Tensor, vectors: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, N) float32 of every item before any look-up.

        Args:
            state: (B, d). vectors: (N, d) of `item_vectors`.
            history: (B, H), of which this ranker knows all it needs from the state.
        """
        return torch.log_softmax(state @ vectors.T, 1)

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
    found = np.empty((len(lengths), ranker.shape.width), np.float32)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        for rows in np.split(members, np.arange(batch, len(members), batch)):
            history = torch.from_numpy(histories(rows)).to(device)
            found[rows] = ranker.states(history).cpu().numpy()
    return found
