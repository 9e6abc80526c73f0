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

INITIAL_STD = 0.02  # of embeddings, as in BERT; a LayerNorm follows them


class Block(nn.Module):
    """Attention and a GELU network of four times the width, each normalised after its residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, *, visible: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        """x (B, S, d); `visible`, bool of (B, heads, S, S), is what each position may look at, and
        `causal` lets it look at itself and those before."""
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, dropout_p=rate
        )
        x = self.norm_attention(x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))


class SASRec(Baseline):
    """Scores are products of the last state with the item embeddings.

    Normalisation follows the embeddings and each residual, as in RecBole: the published
    placement, before attention on the query alone, learned several times slower on Beauty.
    """

    sequences = True

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        dim = config.dim
        self.items = nn.Embedding(self.n_items, dim)
        self.positions = nn.Embedding(split.history, dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=INITIAL_STD)
        self.dropout = nn.Dropout(config.dropout)
        blocks = (Block(dim, config.heads, config.dropout) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def states(self, history: torch.Tensor) -> torch.Tensor:
        """(B, H, d): what follows each position; -1 on the right does not reach the others."""
        places = self.positions.weight[: history.shape[1]]
        x = self.dropout(self.norm(self.items(history.clamp(min=0)) + places))
        for block in self.blocks:
            x = block(x, causal=True)
        return x

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        states = self.states(batch.history).flatten(0, 1)  # (B * H, d)
        targets = shifted_targets(batch.history, batch.target)
        if self.config.loss == "ce":
            marked = self.marked(batch.history)
            return catalogue_cross_entropy(
                states, self.items.weight, targets.flatten(), None, marked, self.bonus
            ), {}
        own = torch.cat([batch.history, batch.target[:, None]], dim=1)
        generator = batch.generator("negatives")
        negatives = sample_negatives(own, targets.shape[1], self.n_items, generator)
        weight = self.items.weight
        return sampled_bce(states, weight, targets.flatten(), negatives.reshape(-1, 1)), {}

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return last_states(self.states(history), history) @ self.items.weight.T


class SASRecCE(SASRec):
    """SASRec with the cross-entropy over the whole catalogue at every position."""

    # 40 epochs to the end: validation of Beauty and of scientific preferred them to 20.
    defaults: ClassVar[dict[str, Any]] = {
        "dim": 64, "layers": 2, "heads": 2, "dropout": 0.3, "repeat": False, "epochs": 40,
        "patience": 0, "batch": 128, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05,
    }  # fmt: skip


class SASRecBCE(SASRec):
    """SASRec as published: binary cross-entropy with one sampled negative a target.

    One negative teaches slowly: validation ndcg@10 on Beauty was 0.0261 with early stopping, and
    is 0.0298 at the end of this schedule.
    """

    losses = ("bce",)
    defaults: ClassVar[dict[str, Any]] = {
        "dim": 64, "layers": 2, "heads": 2, "dropout": 0.3, "epochs": 200, "patience": 0,
        "batch": 128, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05,
    }  # fmt: skip
