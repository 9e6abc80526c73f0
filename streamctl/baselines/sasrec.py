"""SASRec (Kang and McAuley, 2018): a causal transformer over the items of the history."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.baselines.base import Baseline, last_states, shifted_targets
from streamctl.baselines.objectives import catalogue_cross_entropy, sample_negatives, sampled_bce
from streamctl.config import BaselineConfig
from streamctl.data import Split
from streamctl.training.loop import Batch


class _Block(nn.Module):
    """Self-attention with a normalised query, then a point-wise network, as published."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_query, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, d)
        query = self.norm_query(x)
        parts = (self.query(query), *self.key_value(x).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = query + self.out(mixed.transpose(1, 2).flatten(2))
        x = self.norm_ffn(x)
        return x + self.dropout(self.ffn(x))


class SASRec(Baseline):
    """Scores are products of the last state with the item embeddings.

    `loss=ce` is the cross-entropy over the whole catalogue at every position; `loss=bce` is the
    published binary cross-entropy with one sampled negative.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "dim": 64, "layers": 2, "heads": 2, "dropout": 0.5, "epochs": 40, "patience": 8,
        "batch": 256, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05,
    }  # fmt: skip
    losses = ("ce", "bce")
    sequences = True

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        dim = config.dim
        self.items = nn.Embedding(self.n_items, dim)
        self.positions = nn.Embedding(split.history, dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        blocks = (_Block(dim, config.heads, config.dropout) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def states(self, history: torch.Tensor) -> torch.Tensor:
        """(B, H, d): what follows each position; -1 on the right does not reach the others."""
        places = self.positions.weight[: history.shape[1]]
        x = self.items(history.clamp(min=0)) * self.config.dim**0.5 + places
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        states = self.states(batch.history).flatten(0, 1)  # (B * H, d)
        targets = shifted_targets(batch.history, batch.target)
        if self.config.loss == "ce":
            return catalogue_cross_entropy(states, self.items.weight, targets.flatten()), {}
        own = torch.cat([batch.history, batch.target[:, None]], dim=1)
        generator = batch.generator("negatives")
        negatives = sample_negatives(own, targets.shape[1], self.n_items, generator)
        weight = self.items.weight
        return sampled_bce(states, weight, targets.flatten(), negatives.reshape(-1, 1)), {}

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return last_states(self.states(history), history) @ self.items.weight.T
