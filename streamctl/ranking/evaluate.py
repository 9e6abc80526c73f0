"""Full-catalogue evaluation of anything that can rank items."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from streamctl.data import Examples
from streamctl.device import derive_seed
from streamctl.distributed import ranks
from streamctl.progress import progress_bar
from streamctl.ranking.metrics import (
    DEPTH,
    ItemFacts,
    beyond_accuracy,
    coverage,
    ranking_metrics,
    target_ranks,
)
from streamctl.ranking.recommender import Recommender

_WARM_UP = 8  # users ranked before the clock starts: compilation and first allocations


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the users gives.

    Attributes:
        ranks: int32 (E,) zero-based rank of the target, in the examples' order.
        metrics: recall@k, ndcg@k, mrr@10 and coverage@10; with facts of the items novelty@10,
            diversity@10 and popularity_bias@10, too.
        ms_per_user: wall time of ranking, in batches, after a warm-up.
    """

    ranks: np.ndarray
    metrics: dict[str, float]
    ms_per_user: float


def evaluate(
    recommender: Recommender,
    examples: Examples,
    *,
    n_items: int,
    masked: bool,
    batch: int = 256,
    title: str | None = None,
    facts: ItemFacts | None = None,
) -> Evaluation:
    """Rank the catalogue for every example and look where the target is.

    Histories of one length are ranked together, so nothing is padded.

    Args:
        recommender: the method.
        examples: one row a user; E of them.
        n_items: size of the catalogue, for coverage.
        masked: leave out what the user has taken before; otherwise repeats compete too.
        batch: users ranked at a time.
        title: show progress under this name.
        facts: popularity and vectors of the items, for metrics beyond accuracy.

    Raises:
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("evaluation over no users")
    found = np.zeros(len(examples), dtype=np.int32)
    top = np.zeros((len(examples), 10), dtype=np.int64)
    _rank(recommender, examples, np.arange(min(_WARM_UP, len(examples))), masked)
    spent = 0.0
    with progress_bar(title or "evaluate", len(examples), "users") as bar:
        for index in ranks().mine(list(batches_by_length(examples.lengths, batch))):
            began = time.perf_counter()
            items = _rank(recommender, examples, index, masked)
            spent += time.perf_counter() - began
            found[index] = target_ranks(items, examples.targets[index])
            top[index] = -1
            top[index, : items.shape[1]] = items[:, :10]
            bar.advance(len(index) * ranks().count)
    found, top = ranks().sum(found), ranks().sum(top)
    spent = float(ranks().sum(np.array([spent]))[0])
    metrics = ranking_metrics(found) | {"coverage@10": coverage(top, n_items)}
    if facts is not None:
        metrics |= beyond_accuracy(top, facts)
    return Evaluation(found, metrics, 1000 * spent / len(examples))


def _rank(
    recommender: Recommender, examples: Examples, index: np.ndarray, masked: bool
) -> np.ndarray:
    history = torch.from_numpy(examples.histories(index))
    exclude = examples.seen(index) if masked else None
    ranking = recommender.recommend(history, DEPTH, users=examples.users[index], exclude=exclude)
    return ranking.items.cpu().numpy()


def batches_by_length(lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Indexes of at most `batch` examples of one length at a time, longest first."""
    for length in np.unique(lengths)[::-1]:
        members = np.flatnonzero(lengths == length)
        yield from np.split(members, np.arange(batch, len(members), batch))


def sample_users(examples: Examples, users: int, seed: int) -> Examples:
    """A seeded sample of `users` examples in their order; all of them if `users` is 0 or more."""
    if not 0 < users < len(examples):
        return examples
    rng = np.random.default_rng(derive_seed(seed, "users", len(examples)))
    return examples.subset(np.sort(rng.choice(len(examples), users, replace=False)))
