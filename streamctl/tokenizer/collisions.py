"""Items with equal codes: moved to free codes, or told apart by one more digit."""

from __future__ import annotations

import numpy as np
import torch

from streamctl.kernels import nearest_codeword


def reassign(codes: np.ndarray, latents: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    """Codes without collisions: who comes second moves to the nearest free code of the last level.

    Of the items with equal codes, the one that its codewords reconstruct best keeps them (the
    lowest index, if two do equally well); the others follow, best first. When all the last
    level's codes below an item's first m - 1 are taken, it takes the nearest code one level up
    below which one is free, and the nearest free one there; if need be, a level higher still.

    Args:
        codes: (N, m) int64. latents: (N, D) float32, what was quantized.
        codebooks: (m, K, D) float32; K ** m >= N and K ** m < 2 ** 62.

    Returns:
        (N, m) int64, each row once.
    """
    levels, size, _ = codebooks.shape
    codes = codes.copy()
    scale = size ** np.arange(levels - 1, -1, -1)  # of a code within the number of a full code
    number = codes @ scale
    distance = residuals_after(latents, codebooks, codes).square().sum(1).cpu().numpy()
    order = np.lexsort((np.arange(len(codes)), distance, number))
    second = order[1:][number[order[1:]] == number[order[:-1]]]
    second = second[np.lexsort((second, distance[second]))]
    if not len(second):
        return codes
    kept = np.delete(number, second)
    # Items below each prefix, by its length and its number.
    below = [{0: len(kept)}]
    for step in scale:
        prefixes, counts = np.unique(kept // step, return_counts=True)
        below.append(dict(zip(prefixes.tolist(), counts.tolist(), strict=True)))
    room = size ** np.arange(levels, -1, -1)  # codes below a prefix of each length

    for item in second.tolist():
        path = codes[item].tolist()
        numbers = [0, *(number[item] // scale).tolist()]
        depth = levels - 1
        while below[depth].get(numbers[depth], 0) >= room[depth]:
            depth -= 1
        left = latents[item].clone()
        for level in range(levels):
            if level >= depth:
                taken = below[level + 1]
                base = numbers[level] * size
                free = [k for k in range(size) if taken.get(base + k, 0) < room[level + 1]]
                choice, _ = nearest_codeword(left[None], codebooks[level][free])
                path[level] = free[int(choice)]
                numbers[level + 1] = base + path[level]
            left = left - codebooks[level, path[level]]
        codes[item] = path
        for length, prefix in enumerate(numbers):
            below[length][prefix] = below[length].get(prefix, 0) + 1
    return codes


def dedup_digit(codes: np.ndarray, latents: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    """One more digit (TIGER): 0, 1, ... within items of equal codes, the best reconstructed first.

    Args: as `reassign`.

    Returns:
        (N, m + 1) int64, each row once.
    """
    distance = residuals_after(latents, codebooks, codes).square().sum(1).cpu().numpy()
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.lexsort((np.arange(len(codes)), distance, group))
    sorted_group = group[order]
    first = np.searchsorted(sorted_group, sorted_group)
    digit = np.empty(len(codes), np.int64)
    digit[order] = np.arange(len(codes)) - first
    return np.concatenate([codes, digit[:, None]], 1)


def residuals_after(
    latents: torch.Tensor, codebooks: torch.Tensor, codes: np.ndarray
) -> torch.Tensor:
    """What the codewords leave of the latent vectors: (N, D) float32."""
    left = latents.clone()
    for level, codebook in enumerate(codebooks):
        left -= codebook[torch.from_numpy(codes[:, level].copy()).to(left.device)]
    return left
