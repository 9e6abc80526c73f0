"""Is the difference real? A paired bootstrap over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamctl.device import derive_seed
from streamctl.ranking.metrics import gains

_CHUNK = 1 << 24  # resampled values held at a time


@dataclass(frozen=True)
class Interval:
    """A mean with the percentile bounds of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"difference": self.mean, "low": self.low, "high": self.high}


def bootstrap_mean(
    values: np.ndarray, *, users: np.ndarray | None = None, resamples: int = 2000, seed: int = 0
) -> Interval:
    """95% percentile interval of the mean of `values` (float64 (E,)) over users drawn with return.

    The same seed and number of users draw the same users, so that intervals of several methods
    over the same users are paired too.

    Args:
        users: int (E,), whose values they are; a user comes with all of theirs, which are not
            independent. By default each is another user's.
    """
    who = np.arange(len(values)) if users is None else np.unique(users, return_inverse=True)[1]
    sums, counts = np.bincount(who, values), np.bincount(who)
    n = len(sums)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", n))
    means = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        draws = rng.integers(0, n, size=(size, n), dtype=np.int32)
        taken = n if n == len(values) else counts[draws].sum(axis=1)
        means[begin : begin + size] = sums[draws].sum(axis=1) / taken
    tail = (1 - 0.95) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_seeds(
    values: np.ndarray,
    *,
    users: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """95% percentile intervals of means over users and seeds, both drawn with return.

    Args:
        values: float64 (P, S, E): of each pair of methods, seed and target; all pairs see the same
            draws.
        users: (E,) whose target each is, all drawn together; by default one user a target.
    """
    pairs, seeds, targets = values.shape
    flat = np.ascontiguousarray(values.reshape(pairs * seeds, targets).T)
    sizes = np.ones(targets)
    if users is not None:
        _, who, sizes = np.unique(users, return_inverse=True, return_counts=True)
        sums = np.zeros((len(sizes), pairs * seeds))
        np.add.at(sums, who, flat)
        flat, sizes = sums, sizes.astype(np.float64)
    people = len(sizes)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", seeds, people))
    means = np.empty((resamples, pairs))
    step = max(1, _CHUNK // people)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        draws = rng.integers(0, people, size=(size, people))
        draws += np.arange(size)[:, None] * people
        # How often each user was drawn: one matrix product then serves every pair.
        counts = np.bincount(draws.ravel(), minlength=size * people).reshape(size, people)
        counts = counts.astype(np.float64)
        of_seeds = (counts @ flat / (counts @ sizes)[:, None]).reshape(size, pairs, seeds)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        means[begin : begin + size] = np.einsum("rps,rs->rp", of_seeds, weights)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return [
        Interval(float(mean), float(under), float(above))
        for mean, under, above in zip(values.mean(axis=(1, 2)), low, high, strict=True)
    ]


def paired_difference(
    ranks: np.ndarray,
    others: np.ndarray,
    *,
    users: np.ndarray | None = None,
    k: int = 10,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """ndcg@k of one method less that of another, with its 95% interval.

    Args:
        ranks, others: int32 (E,) zero-based ranks of the same targets, in the same order.
        users: int (E,), whose targets they are; by default each is another user's.

    Raises:
        ValueError: they are not of the same users.
    """
    if ranks.shape != others.shape:
        raise ValueError(f"ranks of {ranks.shape} and {others.shape} users cannot be paired")
    difference = gains(ranks, k) - gains(others, k)
    return bootstrap_mean(difference, users=users, resamples=resamples, seed=seed)
