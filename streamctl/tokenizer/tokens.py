"""The vocabulary of a model: padding, begin, think, then one token for each (level, code)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Token ids of Semantic IDs.

    Attributes:
        sizes: codes of each level of an item, a de-duplication digit included.
        think_codebook: tokens that only thoughts use; 0 lets thoughts use the item codes' tokens.
        dedup: whether the last level is a de-duplication digit, which is nobody's thought.
    """

    sizes: tuple[int, ...]
    think_codebook: int = 0
    dedup: bool = False

    PAD: ClassVar[int] = 0
    BOS: ClassVar[int] = 1
    THINK: ClassVar[int] = 2
    FIRST: ClassVar[int] = 3  # token of code 0 of level 0

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First token of each level, and one past the last level's."""
        return tuple(itertools.accumulate(self.sizes, initial=self.FIRST))

    @property
    def size(self) -> int:
        """Tokens in all: the width of the embedding table and of the logits."""
        return self._starts[-1] + self.think_codebook

    @property
    def levels(self) -> int:
        """m: tokens of an item."""
        return len(self.sizes)

    def item_tokens(self, codes: np.ndarray) -> np.ndarray:
        """Codes (..., m) -> tokens (..., m) int64."""
        return np.asarray(codes, np.int64) + np.array(self._starts[:-1], np.int64)

    def level_range(self, level: int) -> tuple[int, int]:
        """First token of a level and one past its last."""
        return self._starts[level], self._starts[level + 1]

    @property
    def think_range(self) -> tuple[int, int]:
        """First token that a thought may be, and one past the last."""
        if self.think_codebook:
            return self._starts[-1], self.size
        return self.FIRST, self._starts[self.levels - self.dedup]
