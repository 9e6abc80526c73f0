"""A query in the engine's terms, and what the model answers it with."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamctl.serving.explain import Explained

STRANGER = -1


@dataclass(frozen=True, eq=False)
class Job:
    """A query in the engine's terms.

    Attributes:
        history: int64 (H,) what the model reads, oldest first.
        exclude: int64, items that must not be recommended.
        allow: int64, the only items wanted; None for all.
        user: dense number of a user of the log, or STRANGER.
        beam: prefixes that the search keeps; it depends on the query alone.
    """

    engine: Any  # the one that prepared it
    history: np.ndarray
    exclude: np.ndarray
    allow: np.ndarray | None
    k: int
    think: int
    mode: str
    explain: bool
    beam: int
    user: int = STRANGER

    @property
    def group(self) -> Hashable:
        """Jobs that can share a batch: nothing in a batch may change another's answer."""
        return id(self.engine), *self.kind

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Jobs that take about equally long."""
        return self.think, self.mode, self.beam, self.explain

    @property
    def model(self) -> dict[str, Any]:
        """Which run and stage answers."""
        return self.engine.model


@dataclass(frozen=True)
class Reply:
    """One job's ranking, best first.

    Attributes:
        items: int64 (k,), -1 where there are fewer.
        scores: float32 (k,).
        explained: the thought, where the job wanted it.
    """

    items: np.ndarray
    scores: np.ndarray
    explained: Explained | None = None


def padded(histories: list[np.ndarray]) -> torch.Tensor:
    """Histories as (B, H) int64, -1 on the right."""
    width = max(len(history) for history in histories)
    rows = torch.full((len(histories), width), -1, dtype=torch.int64)
    for row, history in enumerate(histories):
        rows[row, : len(history)] = torch.from_numpy(history)
    return rows
