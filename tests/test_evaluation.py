"""Metrics by hand, intervals that cover, seen items masked or not, items and not codes credited."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from streamctl.data import InteractionLog, Split
from streamctl.ranking import (
    Ranking,
    bootstrap_mean,
    bootstrap_seeds,
    evaluate,
    gains,
    paired_difference,
    ranking_metrics,
    sample_users,
    target_ranks,
)
from streamctl.ranking.evaluate import batches_by_length
from streamctl.ranking.metrics import MISSING, coverage


def log_of(*sequences):
    lengths = [len(sequence) for sequence in sequences]
    return InteractionLog(
        items=np.concatenate(sequences).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        user_ids=[f"u{number}" for number in range(len(sequences))],
    )


class Fixed:
    """Recommends a fixed order of the catalogue, and remembers what it was asked."""

    def __init__(self, order):
        self.order, self.asked = np.asarray(order), []

    def recommend(self, history, k, *, users=None, exclude=None):
        rows = []
        for row in range(len(history)):
            banned = exclude[row] if exclude is not None else []
            kept = self.order[~np.isin(self.order, banned)][:k]
            rows.append(np.pad(kept, (0, k - len(kept)), constant_values=-1))
        self.asked.append((history.numpy().copy(), users, exclude))
        items = torch.from_numpy(np.stack(rows))
        return Ranking(items, torch.zeros(items.shape))


def test_ranks_are_those_of_the_target_item():
    items = np.array([[4, 2, 9], [4, 2, 9], [4, 2, -1]])
    assert target_ranks(items, np.array([4, 9, 7])).tolist() == [0, 2, MISSING]


def test_metrics_of_four_users_by_hand():
    found = ranking_metrics(np.array([0, 3, 10, MISSING], dtype=np.int32))
    assert found["recall@1"] == 1 / 4
    assert found["recall@5"] == 2 / 4
    assert found["recall@10"] == 2 / 4
    assert found["recall@20"] == found["recall@50"] == 3 / 4
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(5)) / 4)
    assert found["ndcg@10"] == found["ndcg@5"]
    assert found["ndcg@20"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(12)) / 4)


def test_metrics_have_exactly_the_documented_keys():
    keys = ranking_metrics(np.zeros(1, dtype=np.int32)).keys()
    assert list(keys) == [
        *(f"recall@{k}" for k in (1, 5, 10, 20, 50)),
        *(f"ndcg@{k}" for k in (5, 10, 20)),
        "mrr@10",
    ]


def test_metrics_of_nobody_are_refused():
    with pytest.raises(ValueError, match="no users"):
        ranking_metrics(np.array([], dtype=np.int32))


def test_coverage_counts_each_item_once_and_no_padding():
    assert coverage(np.array([[0, 1], [1, -1]]), 8) == 2 / 8


def test_an_item_that_shares_the_targets_code_earns_nothing():
    # Items 3 and 5 have one code: a recommender that names 3 has not found 5.
    split = Split(log_of([0, 1, 2, 5], [1, 0, 2, 5]), n_items=6)
    found = evaluate(Fixed([3, 0]), split.test, n_items=6, masked=False)
    assert found.metrics["recall@50"] == 0


def test_masking_removes_all_that_the_user_has_taken_even_before_the_history():
    split = Split(log_of([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]), history=2, n_items=6)
    method = Fixed([0, 1, 2, 3, 4, 5])
    unmasked = evaluate(method, split.test, n_items=6, masked=False)
    assert unmasked.ranks.tolist() == [4, 0]
    assert all(exclude is None for _, _, exclude in method.asked)
    method.asked.clear()
    masked = evaluate(method, split.test, n_items=6, masked=True)
    assert masked.ranks.tolist() == [0, 0]
    assert sorted(method.asked[-1][2][0].tolist()) == [0, 1, 2, 3]


def test_ranks_keep_the_examples_order_whatever_the_lengths():
    sequences = [[0, 1, 2], [0, 1, 2, 3], [4, 0, 1], [5, 4, 3, 2, 1]]
    split = Split(log_of(*sequences), n_items=6)
    method = Fixed([1, 2, 3, 0, 4, 5])
    found = evaluate(method, split.test, n_items=6, masked=False, batch=1)
    assert found.ranks.tolist() == [1, 2, 0, 0]
    # No history is padded: the lengths of a batch are equal.
    assert all((history >= 0).all() for history, _, _ in method.asked[1:])
    assert sorted(int(users[0]) for _, users, _ in method.asked[1:]) == [0, 1, 2, 3]


def test_latency_is_a_positive_time_a_user():
    split = Split(log_of([0, 1, 2], [2, 1, 0]), n_items=3)
    assert evaluate(Fixed([0, 1, 2]), split.test, n_items=3, masked=False).ms_per_user > 0


def test_batches_hold_one_length_and_every_row_once():
    lengths = np.array([3, 1, 3, 2, 3, 1])
    parts = list(batches_by_length(lengths, 2))
    assert [len(part) for part in parts] == [2, 1, 1, 2]
    assert all(len(set(lengths[part])) == 1 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(6))


def test_a_sample_of_users_is_seeded_sorted_and_of_the_asked_size():
    split = Split(log_of(*([0, 1, 2] for _ in range(50))), n_items=3)
    sample = sample_users(split.test, 10, seed=1)
    assert len(sample) == 10
    assert (np.diff(sample.users) > 0).all()
    assert (sample.users == sample_users(split.test, 10, seed=1).users).all()
    assert (sample.users != sample_users(split.test, 10, seed=2).users).any()
    assert len(sample_users(split.test, 0, seed=1)) == len(sample_users(split.test, 99, 1)) == 50


def test_paired_interval_is_narrower_than_the_spread_of_users():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 40, 2000).astype(np.int32)
    better = np.maximum(ranks - (rng.random(2000) < 0.2), 0).astype(np.int32)
    own = bootstrap_mean(gains(ranks, 10), resamples=500)
    paired = paired_difference(better, ranks, resamples=500)
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (own.high - own.low)
    assert paired.mean == pytest.approx(gains(better, 10).mean() - gains(ranks, 10).mean())


def test_the_difference_of_a_method_to_itself_is_zero():
    ranks = np.arange(100, dtype=np.int32)
    assert paired_difference(ranks, ranks).as_dict() == {"difference": 0, "low": 0, "high": 0}


def test_the_95_percent_interval_covers_the_truth_about_95_percent_of_the_time():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        values = rng.exponential(size=300)  # skewed, mean 1
        interval = bootstrap_mean(values, resamples=400, seed=trial)
        covered += interval.low <= 1 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_targets_of_one_user_are_drawn_together():
    """A hundred copies of each value tell no more than one."""
    values = np.random.default_rng(0).random(60)
    users = np.repeat(np.arange(60), 100)
    alone = bootstrap_mean(values, seed=3)
    together = bootstrap_mean(values.repeat(100), users=users, seed=3)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    apart = bootstrap_mean(values.repeat(100), seed=3)
    assert apart.high - apart.low < 0.2 * (together.high - together.low)
    assert bootstrap_mean(values, users=np.arange(60), seed=3) == alone
    few = np.r_[np.zeros(50, int), 1]  # whoever has more targets counts for more
    assert bootstrap_mean(np.r_[np.ones(50), 0], users=few).mean == pytest.approx(50 / 51)
    ranks = np.arange(6000, dtype=np.int32) % 11
    assert paired_difference(ranks, ranks, users=users).high == 0


def test_over_seeds_too_the_targets_of_one_user_are_drawn_together():
    values = np.random.default_rng(0).normal(size=(1, 3, 40))
    [alone] = bootstrap_seeds(values)
    [each] = bootstrap_seeds(np.repeat(values, 5, axis=2), users=np.repeat(np.arange(40), 5))
    assert (each.low, each.high) == pytest.approx((alone.low, alone.high))
    [apart] = bootstrap_seeds(np.repeat(values, 5, axis=2))
    assert apart.high - apart.low < 0.8 * (each.high - each.low)


def test_the_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).random(100)
    first = bootstrap_mean(values, seed=1)
    assert first == bootstrap_mean(values, seed=1)
    assert first != bootstrap_mean(values, seed=2)


def test_ranks_of_other_users_cannot_be_paired():
    with pytest.raises(ValueError, match="paired"):
        paired_difference(np.zeros(3, np.int32), np.zeros(4, np.int32))
