"""Recommender: the interface of every method, for evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from streamctl.ranking.ranking import Ranking


class Recommender(Protocol):
    """A method, trained and ready to answer."""

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
        """The k best items of the whole catalogue for each history.

        Args:
            histories: int64 (B, H) item indexes, oldest first, -1 on the right.
            k: length of the ranking.
            users: int64 (B,) dense users of training, -1 for strangers; None: all are strangers.
                What training saw of a user never reaches that user's own answer as evidence.
            think: l, pieces of evidence to think with; None: the method's own default. Methods
                that do not think leave it aside.
            exclude: for each user int64 items that must not be recommended.
            allow: for each user the only int64 items wanted, or None for all.
        """
        ...
