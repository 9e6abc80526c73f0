"""The synthetic shop: deterministic, readable, and won by inferring the project."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from streamctl.data import load_data, synthesize
from streamctl.data.synthetic import PRODUCTS, PROJECTS, STEPS, generate_shop
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir


@pytest.fixture(scope="module")
def shop():
    return generate_shop(3000, 600, 0)


def test_the_same_seed_gives_the_same_shop_and_another_seed_another(tmp_path):
    hashes = [
        synthesize(RunDir(tmp_path / str(n)), users=100, items=80, seed=seed).hash
        for n, seed in enumerate((4, 4, 5))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_shop_has_the_size_that_was_asked_for(tmp_path):
    synthesize(RunDir(tmp_path), users=30, items=500, seed=0)
    catalog, split = load_data(RunDir(tmp_path))
    assert len(catalog) == split.n_items == 500
    assert split.log.n_users == 30
    assert split.log.timestamps is not None


def test_titles_are_readable_and_distinct(shop):
    titles = shop.catalogue.columns["title"]
    assert len(set(titles)) == len(titles)
    assert "Oakfield watercolour paper pad" in titles
    assert len(set(generate_shop(10, 100_000, 0).catalogue.columns["title"])) == 100_000


def test_the_last_step_is_ambiguous_and_the_earlier_ones_resolve_it(shop):
    plan = shop.plan
    for step in (1, 3):  # the shared steps
        for product in np.unique(plan[:, step]):
            following = plan[plan[:, step] == product, step + 1]
            assert len(np.unique(following)) >= 4
    # An opener and a middle are one project's and no other's.
    assert len(np.unique(plan[:, [0, 2]], axis=0)) == len(plan)
    departments = np.array(shop.catalogue.columns["department"])
    first = {kind: departments[shop.product == kind][0] for kind in np.unique(plan)}
    assert all(len({first[kind] for kind in steps}) == STEPS for steps in plan)


def test_knowing_the_project_beats_knowing_the_last_item(shop):
    """Both oracles know the user's favourite row and name two items at most.

    One knows the projects behind the history and so their next steps; the other knows the exact
    chance of every product after the last one, counted on the whole log, future included.
    """
    product, plan = shop.product[shop.item], shop.plan
    n_products = PRODUCTS * (len(plan) // PROJECTS)
    counts = np.bincount(shop.product, minlength=n_products)
    firsts = np.cumsum(counts) - counts
    follows = np.flatnonzero(shop.user[1:] == shop.user[:-1])
    transitions = np.zeros((n_products, n_products), int)
    np.add.at(transitions, (product[follows], product[follows + 1]), 1)
    likely = np.argsort(-transitions, axis=1, kind="stable")

    def item(user, kind):
        return firsts[kind] + int(shop.favourite[user] * counts[kind])

    project_hits = last_hits = 0
    active: list[tuple[int, int]] = []  # (project, step) of the latest two, latest first
    for t in range(len(shop.item)):
        user = shop.user[t]
        if t == 0 or shop.user[t - 1] != user:
            active = []
        else:
            next_steps = [plan[p, s + 1] for p, s in active if s + 1 < STEPS]
            last_best = likely[product[t - 1]][:2]
            project_hits += shop.item[t] in [item(user, kind) for kind in next_steps]
            last_hits += shop.item[t] in [item(user, kind) for kind in last_best]
        if shop.project[t] >= 0:
            now = (int(shop.project[t]), int(shop.step[t]))
            active = [now, *(a for a in active if a[0] != now[0])][:2]
    with_project, with_last = project_hits / len(follows), last_hits / len(follows)
    assert with_project > 1.4 * with_last, (with_project, with_last)


def test_an_ending_follows_from_the_project_and_not_from_the_step_before(shop):
    """Where the fourth step was the last item: the project tells the ending, the item does not."""
    plan = shop.plan
    t = np.flatnonzero(
        (shop.step[:-1] == 3)
        & (shop.project[:-1] >= 0)
        & (shop.project[1:] == shop.project[:-1])
        & (shop.user[1:] == shop.user[:-1])
        & (shop.step[1:] == 4)  # a whole project may also begin anew
    )
    ending = shop.product[shop.item[t + 1]]
    assert (ending == plan[shop.project[t], 4]).all()
    before = shop.product[shop.item[t]]
    best = sum(np.bincount(ending[before == kind]).max() for kind in np.unique(before))
    assert best < 0.3 * len(t)


def test_text_tells_what_belongs_together(shop):
    vectors = TfidfVectorizer().fit_transform(
        [
            " ".join(words)
            for words in zip(*(shop.catalogue.columns[c] for c in shop.catalogue.text), strict=True)
        ]
    )
    near = (vectors @ vectors.T).toarray()
    np.fill_diagonal(near, -1)
    domain = shop.product // PRODUCTS
    assert (domain[near.argmax(1)] == domain).mean() > 0.95


def test_ids_do_not_betray_the_order_of_a_project(shop):
    rank = np.argsort(np.argsort(shop.catalogue.ids))[shop.item]
    same_user = shop.user[1:] == shop.user[:-1]
    assert abs((rank[1:] > rank[:-1])[same_user].mean() - 0.5) < 0.03


def test_a_million_interactions_take_seconds():
    start = time.process_time()  # a busy machine makes it later, not longer
    shop = generate_shop(111_000, 20_000, 1)
    assert len(shop.item) > 950_000
    assert time.process_time() - start < 30


def test_a_shop_too_small_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="20 items"):
        synthesize(RunDir(tmp_path), users=10, items=5)


def test_another_shop_in_the_same_run_is_refused(tmp_path):
    synthesize(RunDir(tmp_path), users=20, items=40)
    with pytest.raises(StreamctlError, match="--force"):
        synthesize(RunDir(tmp_path), users=21, items=40)
