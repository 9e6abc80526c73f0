"""Exclude and allow lists as masks of the trie, and the leaves found as ranked items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from streamctl.device import derive_seed
from streamctl.tokenizer.trie import PrefixTrie

CHUNK = 256  # users searched together
MASKS = 1 << 27  # bytes of masks held at once: fewer users together over a large catalogue


def together(
    trie: PrefixTrie,
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray | None] | None,
) -> int:
    """How many users are searched together, so that their masks stay within `MASKS`."""
    if exclude is None and allow is None:
        return CHUNK
    return min(CHUNK, max(1, MASKS // trie.n_nodes))


def of_rows(rows: torch.Tensor, lists: Sequence[Any] | None) -> list[Any] | None:
    """What some users wish; None where nobody has said anything."""
    return None if lists is None else [lists[row] for row in rows.tolist()]


def legal_nodes(
    trie: PrefixTrie,
    rows: torch.Tensor,
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray | None] | None,
) -> torch.Tensor | None:
    """(B, n_nodes) bool: nodes that lead to an item the user may be shown; None for all."""
    masks = []
    for row in rows.tolist():
        denied = None if exclude is None or not len(exclude[row]) else exclude[row]
        wanted = None if allow is None else allow[row]
        masks.append(None if denied is None and wanted is None else (wanted, denied))
    if not any(masks):
        return None
    every = torch.ones(trie.n_nodes, dtype=torch.bool)
    stacked = torch.stack([every if mask is None else trie.mask(*mask) for mask in masks])
    return stacked.to(rows.device)


def denied(
    items: np.ndarray,
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray | None] | None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """bool: which of the items, int64, must not be shown to the users of these rows.

    Args:
        rows: int64 of the shape of the items; by default these are (B, n), a row a user.
    """
    if rows is None:
        rows = np.broadcast_to(np.arange(len(items))[:, None], items.shape)
    pairs, out = _pairs(rows, items), np.zeros(items.shape, bool)
    if exclude is not None:
        out |= np.isin(pairs, _each(exclude))
    if allow is not None:
        limited = np.array([wanted is not None for wanted in allow], bool)
        wanted = _each([() if wanted is None else wanted for wanted in allow])
        out |= limited[rows] & ~np.isin(pairs, wanted)
    return out


def _each(lists: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """The pairs of each row with the items of its list."""
    rows = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
    items = [np.asarray(one, np.int64) for one in lists]
    return _pairs(rows, np.concatenate(items) if items else np.empty(0, np.int64))


def _pairs(rows: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Pairs as single numbers; -1 stands for no item."""
    return (np.asarray(rows, np.int64) << 32) + items


def best_items(
    trie: PrefixTrie,
    leaves: torch.Tensor,
    scores: torch.Tensor,
    k: int,
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray | None] | None,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves with scores -> the k best items of each row.

    Leaves of a row are distinct; -1 is none. Items at one leaf are put in a random order fixed by
    the seed.
    """
    leaf, value = leaves.cpu().numpy(), scores.cpu().numpy()
    row, column = np.nonzero(leaf >= 0)
    leaf, value = leaf[row, column], value[row, column].astype(np.float64)
    first, count = trie.item_start[leaf], np.diff(trie.item_start)[leaf]
    place = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    item = trie.items[np.repeat(first, count) + place]
    row, value = np.repeat(row, count), np.repeat(value, count)
    keep = ~denied(item, exclude, allow, row)
    row, value, item = row[keep], value[keep], item[keep]
    order = np.lexsort((_shuffled(seed, len(trie.leaf))[item], -value, row))
    row, value, item = row[order], value[order], item[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    items = torch.full((len(leaves), k), -1, dtype=torch.int64)
    ranked = torch.full((len(leaves), k), -torch.inf)
    where = torch.from_numpy(row[kept]), torch.from_numpy(rank[kept])
    items[where] = torch.from_numpy(item[kept].astype(np.int64))
    ranked[where] = torch.from_numpy(value[kept]).float()
    return items.to(leaves.device), ranked.to(leaves.device)


@lru_cache(maxsize=4)
def _shuffled(seed: int, count: int) -> np.ndarray:
    """(count,) int64: the order in which the seed puts items that share a leaf."""
    return np.random.default_rng(derive_seed(seed, "ties")).permutation(count)
