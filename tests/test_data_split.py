"""The split: nothing of the future or of the held-out items reaches training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamctl.data import InteractionLog, Split
from streamctl.errors import StreamctlError


def make_log(sequences: list[list[int]]) -> InteractionLog:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    users = [f"u{number}" for number in range(len(sequences))]
    return InteractionLog(np.concatenate(sequences).astype(np.int32), offsets, users)


logs = st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=30), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sequences=logs, history=st.integers(1, 25))
def test_every_view_holds_exactly_the_windows_of_leave_one_out(sequences, history):
    split = Split(make_log(sequences), history)

    def windows(view):
        """The view as a slow transcription sees it: (user, history, target)."""
        found = []
        for user, items in enumerate(sequences):
            n = len(items)
            ends = {"train": range(1, n - 2), "valid": [n - 2], "test": [n - 1]}[view]
            found += [(user, items[max(0, end - history) : end], items[end]) for end in ends]
        return found

    for view in ("train", "valid", "test"):
        examples = getattr(split, view)
        rows = examples.histories(np.arange(len(examples)))
        got = [
            (int(user), [int(item) for item in row if item >= 0], int(target))
            for user, row, target in zip(examples.users, rows, examples.targets, strict=True)
        ]
        assert got == windows(view)
        np.testing.assert_array_equal(examples.lengths, (rows >= 0).sum(1))


@settings(max_examples=60, deadline=None)
@given(sequences=logs)
def test_training_never_touches_the_last_two_interactions(sequences):
    split = Split(make_log(sequences))
    held_out = np.concatenate([split.valid.end, split.test.end])
    train = split.train
    assert not np.isin(train.end, held_out).any()
    assert (train.end > train.start).all()
    first = split.log.offsets[train.users]
    assert (train.start >= first).all()
    assert (train.end < split.log.offsets[train.users + 1] - 2).all()
    assert len(train) == sum(len(s) - 3 for s in sequences)
    expected = np.bincount([item for s in sequences for item in s[:-2]], minlength=split.n_items)
    np.testing.assert_array_equal(split.popularity(), expected)
    items, offsets = split.training_sequences()
    assert items.dtype == np.int32 and offsets.dtype == np.int64
    cut = [items[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert cut == [s[:-2] for s in sequences]


def test_histories_are_padded_on_the_right_to_the_longest_of_the_batch():
    split = Split(make_log([[1, 2, 3, 4, 5], [6, 7, 8]]), history=3)
    np.testing.assert_array_equal(split.test.histories(np.array([1, 0])), [[6, 7, -1], [2, 3, 4]])
    assert split.test.histories(np.array([1])).shape == (1, 2)
    assert split.test.histories(np.array([], int)).shape == (0, 0)
    assert split.test.histories(np.array([0])).dtype == np.int64


def test_seen_reaches_back_beyond_the_history():
    split = Split(make_log([[1, 2, 3, 4, 5]]), history=2)
    np.testing.assert_array_equal(split.test.seen(np.array([0]))[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(split.valid.seen(np.array([0]))[0], [1, 2, 3])
    np.testing.assert_array_equal(split.train.seen(np.array([1]))[0], [1, 2])


def test_a_subset_keeps_its_windows():
    split = Split(make_log([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1]]))
    chosen = split.train.subset(np.array([3, 0]))
    np.testing.assert_array_equal(chosen.targets, split.train.targets[[3, 0]])
    np.testing.assert_array_equal(chosen.users, [1, 0])
    assert len(split.train.subset(split.train.lengths > 1)) == 2


def test_a_user_who_cannot_be_left_out_is_named():
    with pytest.raises(StreamctlError, match="user 'u1' has 2 interactions"):
        Split(make_log([[1, 2, 3], [4, 5]]))


def test_the_catalogue_may_hold_more_than_the_log():
    split = Split(make_log([[1, 2, 3]]), n_items=10)
    assert split.n_items == 10
    assert len(split.popularity()) == 10
