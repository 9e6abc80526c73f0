"""The memory of evidence: searches by state and by basket, rows that join, fast indexes."""

from __future__ import annotations

import numpy as np
import pytest

from streamctl.retrieval.baskets import BasketIndex, Weighing
from streamctl.retrieval.memory import STRANGER, Memory


def rows(count: int, width: int = 6, seed: int = 0, users: int = 10) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(count, width)).astype(np.float32)
    items = rng.integers(0, 20, (count, 5)).astype(np.int32)
    return keys, items[:, :4], rng.integers(0, users, count), items


def test_a_search_is_the_exact_cosine_order_without_the_users_own_rows():
    keys, taken, users, recent = rows(300)
    memory = Memory(keys, taken, users, recent)
    queries, askers = keys[:20] + 0.1, users[:20]
    found = memory.search(queries, 7, users=askers)
    length = np.linalg.norm(keys.astype(float), axis=1)
    cosine = queries.astype(float) @ keys.T / length / np.linalg.norm(queries, axis=1)[:, None]
    cosine[askers[:, None] == users] = -np.inf
    expected = np.argsort(-cosine, axis=1)[:, :7]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, expected, 1), atol=1e-5)


def test_rows_found_before_are_not_found_again():
    memory = Memory(*rows(50))
    queries = memory.keys[:9]
    first = memory.search(queries, 5).rows
    second = memory.search(queries, 5, known=first).rows
    together = memory.search(queries, 10).rows
    np.testing.assert_array_equal(np.concatenate([first, second], 1), together)


def cosines(question, recent, taken, weighing: Weighing) -> np.ndarray:
    """(Q, R) float64, from the definition."""
    known = len(taken) + 1
    rarity = np.sqrt(np.log(known / (np.bincount(taken[:, 0], minlength=20) + 1)))

    def vector(items: np.ndarray) -> np.ndarray:
        dense = np.zeros(20)
        for age, item in enumerate(items[: weighing.width]):
            dense[item] += weighing.age**age * rarity[item] if item >= 0 else 0
        return dense / np.linalg.norm(dense)

    every = np.array([vector(items) for items in recent])
    return np.array([vector(items) for items in question]) @ every.T


@pytest.mark.parametrize("weighing", [Weighing(0.8, 5), Weighing(0.5, 2), Weighing(1.0, 1)])
def test_baskets_are_compared_by_the_weighted_items_they_share(weighing):
    keys, taken, users, recent = rows(200)
    memory = Memory(keys, taken, users, recent)
    question = recent[:6] * 1
    question[:, 3:] = -1
    index = memory.by_items(weighing)
    baskets = index.weigh(question)
    found = index.search(baskets, 8, memory.users, users=users[:6])
    cosine = cosines(question, recent, taken, weighing)
    cosine[users[:6, None] == users] = 0
    expected = np.sort(cosine, axis=1)[:, ::-1][:, :8]
    there = found.rows >= 0
    np.testing.assert_allclose(np.where(there, found.cosine, 0), expected, atol=1e-5)
    assert (users[found.rows] != users[:6, None])[there].all()
    again = index.search(baskets, 8, memory.users, users=users[:6], known=found.rows)
    assert (again.cosine[:, 0] <= found.cosine[:, -1] + 1e-6).all()
    for old, new in zip(found.rows, again.rows, strict=True):
        assert not (set(old) & set(new)) - {-1}


@pytest.mark.parametrize("tail", [10**6, 0])
def test_rows_that_join_an_index_are_found_as_if_they_had_always_been_there(monkeypatch, tail):
    monkeypatch.setattr("streamctl.retrieval.baskets._TAIL", tail)
    monkeypatch.setattr("streamctl.retrieval.baskets._SHARE", 10**6)
    _, _, users, recent = rows(300)
    rarity, weighing = np.linspace(1, 2, 20), Weighing(0.7, 4)
    whole = BasketIndex(recent, rarity, weighing)
    grown = BasketIndex(recent[:100], rarity, weighing)
    for start in (100, 170):
        grown.append(recent[start : start + (70 if start == 100 else 130)], rarity)
    expected, found = (
        index.search(index.weigh(recent[::17]), 20, users, users=users[::17])
        for index in (whole, grown)
    )
    np.testing.assert_allclose(found.cosine, expected.cosine, atol=1e-6)
    assert (found.rows == expected.rows).mean() > 0.9  # equal but for rounding between ties


def test_too_few_rows_leave_places_empty():
    keys, taken, users, recent = rows(4, users=1)
    found = Memory(keys, taken, users, recent).search(keys[:1], 6, users=np.zeros(1, np.int64))
    assert (found.rows == -1).all()
    assert np.isneginf(found.cosine).all()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_appended_rows_are_found_and_survive_a_reload(kind, tmp_path):
    memory = Memory(*rows(400), kind=kind)
    new = np.full((1, 6), 3.0, np.float32)
    memory.append(new, np.full((1, 4), 7), np.full(1, STRANGER), np.full((1, 5), 9))
    assert memory.search(new, 1).rows[0, 0] == 400
    for name, array in memory.arrays().items():
        np.save(tmp_path / f"{name}.npy", array)
    again = Memory.load(tmp_path, kind)
    assert len(again) == 401
    assert again.search(new, 1).rows[0, 0] == 400


def test_fast_indexes_find_most_of_what_the_exact_one_finds():
    data = rows(3000, width=16)
    exact = Memory(*data).search(data[0][:50], 10).rows
    for kind in ("ivf", "hnsw"):
        found = Memory(*data, kind=kind).search(data[0][:50], 10).rows
        shared = np.mean([len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)])
        assert shared > 6, kind
