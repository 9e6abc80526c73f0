"""Semantic IDs: the codes of every item, and how well they tell items apart."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamctl.runs import Stage
from streamctl.tokenizer.tokens import Tokens


def group_rows(codes: np.ndarray, sizes: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows with the same first 1, 2, ..., m codes, grouped: one pass of sorting a level.

    Args:
        codes: (N, m) int64, level d's in 0..sizes[d]-1.
        sizes: codes of each level.

    Returns:
        for each level, (keys, group): the level's distinct prefixes in lexical order, each as
        `number of its own prefix * size + code` (int64), and each row's place in them (N,) int64.
    """
    groups = []
    group = np.zeros(len(codes), np.int64)
    for level, size in enumerate(sizes):
        keys, group = np.unique(group * size + codes[:, level], return_inverse=True)
        group = group.astype(np.int64, copy=False)
        groups.append((keys, group))
    return groups


@dataclass(frozen=True)
class SemanticIds:
    """The codes of all items.

    Attributes:
        codes: (N, m) int64; level d's lie in 0..sizes[d]-1.
        sizes: codes of each level.
        dedup: whether the last level is a de-duplication digit (TIGER's way) and no codebook's.
        details: what the quantizer reported beside the codes (see `report`).
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    dedup: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def levels(self) -> int:
        """m: codes of an item."""
        return len(self.sizes)

    def tokens(self, think_codebook: int = 0) -> Tokens:
        """The vocabulary of a model that reads and writes these codes."""
        return Tokens(self.sizes, think_codebook, self.dedup)

    def nearest_free(
        self, learned: list[int], codebook: np.ndarray, taken: Container[int]
    ) -> list[int]:
        """The codes of a new item: the learned ones, the last moved to the nearest that is free.

        Where none is free under their prefix the item shares the learned codes.

        Args:
            learned: what the quantizer makes of the item. codebook: the last level's, (K, d).
            taken: last codes of the items with the same prefix.
        """
        order = np.arange(self.sizes[-1])
        if not self.dedup:
            distances = ((codebook - codebook[learned[-1]]) ** 2).sum(axis=1)
            order = np.argsort(distances, kind="stable")
        last = next((code for code in order.tolist() if code not in taken), int(order[0]))
        return [*learned[: self.levels - 1], last]

    def report(self) -> dict[str, Any]:
        """Usage, entropy and perplexity of each level, collisions, and the quantizer's figures."""
        return {**describe(self.codes, self.sizes), **self.details}

    @classmethod
    def load(cls, stage: Stage) -> SemanticIds:
        """The Semantic IDs of a complete tokenizer stage."""
        report = stage.json("report.json")
        sizes = tuple(level["codes"] for level in report["levels"])
        own = {"items", "levels", "collision_rate", "distinct"}
        details = {key: value for key, value in report.items() if key not in own}
        return cls(stage.array("codes.npy"), sizes, report["dedup"], details)


def collision_rate(codes: np.ndarray) -> float:
    """Share of items that have the same codes as another item."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return float((counts[inverse.reshape(-1)] > 1).mean())


def describe(codes: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Per-level usage, entropy (bits) and perplexity, distinct codes, and the collision rate."""
    levels = []
    for level, size in enumerate(sizes):
        share = np.bincount(codes[:, level], minlength=size) / len(codes)
        used = share[share > 0]
        entropy = float(-(used * np.log2(used)).sum())
        levels.append(
            {
                "codes": size,
                "used": len(used),
                "usage": len(used) / size,
                "entropy": entropy,
                "perplexity": 2**entropy,
            }
        )
    distinct = len(np.unique(codes, axis=0))
    return {
        "items": len(codes),
        "levels": levels,
        "distinct": distinct,
        "collision_rate": collision_rate(codes),
    }
