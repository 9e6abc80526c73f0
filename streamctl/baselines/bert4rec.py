"""BERT4Rec (Sun et al., 2019): a bidirectional transformer that fills in hidden items."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.baselines.base import Baseline
from streamctl.baselines.objectives import catalogue_cross_entropy
from streamctl.baselines.sasrec import INITIAL_STD, Block
from streamctl.config import BaselineConfig
from streamctl.data import Split
from streamctl.training.loop import Batch

LAST_ONLY = 0.25  # share of training sequences in which the last item alone is hidden


class BERT4Rec(Baseline):
    """Trained to fill hidden positions; recommends what it would fill in after the history."""

    defaults: ClassVar[dict[str, Any]] = {
        "dim": 64, "layers": 2, "heads": 2, "mask": 0.4, "dropout": 0.2, "repeat": False,
        "epochs": 100, "patience": 15, "batch": 256, "lr": 1e-3, "weight_decay": 0.01,
        "warmup": 0.05,
    }  # fmt: skip
    sequences = True

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        dim = config.dim
        self.items = nn.Embedding(self.n_items + 1, dim)  # the last row is the mask
        self.positions = nn.Embedding(split.history + 1, dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=INITIAL_STD)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(config.dropout)
        blocks = (Block(dim, config.heads, config.dropout) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias = nn.Parameter(torch.zeros(self.n_items))

    def states(self, items: torch.Tensor) -> torch.Tensor:
        """(B, S, d) of items (B, S) int64 in which n_items is the mask and -1 is padding."""
        padded = items < 0
        visible = None if not padded.any() else ~padded[:, None, None, :]  # (B, 1, 1, S)
        # Places count from the end, so that what is asked for at the end is always at place 0.
        end = (~padded).sum(1, keepdim=True) - 1
        places = (end - torch.arange(items.shape[1], device=items.device)).clamp(min=0)
        x = self.items(items.clamp(min=0)) + self.positions(places)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, visible=visible)
        return self.head(x)

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        items = torch.cat([batch.history, batch.target[:, None]], dim=1)  # (B, H + 1)
        hidden = torch.rand(items.shape, device=items.device) < self.config.mask
        last_only = torch.rand(len(items), 1, device=items.device) < LAST_ONLY
        hidden &= ~last_only
        hidden[:, -1] |= ~hidden.any(1)  # every sequence hides something
        states = self.states(items.masked_fill(hidden, self.n_items))[hidden]
        weight = self.items.weight[: self.n_items]
        marked = None
        if self.bonus is not None:  # the items in sight, once for each that is hidden
            rows = hidden.nonzero()[:, 0]
            marked = items.masked_fill(hidden, -1)[rows]
        loss = catalogue_cross_entropy(states, weight, items[hidden], self.bias, marked, self.bonus)
        return loss, {}

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        items = F.pad(history, (0, 1), value=-1)
        rows = torch.arange(len(items), device=items.device)
        end = (history >= 0).sum(1)
        items[rows, end] = self.n_items
        state = self.states(items)[rows, end]
        return state @ self.items.weight[: self.n_items].T + self.bias
