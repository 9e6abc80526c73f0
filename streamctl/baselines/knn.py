"""Session-kNN (Jannach and Ludewig, 2017): the next items of the most similar histories."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from streamctl.baselines.hops import MOST, HopBaseline
from streamctl.retrieval.evidence import HOPS, Pieces


class KNN(HopBaseline):
    """The votes of other users' nearest training prefixes alone. Trains nothing."""

    sizes: ClassVar[dict[str, int] | None] = {"others": MOST}

    def values(self, pieces: Pieces) -> np.ndarray:
        return pieces.strengths[..., HOPS.index("others")]
