"""GRU4Rec (Hidasi et al., 2016): a recurrent network over the items of the history."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from streamctl.baselines.base import Baseline, last_states, shifted_targets
from streamctl.baselines.objectives import catalogue_cross_entropy
from streamctl.config import BaselineConfig
from streamctl.data import Split
from streamctl.training.loop import Batch


class GRU4Rec(Baseline):
    """Embedding, GRU of twice the width, projection; item embeddings are shared with the output."""

    defaults: ClassVar[dict[str, Any]] = {
        "dim": 128, "layers": 1, "dropout": 0.3, "repeat": False, "epochs": 40, "patience": 8,
        "batch": 256, "lr": 3e-3, "weight_decay": 0.0, "warmup": 0.05,
    }  # fmt: skip
    sequences = True

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        dim, hidden = config.dim, 2 * config.dim
        self.items = nn.Embedding(self.n_items, dim)
        nn.init.xavier_normal_(self.items.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(dim, hidden, config.layers, batch_first=True, bias=False)
        for name, weight in self.gru.named_parameters():
            initialise = nn.init.orthogonal_ if "hh" in name else nn.init.xavier_uniform_
            initialise(weight)
        self.out = nn.Linear(hidden, dim)

    def states(self, history: torch.Tensor) -> torch.Tensor:
        """(B, H, d): what follows each position."""
        x = self.dropout(self.items(history.clamp(min=0)))
        return self.out(self.gru(x)[0])

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        states = self.states(batch.history).flatten(0, 1)
        targets = shifted_targets(batch.history, batch.target).flatten()
        marked = self.marked(batch.history)
        weight = self.items.weight
        return catalogue_cross_entropy(states, weight, targets, None, marked, self.bonus), {}

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return last_states(self.states(history), history) @ self.items.weight.T
