"""Caser (Tang and Wang, 2018): convolutions over the latest items, and a vector for each user."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.baselines.base import Baseline
from streamctl.baselines.objectives import catalogue_cross_entropy, sample_negatives, sampled_bce
from streamctl.config import BaselineConfig
from streamctl.data import Split
from streamctl.training.loop import Batch

WINDOW = 5  # L: latest items that the convolutions see
HORIZONTAL = 16  # filters of each height 1..L over items
VERTICAL = 4  # filters over each embedding dimension
NEGATIVES = 3  # of loss=bce, as published


class Caser(Baseline):
    """Union-level patterns by horizontal filters, point-level ones by vertical filters.

    A user that training has not seen has the zero vector.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "dim": 64, "dropout": 0.5, "repeat": False, "epochs": 30, "patience": 6,
        "batch": 512, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.05,
    }  # fmt: skip
    losses = ("ce", "bce")

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        dim = config.dim
        self.items = nn.Embedding(self.n_items + 1, dim)  # the last row stands before the first
        self.users = nn.Embedding(split.log.n_users, dim)
        self.horizontal = nn.ModuleList(
            nn.Conv2d(1, HORIZONTAL, (height, dim)) for height in range(1, WINDOW + 1)
        )
        self.vertical = nn.Conv2d(1, VERTICAL, (WINDOW, 1))
        self.mix = nn.Linear(HORIZONTAL * WINDOW + VERTICAL * dim, dim)
        self.out = nn.Embedding(self.n_items, 2 * dim)
        self.bias = nn.Parameter(torch.zeros(self.n_items))
        for table in (self.items, self.users, self.out):
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
        # Whoever is only validated or tested on has nothing that could move a random vector.
        never = split.valid_from - split.log.offsets[:-1] < 2
        with torch.no_grad():
            self.users.weight[torch.from_numpy(never)] = 0
        self.dropout = nn.Dropout(config.dropout)

    def states(self, history: torch.Tensor, users: torch.Tensor | None) -> torch.Tensor:
        """(B, 2d): convolutional features of the latest items beside the user's vector."""
        end = (history >= 0).sum(1, keepdim=True)
        places = end - WINDOW + torch.arange(WINDOW, device=history.device)  # (B, L)
        latest = history.gather(1, places.clamp(min=0))
        latest = latest.masked_fill(places < 0, self.n_items)
        x = self.items(latest)[:, None]  # (B, 1, L, d)
        rows = [F.relu(filters(x))[..., 0].amax(2) for filters in self.horizontal]
        columns = self.vertical(x).flatten(1)
        features = self.dropout(torch.cat([columns, *rows], dim=1))
        mixed = F.relu(self.mix(features))
        person = torch.zeros_like(mixed)
        if users is not None:
            there = len(self.users.weight)  # users who came later have no vector
            known = ((users >= 0) & (users < there))[:, None]
            person = torch.where(known, self.users(users.clamp(0, there - 1)), person)
        return torch.cat([mixed, person], dim=1)

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        states = self.states(batch.history, batch.user)
        if self.config.loss == "ce":
            marked = None if self.bonus is None else batch.history
            return catalogue_cross_entropy(
                states, self.out.weight, batch.target, self.bias, marked, self.bonus
            ), {}
        own = torch.cat([batch.history, batch.target[:, None]], dim=1)
        generator = batch.generator("negatives")
        negatives = sample_negatives(own, NEGATIVES, self.n_items, generator)
        return sampled_bce(states, self.out.weight, batch.target, negatives, self.bias), {}

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.states(history, users) @ self.out.weight.T + self.bias
