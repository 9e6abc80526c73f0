"""Items with equal codes: moved to free codes, or told apart by one more digit."""

from __future__ import annotations

import numpy as np
import torch

ROWS = 16_384  # items whose distances to a level's codewords are computed at once
CHILDREN = 2**22  # prefixes whose free codes are counted at once


def reassign(codes: np.ndarray, latents: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    """Codes without collisions: who comes second moves to the nearest free code of the last level.

    Of the items with equal codes, the one that its codewords reconstruct best keeps them (the
    lowest index, if two do equally well). Where the codes below an item's first m - 1 cannot hold
    all that share these, those reconstructed worst choose another code one level up, below which
    there is room; if need be, a level higher still. Each takes the nearest code with room, in
    rounds: where more want one than it holds, the best reconstructed get it, and the others
    choose again.

    Args:
        codes: (N, m) int64. latents: (N, D) float32, what was quantized.
        codebooks: (m, K, D) float32; K ** m >= N and K ** m < 2 ** 62.

    Returns:
        (N, m) int64, each row once.
    """
    latents, codebooks = latents.cpu(), codebooks.cpu()
    levels, size, _ = codebooks.shape
    scale = size ** np.arange(levels - 1, -1, -1)  # of a code within the number of a full code
    number = codes @ scale
    second, taken = _split(number, _distance(codes, latents, codebooks))

    rest = second  # who has found no level yet, the best reconstructed first
    for kept in range(levels - 1, -1, -1):  # leading codes that stay
        if not len(rest):
            break
        below = size ** (levels - kept)
        prefix = number[rest] // below
        held = _count(taken, prefix, below)
        here = _place_among_equals(prefix) < below - held
        movers = rest[here]
        rest = rest[~here]
        # Who goes further up will be back nowhere below this prefix, so that its room is known.
        number[movers] = _descend(prefix[here], kept, latents[movers], codes[movers],
                                  codebooks, taken)  # fmt: skip
        taken = np.sort(np.concatenate([taken, number[movers]]))
    return number[:, None] // scale % size


def _split(number: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who must move, the best reconstructed first, and the numbers that are kept, ascending."""
    order = np.lexsort((distance, number))
    again = np.concatenate([[False], np.diff(number[order]) == 0])
    second = order[again]
    return second[np.lexsort((second, distance[second]))], number[order[~again]]


def _descend(
    prefix: np.ndarray,
    depth: int,
    latents: torch.Tensor,
    codes: np.ndarray,
    codebooks: torch.Tensor,
    taken: np.ndarray,
) -> np.ndarray:
    """Full code numbers (M,) for items that keep their first `depth` codes, no two the same.

    Args:
        prefix: (M,) int64, number of the codes that stay; below each there is room for its items.
        taken: numbers of full codes that others have, ascending.
    """
    levels, size, _ = codebooks.shape
    left = latents.clone()
    for level in range(depth):
        left -= codebooks[level][torch.from_numpy(codes[:, level])]
    for level in range(depth, levels):
        below = size ** (levels - 1 - level)
        parents, group = np.unique(prefix, return_inverse=True)
        group = group.reshape(-1)
        order = np.argsort(group, kind="stable")
        block = max(1, CHILDREN // size)  # parents looked at together
        ends = np.searchsorted(group[order], np.arange(block, len(parents), block))
        choice = np.empty(len(prefix), np.int64)
        for number, rows in enumerate(np.split(order, ends)):
            above = parents[number * block : (number + 1) * block]
            children = (above[:, None] * size + np.arange(size)).reshape(-1)
            room = below - _count(taken, children, below)
            wish = _preferences(left[rows], codebooks[level])
            choice[rows] = _choose(wish, group[rows] - number * block, room, size)
        prefix = prefix * size + choice
        left -= codebooks[level][torch.from_numpy(choice)]
    return prefix


def _choose(wish: np.ndarray, group: np.ndarray, room: np.ndarray, size: int) -> np.ndarray:
    """Each item's code (M,): the nearest one with room; earlier items go before later ones.

    Args:
        wish: (M, K) codes, nearest first. group: (M,) whose `room` (groups * K,) it may use.
    """
    choice = np.empty(len(wish), np.int64)
    turn = np.zeros(len(wish), np.int64)
    waiting = np.arange(len(wish))
    while len(waiting):
        wanted = wish[waiting, turn[waiting]].astype(np.int64)
        slot = group[waiting] * size + wanted
        served = _place_among_equals(slot) < room[slot]
        choice[waiting[served]] = wanted[served]
        np.subtract.at(room, slot[served], 1)
        waiting = waiting[~served]
        turn[waiting] += 1
    return choice


def _preferences(left: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
    """(M, K) uint16: the codes of a level by their distance from what is left, nearest first."""
    half = codebook.square().sum(1) / 2
    chunks = [
        torch.argsort(half - rows @ codebook.T, dim=1, stable=True).numpy().astype(np.uint16)
        for rows in left.split(ROWS)
    ]
    return np.concatenate(chunks)


def _count(taken: np.ndarray, prefix: np.ndarray, below: int) -> np.ndarray:
    """How many of `taken` (ascending full numbers) lie below each prefix of `below` codes."""
    low = np.searchsorted(taken, prefix * below)
    return np.searchsorted(taken, (prefix + 1) * below) - low


def _place_among_equals(values: np.ndarray) -> np.ndarray:
    """(n,): how many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return place


def _distance(codes: np.ndarray, latents: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    """(N,) squared distance of the latents from their codewords' sum."""
    return residuals_after(latents, codebooks, codes).square().sum(1).cpu().numpy()


def dedup_digit(codes: np.ndarray, latents: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    """One more digit (TIGER): 0, 1, ... within items of equal codes, the best reconstructed first.

    Args: as `reassign`.

    Returns:
        (N, m + 1) int64, each row once.
    """
    order = np.argsort(_distance(codes, latents, codebooks), kind="stable")
    _, group = np.unique(codes, axis=0, return_inverse=True)
    digit = np.empty(len(codes), np.int64)
    digit[order] = _place_among_equals(group.reshape(-1)[order])
    return np.concatenate([codes, digit[:, None]], 1)


def residuals_after(
    latents: torch.Tensor, codebooks: torch.Tensor, codes: np.ndarray
) -> torch.Tensor:
    """What the codewords leave of the latent vectors: (N, D) float32."""
    left = latents.clone()
    for level, codebook in enumerate(codebooks):
        left -= codebook[torch.from_numpy(codes[:, level].copy()).to(left.device)]
    return left
