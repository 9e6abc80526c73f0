"""Equations 21-27, worked by hand."""

import pytest
import torch

from streamctl.training import rewards

ITEM_TOKENS = torch.tensor([[3, 7], [4, 7], [3, 8]])


def test_eq_21_codes_that_spell_no_item_cost_one():
    parse = rewards.ItemParser(ITEM_TOKENS, vocabulary=9)
    codes = torch.tensor([[[3, 8], [4, 8], [7, 3]], [[4, 7], [3, 7], [0, 0]]])
    items = parse(codes)
    assert items.tolist() == [[2, -1, -1], [1, 0, -1]]
    assert rewards.format_reward(items).tolist() == [[0, -1, -1], [0, 0, -1]]


def test_eq_21_the_parser_agrees_with_a_dictionary():
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(3, 1027, (500, 4), generator=generator)
    asked = torch.cat((items, torch.randint(3, 1027, (500, 4), generator=generator)))
    table = {tuple(row): i for i, row in reversed(list(enumerate(items.tolist())))}
    found = rewards.ItemParser(items, vocabulary=1027)(asked)
    assert found.tolist() == [table.get(tuple(row), -1) for row in asked.tolist()]


@pytest.mark.parametrize(
    ("codes", "want"),
    [([1, 2, 3, 4], 4), ([1, 2, 9, 4], 2), ([9, 2, 3, 4], 0), ([1, 2, 3, 9], 3)],
)
def test_eq_22_exact_match_counts_leading_codes(codes, want):
    target = torch.tensor([[1, 2, 3, 4]])
    assert rewards.exact_match_reward(torch.tensor([[codes]]), target).tolist() == [[want]]


def test_eq_23_each_code_needs_all_before_it():
    target = torch.tensor([[5, 6, 7], [5, 6, 7]])
    codes = torch.tensor([[[5, 0, 7], [5, 6, 0]], [[0, 6, 7], [5, 6, 7]]])
    terms = [
        [all(c[k] == t[k] for k in range(j + 1)) for j in range(3)]
        for row, t in zip(codes.tolist(), target.tolist(), strict=True)
        for c in row
    ]
    found = rewards.exact_match_reward(codes, target).flatten().tolist()
    assert found == [sum(each) for each in terms] == [1, 2, 0, 3]


def test_eq_24_similarity_steps():
    share = torch.tensor([1.0, 0.99, 0.98, 0.95, 0.94, 0.5, 0.49, 0.0])
    assert rewards.similarity_reward(share).tolist() == pytest.approx(
        [0.5, 0.5, 0.1, 0.1, 0.05, 0.05, -0.1, -0.1]
    )


def test_eq_25_share_of_the_batch_no_more_similar_than_the_target():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 3.0]])
    items = torch.arange(4)
    hidden = torch.tensor([[2.0, 0.1], [0.0, -1.0]]).expand(4, 2, 2)
    found = rewards.win_share(hidden, targets, items, targets, items)
    # cosines of the first rollout: about .999, .05, -.999, .74; of the second: 0, -1, 0, -.71
    assert found.tolist() == [[1.0, 1.0], [0.5, 0.25], [0.25, 1.0], [0.75, 0.5]]


def test_eq_25_a_copy_of_the_target_is_no_rival_and_an_outside_pool_gains_the_target():
    targets = torch.tensor([[1.0, 0.0]])
    hidden = torch.tensor([[[0.6, 0.8]]])
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    inside = rewards.win_share(hidden, targets, torch.tensor([0]), pool, torch.tensor([0, 1, 2]))
    outside = rewards.win_share(hidden, targets, torch.tensor([9]), pool[1:], torch.tensor([1, 2]))
    assert inside.item() == outside.item() == pytest.approx(2 / 3)


def test_eq_26_likelihood_gain_over_the_direct_decoder_is_clipped():
    thought = torch.tensor([[-5.0, -7.5, -20.0, -1.0]])
    found = rewards.likelihood_reward(thought, torch.tensor([-5.5]))
    assert found.tolist() == [[0.5, -1.0, -1.0, 1.0]]
    assert rewards.likelihood_reward(thought[:, :1], torch.tensor([-5.25])).item() == 0.25


def test_eq_27_ranking_steps_with_fifty_negatives():
    want = {1: 0.2, 2: 0.1, 4: 0.1, 5: 0.05, 9: 0.05, 10: 0.0, 24: 0.0, 25: -0.1, 51: -0.1}
    found = rewards.ranking_reward(torch.tensor(list(want)), 50)
    assert found.tolist() == pytest.approx(list(want.values()))


def test_eq_27_rank_counts_negatives_at_least_as_likely():
    negatives = torch.tensor([[[-1.0, -3.0, -2.0]], [[-1.0, -1.5, -0.5]]])
    assert rewards.target_rank(torch.tensor([[-2.0], [-0.1]]), negatives).tolist() == [[3], [1]]
