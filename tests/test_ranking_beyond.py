"""Metrics beyond accuracy by hand, and rankings made diverse by MMR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from streamctl.cli import build_app
from streamctl.commands.recommend import history_ids
from streamctl.errors import UsageError
from streamctl.ranking import Ranking, ranking_metrics
from streamctl.ranking.metrics import MISSING, ItemFacts, beyond_accuracy
from streamctl.ranking.mmr import Diverse, mmr

AXES = np.eye(4, dtype=np.float32)
FACTS = ItemFacts(np.array([7, 3, 1, 1]), AXES)


def test_mrr_is_the_mean_of_one_over_the_place_within_ten():
    ranks = np.array([0, 1, 9, 10, MISSING], np.int32)
    assert ranking_metrics(ranks)["mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 10) / 5)


def test_novelty_is_the_surprise_of_what_is_recommended():
    found = beyond_accuracy(np.array([[0, -1]]), FACTS)
    assert found["novelty@10"] == pytest.approx(-np.log2(8 / 16))
    rare = beyond_accuracy(np.array([[2, 3]]), FACTS)
    assert rare["novelty@10"] == pytest.approx(-np.log2(2 / 16))


def test_popularity_bias_compares_with_what_users_took():
    taken = (49 + 9 + 1 + 1) / 12
    for items, mean in (([[0, 0]], 7), ([[0, 2]], 4), ([[2, 3]], 1)):
        found = beyond_accuracy(np.array(items), FACTS)["popularity_bias@10"]
        assert found == pytest.approx(mean / taken - 1)
    drawn = np.repeat(np.arange(4), FACTS.popularity)[:, None]
    assert beyond_accuracy(drawn, FACTS)["popularity_bias@10"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("items", "expected"),
    [([[0, 1, 2]], 1.0), ([[0, 4]], 0.0), ([[0, 4, 1]], 2 / 3), ([[0, -1]], 0.0), ([[0, 5]], 2.0)],
)
def test_diversity_is_one_less_the_mean_cosine_of_a_lists_pairs(items, expected):
    vectors = np.concatenate([AXES, AXES[:1], -AXES[:1]])  # 4 is a copy of 0, 5 its opposite
    facts = ItemFacts(np.ones(6, np.int64), vectors)
    found = beyond_accuracy(np.array(items), facts)["diversity@10"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_lists_without_an_item_have_figures_too():
    found = beyond_accuracy(np.full((3, 10), -1), FACTS)
    assert all(np.isfinite(value) for value in found.values())


def clusters(count: int, groups: int) -> np.ndarray:
    """(count, groups + 2): items of one group are nearly the same."""
    rows = np.zeros((count, groups + 2), np.float32)
    rows[np.arange(count), np.arange(count) * groups // count] = 1
    rows += 0.01 * np.random.default_rng(0).standard_normal(rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Fixed:
    """Items in the order of their numbers, or the reverse for every other user."""

    def __init__(self, count: int):
        self.count, self.asked = count, 0

    def recommend(self, histories, k, **options):
        self.asked = k
        rows = [torch.arange(self.count), torch.arange(self.count).flip(0)]
        items = torch.stack([rows[n % 2] for n in range(len(histories))])[:, :k]
        return Ranking(items, -torch.arange(items.shape[1]).float().expand(items.shape))


@pytest.mark.parametrize("k", [1, 4, 12])
def test_without_diversity_a_ranking_stays_as_it_is(k):
    method = Fixed(48)
    plain = method.recommend(torch.zeros(3, 1), k)
    same = Diverse(method, clusters(48, 12), 0.0).recommend(torch.zeros(3, 1), k)
    assert torch.equal(plain.items, same.items) and torch.equal(plain.scores, same.scores)
    assert method.asked == k


def test_more_diversity_makes_lists_less_alike_and_the_best_stays_first():
    vectors = clusters(48, 12)
    facts = ItemFacts(np.ones(48, np.int64), vectors)
    found = []
    for diversity in (0.0, 0.3, 0.7):
        answer = Diverse(Fixed(48), vectors, diversity).recommend(torch.zeros(2, 1), 8)
        assert answer.items[:, 0].tolist() == [0, 47]
        assert all(len(set(row)) == 8 for row in answer.items.tolist())
        found.append(beyond_accuracy(answer.items.numpy(), facts)["diversity@10"])
    assert found[0] < found[1] <= found[2] and found[2] > 0.95


def test_mmr_by_hand():
    # 1 is a copy of 0: relevance 1, 2/3, 1/3; at one half 2 comes second: 1/6 - 0 > 1/3 - 1/2.
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    ranking = Ranking(torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 2.0, 1.0]]))
    answer = mmr(ranking, vectors, 3, 0.5)
    assert answer.items.tolist() == [[0, 2, 1]]
    assert answer.scores.tolist() == [[3.0, 1.0, 2.0]]


def test_places_without_an_item_come_last():
    ranking = Ranking(torch.tensor([[2, 0, -1, -1]]), torch.tensor([[1.0, 0.5, -9.0, -9.0]]))
    assert mmr(ranking, torch.from_numpy(AXES), 4, 0.9).items.tolist() == [[2, 0, -1, -1]]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (["a,b, c"], ["a", "b", "c"]),
        (["a,b", "c"], ["a,b", "c"]),
        ([" 007 ", "1.0", "x y"], [" 007 ", "1.0", "x y"]),
        (["only"], ["only"]),
        (["a,,b,"], ["a", "b"]),
    ],
)
def test_ids_with_commas_are_given_one_an_option(values, ids):
    assert history_ids(values) == ids


def test_a_history_may_be_a_file_of_ids(tmp_path):
    (tmp_path / "h.txt").write_text("\ufeffa,1\n\n茶,2\n", encoding="utf-8")
    assert history_ids([f"@{tmp_path / 'h.txt'}"]) == ["a,1", "茶,2"]
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read"):
        history_ids([f"@{tmp_path / 'none.txt'}"])


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        (["-k", "1001"], "-k"),
        (["-k", "0"], "-k"),
        (["--diversity", "1.5"], "--diversity"),
        (["--diversity", "-0.1"], "--diversity"),
    ],
)
def test_a_list_of_a_thousand_is_within_the_limits_and_more_is_refused(tmp_path, wrong, option):
    ask = ["recommend", "--run", str(tmp_path / "none"), "--history", "a"]
    refused = CliRunner().invoke(build_app(), [*ask, *wrong])
    assert refused.exit_code == 2 and option in refused.output
    # Of a thousand only the run is missing.
    assert CliRunner().invoke(build_app(), [*ask, "-k", "1000"]).exit_code == 1
