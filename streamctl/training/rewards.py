"""Rewards of the RL stage (Eqs. 21-27) as functions of tensors; none carries a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TERMS = ("format", "exact", "similarity", "likelihood", "ranking")


class ItemParser:
    """Finds the item that a row of code tokens spells.

    Args:
        item_tokens: (N, m) int64, each item's code tokens; rows may repeat.
        vocabulary: number of tokens.
    """

    def __init__(self, item_tokens: torch.Tensor, vocabulary: int):
        levels = item_tokens.shape[1]
        self._scale = vocabulary ** torch.arange(levels - 1, -1, -1, device=item_tokens.device)
        self._keys, self._item = torch.sort((item_tokens * self._scale).sum(1), stable=True)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., m) int64 tokens -> (...) int64 items, -1 where they spell none."""
        keys = (tokens * self._scale).sum(-1)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == keys, self._item[place], -1)


def format_reward(items: torch.Tensor) -> torch.Tensor:
    """0 where the codes spell an item of the catalogue, -1 where `ItemParser` gave -1 (Eq. 21)."""
    return -(items < 0).float()


def exact_match_reward(codes: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many codes (B, G, m) match the target's (B, m) up to the first that differs (Eqs. 22-23):
    (B, G) float32 in 0..m."""
    return (codes == target[:, None]).long().cumprod(-1).sum(-1).float()


def win_share(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor,
    pool: torch.Tensor,
    pool_items: torch.Tensor,
) -> torch.Tensor:
    """g of Eq. 25: the share of the pool that is no more similar to a rollout than its target.

    The target itself is one of the pool, as S_ii is in the paper; copies of its item count as it.

    Args:
        hidden: (B, G, d) mean-pooled decoder states of the rollouts.
        targets: (B, d) target representations.
        items: (B,) int64 target items.
        pool: (M, d) representations to compare with: the batch's users' targets.
        pool_items: (M,) int64.

    Returns:
        (B, G) float32 in 0..1; cosine similarity.
    """
    hidden = F.normalize(hidden.float(), dim=-1)
    own = (hidden * F.normalize(targets.float(), dim=-1)[:, None]).sum(-1, keepdim=True)
    others = hidden @ F.normalize(pool.float(), dim=-1).T  # (B, G, M)
    same = (items[:, None] == pool_items[None, :])[:, None]
    wins = ((others <= own) | same).float().sum(-1)
    absent = (~same.any(-1)).float()  # a pool of other items: the target is added
    return (wins + absent) / (pool.shape[0] + absent)


def similarity_reward(share: torch.Tensor) -> torch.Tensor:
    """0.5, 0.1, 0.05 or -0.1 by the share of Eq. 25 (Eq. 24). Same shape as `share`."""
    reward = torch.full_like(share, -0.1)
    for bound, value in ((0.50, 0.05), (0.95, 0.1), (0.99, 0.5)):
        reward[share >= bound] = value
    return reward


def likelihood_reward(thought: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """How much the thought raises the target's log-probability, clipped to +-1 (Eq. 26): with it
    (B, G), and by the direct decoder without (B,)."""
    return (thought - direct[:, None]).clamp(-1.0, 1.0)


def target_rank(target: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """1 + the number of negatives (..., K) that are at least as likely as the target (...)."""
    return 1 + (negatives >= target[..., None]).sum(-1)


def ranking_reward(rank: torch.Tensor, negatives: int) -> torch.Tensor:
    """The reward of the target's rank among K hard negatives (Eq. 27).

    The paper starts ranks at 0 and rewards rank 1 most; here the best rank is 1. Between 0.2 K
    and 0.5 K the reward is 0.

    Args:
        rank: (...) int64, 1 is the best.
        negatives: K.
    """
    reward = torch.zeros(rank.shape, device=rank.device)
    reward[rank >= 0.5 * negatives] = -0.1
    reward[rank < 0.2 * negatives] = 0.05
    reward[rank < 0.1 * negatives] = 0.1
    reward[rank == 1] = 0.2
    return reward
