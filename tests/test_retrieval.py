"""Neighbours by cosine."""

from __future__ import annotations

import numpy as np

from streamctl.tokenizer.neighbours import nearest, neighbours, unit


def test_nearest_agrees_with_a_sort_in_float64():
    rng = np.random.default_rng(0)
    vectors, queries = (unit(rng.normal(size=(rows, 12))) for rows in (300, 40))
    cosine = queries.astype(np.float64) @ vectors.T
    found, score = nearest(vectors, queries, 10)
    assert np.array_equal(found, np.argsort(-cosine, axis=1)[:, :10])
    assert np.allclose(score, -np.sort(-cosine, axis=1)[:, :10], atol=1e-6)


def test_length_does_not_matter():
    vectors = np.array([[9.0, 0.1], [0.1, 0.1], [1.0, 1.0]], np.float32)
    assert neighbours(vectors, 2)[0].tolist() == [[1, 2], [2, 0], [1, 0]]


def test_an_item_is_no_neighbour_of_its_own():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(80, 6)).astype(np.float32)
    found = neighbours(vectors, 7)[0]
    assert found.shape == (80, 7)
    assert not (found == np.arange(80)[:, None]).any()
    assert np.array_equal(found, nearest(unit(vectors), unit(vectors), 8)[0][:, 1:])


def test_copies_of_an_item_are_its_neighbours_but_never_itself():
    vectors = np.ones((30, 4), np.float32)
    found = neighbours(vectors, 5)[0]
    assert found.shape == (30, 5)
    assert all(len({*row, item}) == 6 for item, row in enumerate(found.tolist()))


def test_a_small_catalogue_has_no_more_neighbours_than_other_items():
    vectors = np.eye(4, dtype=np.float32)
    assert neighbours(vectors, 50)[0].shape == (4, 3)
