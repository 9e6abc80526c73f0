"""Transitions: what other users took next, counted (sequential rules, Ludewig and Jannach 2018)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from streamctl.baselines.hops import MOST, HopBaseline
from streamctl.retrieval.evidence import HOPS, Pieces


class Transitions(HopBaseline):
    """The first hop alone: counts of what followed each item of the history. Trains nothing."""

    sizes: ClassVar[dict[str, int] | None] = {"next": MOST}

    def values(self, pieces: Pieces) -> np.ndarray:
        return pieces.strengths[..., HOPS.index("next")]
