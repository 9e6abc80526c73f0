"""Popularity: the same list for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from streamctl.baselines.base import Baseline
from streamctl.config import BaselineConfig
from streamctl.data import Split
from streamctl.ranking import Ranking


class Popularity(Baseline):
    """Items by how often they occur among the interactions that train.

    Equal counts keep the order of the item numbers, which is a random permutation.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    losses = ()

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__(config, split)
        counts = split.popularity()
        places = np.argsort(np.argsort(-counts, kind="stable"))
        # The count decides and the place, below 1, breaks ties; exact in float64.
        self.register_buffer("scores", torch.from_numpy(counts - places / len(counts)))
        self._since: dict[int, list[int]] = {}  # what users took since

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores.expand(len(history), -1)

    def recommend(self, *args: Any, **options: Any) -> Ranking:
        """The k items taken most often; their scores are counts, where events have weights the
        sums of these rounded up."""
        ranking = super().recommend(*args, **options)
        counts = self.scores.ceil().abs()[ranking.items].float()  # abs: -0 is 0
        return replace(ranking, scores=counts.where(ranking.items >= 0, ranking.scores))

    def add_items(self, vectors: np.ndarray) -> None:
        """New items (A, D) at the end of the catalogue: nobody took them yet."""
        self.n_items += len(vectors)
        last = -1 + 0.5 / self.n_items  # behind all others that nobody took
        self.scores = torch.cat([self.scores, self.scores.new_full((len(vectors),), last)])

    def append_all(self, taken: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Count what users took since: (user, items), as `Evidence` does."""
        for user, items in taken:
            self._since.setdefault(user, []).extend(items)
        self._count([item for _, items in taken for item in items], 1)

    def forget(self, user: int) -> None:
        """Count no longer what came of a user since."""
        self._count(self._since.pop(user, []), -1)

    def _count(self, items: Sequence[int], times: int) -> None:
        places = torch.tensor(items, dtype=torch.int64, device=self.scores.device)
        ones = torch.ones_like(places, dtype=self.scores.dtype)
        self.scores.index_add_(0, places, ones, alpha=times)
