"""Constrained search finds what transformers and brute force find, from one encoding of a user."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from test_model import SIZES, encoder_inputs, histories, small_policy, transformers_model

from streamctl.decode import PolicyRecommender, beam, recommend
from streamctl.decode.beam import search_after
from streamctl.decode.retrieved import retrieved_codes
from streamctl.errors import UsageError
from streamctl.model import Policy
from streamctl.tokenizer import PrefixTrie, Tokens


def catalogue(policy: Policy) -> PrefixTrie:
    return PrefixTrie(policy.item_tokens.numpy())


def distinct_policy(history: str = "items", **others) -> Policy:
    """A policy whose items all have codes of their own."""
    policy = small_policy(history, items=200, **others)
    policy.item_tokens = torch.unique(policy.item_tokens, dim=0)
    return policy


@torch.no_grad()
def all_scores(policy: Policy, history: torch.Tensor, think=None, decoder="slow") -> torch.Tensor:
    """(B, N): log P of every item, by teacher forcing."""
    items = torch.arange(len(policy.item_tokens)).expand(len(history), -1)
    thought = None if think is None else think
    return policy.target_logprob(policy.encode(history), items, thought, decoder)


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("history", ["codes", "items"])
@torch.no_grad()
def test_beam_gives_the_items_and_scores_of_transformers_generate(tmp_path, history, softmax):
    # As many decoder layers as encoder layers: transformers sizes its cache by the encoder.
    policy = distinct_policy(history, decoder_layers=2, softmax=softmax)
    trie = catalogue(policy)
    oracle = transformers_model(policy, tmp_path)
    past = histories(len(policy.item_tokens), [5, 2, 5])
    beam = 8

    def allowed(_row: int, tokens: torch.Tensor) -> list[int]:
        node = trie.walk(tokens[1:].tolist())
        return trie.child_token[trie.child_start[node] : trie.child_start[node + 1]].tolist()

    answer = oracle.generate(
        **encoder_inputs(policy, past),
        decoder_start_token_id=Tokens.BOS,
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=len(SIZES),
        min_new_tokens=len(SIZES),
        prefix_allowed_tokens_fn=allowed,
        renormalize_logits=softmax == "catalogue",
        length_penalty=0.0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    leaves = [trie.walk(row[1:].tolist()) for row in answer.sequences]
    theirs = torch.tensor([trie.items_at(leaf)[0] for leaf in leaves]).view(3, beam)
    ranking = recommend(policy, trie, past, beam, beam=beam, exact=True)
    assert torch.equal(ranking.items, theirs)
    torch.testing.assert_close(
        ranking.scores, answer.sequences_scores.view(3, beam), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("decoder", ["slow", "direct"])
def test_wide_beam_ranks_the_whole_catalogue_as_brute_force(decoder, softmax):
    policy = distinct_policy(softmax=softmax)
    for parameter in policy.direct.parameters():
        parameter.data.mul_(1.1)
    past = histories(len(policy.item_tokens), [5, 3])
    count = len(policy.item_tokens)
    ranking = recommend(
        policy, catalogue(policy), past, count, beam=count, decoder=decoder, exact=True
    )
    expected, items = all_scores(policy, past, decoder=decoder).sort(descending=True)
    assert torch.equal(ranking.items, items)
    torch.testing.assert_close(ranking.scores, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_retrieved_items_are_written_level_by_level():
    policy = distinct_policy(think_codebook=4)
    past = histories(len(policy.item_tokens), [5, 3])
    written = retrieved_codes(policy, past, 2)
    inputs = torch.cat([torch.full((2, 1), Tokens.THINK), written[:, :-1]], 1)
    scores = policy.logits(policy.decode(policy.encode(past), inputs))
    for place in range(2 * len(SIZES)):
        low, high = policy.tokens.level_range(place % len(SIZES))
        assert torch.equal(written[:, place], scores[:, place, low:high].argmax(1) + low)


@pytest.mark.parametrize("think", [None, torch.tensor([[5, 7], [9, 3]])], ids=["l0", "l2"])
@torch.no_grad()
def test_probabilities_over_the_catalogue_sum_to_one(think):
    policy = distinct_policy(softmax="catalogue")
    past = histories(len(policy.item_tokens), [5, 3])
    torch.testing.assert_close(all_scores(policy, past, think).exp().sum(1), torch.ones(2))


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_a_denied_item_changes_no_other_score(softmax):
    policy = distinct_policy(softmax=softmax)
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5])
    count = len(policy.item_tokens)
    whole = recommend(policy, trie, past, count, beam=count, exact=True)
    denied = whole.items[0, [0, 3]].numpy()
    left = recommend(policy, trie, past, count, beam=count, exact=True, exclude=[denied])
    kept = ~torch.isin(whole.items[0], torch.from_numpy(denied))
    assert torch.equal(left.items[0, : count - 2], whole.items[0][kept])
    torch.testing.assert_close(left.scores[0, : count - 2], whole.scores[0][kept])


def test_the_greedy_thought_is_followed():
    policy = distinct_policy(think_codebook=4)
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5, 3, 4])
    ranking = recommend(policy, trie, past, 5, think=3, beam=200, exact=True)
    low, high = policy.tokens.think_range
    encoded = policy.encode(past)
    tokens = torch.full((3, 1), Tokens.THINK)
    with torch.no_grad():
        for _ in range(3):
            hidden = policy.decode(encoded, tokens)
            best = policy.logits(hidden[:, -1])[:, low:high].argmax(-1) + low
            tokens = torch.cat([tokens, best[:, None]], 1)
    expected, items = all_scores(policy, past, tokens[:, 1:]).topk(5)
    assert torch.equal(ranking.items, items)
    torch.testing.assert_close(ranking.scores, expected, atol=1e-4, rtol=1e-4)
    again = recommend(policy, trie, past, 5, thoughts=tokens[:, 1:], beam=200, exact=True)
    assert torch.equal(again.items, ranking.items)


@torch.no_grad()
def test_nothing_is_read_of_a_prefix_that_one_item_alone_begins_with(monkeypatch):
    policy = distinct_policy(softmax="catalogue")
    policy.item_tokens = policy.item_tokens[::8].contiguous()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5, 3])
    encoded = policy.encode(past)
    hidden, before = policy.prompt(encoded)
    read, extend = [], policy.extend
    monkeypatch.setattr(
        policy, "extend", lambda *given: (read.append(given[1].shape[1]), extend(*given))[1]
    )
    search_after(policy, trie, policy.logits(hidden), before, encoded, 40)
    codes, shared = policy.item_tokens.tolist(), []
    for level in range(1, policy.tokens.levels):
        counts = Counter(tuple(code[:level]) for code in codes)
        shared.append(sum(count > 1 for count in counts.values()))
    assert read == [count for count in shared if count] and sum(shared) < len(codes)


def test_users_of_different_lengths_get_what_they_get_alone():
    policy = distinct_policy()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [9, 1, 4, 9, 2])
    together = recommend(policy, trie, past, 10, think=2, beam=20, exact=True)
    for row in range(5):
        alone = recommend(policy, trie, past[row : row + 1], 10, think=2, beam=20, exact=True)
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-4, rtol=1e-4)


def test_bf16_moves_scores_little():
    policy = distinct_policy()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5, 3])
    fast = recommend(policy, trie, past, 200, beam=200)
    exact = all_scores(policy, past).gather(1, fast.items.clamp(min=0))
    found = fast.items >= 0
    assert (fast.scores - exact)[found].abs().max() < 0.15


def test_excluded_and_disallowed_items_never_come():
    policy = distinct_policy()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5, 3])
    plain = recommend(policy, trie, past, 10, beam=200, exact=True)
    exclude = [plain.items[0, :4].numpy(), np.empty(0, np.int64)]
    ranking = recommend(policy, trie, past, 6, beam=200, exact=True, exclude=exclude)
    assert torch.equal(ranking.items[0], plain.items[0, 4:10])
    assert torch.equal(ranking.items[1], plain.items[1, :6])
    torch.testing.assert_close(ranking.scores[0], plain.scores[0, 4:10])
    allow = [plain.items[0, [1, 7]].numpy(), None]
    ranking = recommend(policy, trie, past, 4, beam=200, exact=True, allow=allow)
    assert ranking.items[0].tolist() == [*plain.items[0, [1, 7]].tolist(), -1, -1]
    assert ranking.scores[0, 2:].tolist() == [-torch.inf] * 2
    assert torch.equal(ranking.items[1], plain.items[1, :4])
    ranking = recommend(policy, trie, past, 4, exact=True, allow=allow, exclude=[allow[0]] * 2)
    assert ranking.items[0].tolist() == [-1] * 4


def test_narrow_beam_spends_nothing_on_excluded_items():
    """Excluded items are closed inside the trie, so a beam of one still finds an item."""
    policy = distinct_policy()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5])
    best = recommend(policy, trie, past, 1, beam=1, exact=True)
    ranking = recommend(policy, trie, past, 1, beam=1, exact=True, exclude=[best.items[0].numpy()])
    assert ranking.items[0, 0] >= 0 and ranking.items[0, 0] != best.items[0, 0]


def test_added_items_are_found():
    policy = distinct_policy()
    held = policy.item_tokens[:-1].numpy()
    trie, past = PrefixTrie(held), histories(len(held), [5, 3])
    count = len(policy.item_tokens)
    before = recommend(policy, trie, past, count, beam=count, exact=True)
    assert (before.items != count - 1).all()
    trie.add(count - 1, policy.item_tokens[-1].numpy())
    after = recommend(policy, trie, past, count, beam=count, exact=True)
    _, items = all_scores(policy, past).sort(descending=True)
    assert torch.equal(after.items, items)


def test_items_that_share_codes_all_come_in_a_random_order_fixed_by_the_seed():
    policy = small_policy("items", items=30)
    policy.item_tokens[10:20] = policy.item_tokens[3]
    trie, past = catalogue(policy), histories(30, [5])
    orders = set()
    for seed in range(6):
        ranking = recommend(policy, trie, past, 30, beam=30, exact=True, seed=seed)
        again = recommend(policy, trie, past, 30, beam=30, exact=True, seed=seed)
        assert torch.equal(ranking.items, again.items)
        assert sorted(ranking.items[0].tolist()) == list(range(30))
        same = [item for item in ranking.items[0].tolist() if item == 3 or 10 <= item < 20]
        assert len({ranking.scores[0, ranking.items[0] == item].item() for item in same}) == 1
        orders.add(tuple(same))
    assert len(orders) > 1


def test_no_users_give_an_empty_ranking():
    policy = distinct_policy()
    ranking = recommend(policy, catalogue(policy), torch.empty(0, 3, dtype=torch.int64), 5)
    assert ranking.items.shape == (0, 5)


def test_an_empty_history_is_refused():
    policy = distinct_policy()
    with pytest.raises(UsageError, match="a history needs an item"):
        recommend(policy, catalogue(policy), torch.full((1, 3), -1), 5)


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
@pytest.mark.parametrize("length", [0, 2])
def test_exact_search_is_brute_force_however_narrow_it_begins(length, softmax, monkeypatch):
    monkeypatch.setattr(beam, "WIDTH", 1)
    policy = distinct_policy(think_codebook=4, softmax=softmax)
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [5, 3, 9])
    thoughts = torch.randint(*policy.tokens.think_range, (3, length))
    exclude = [np.arange(0, 50), np.empty(0, np.int64), np.arange(60, 110)]
    ranking = recommend(
        policy, trie, past, 7, thoughts=thoughts, exclude=exclude, beam=None, exact=True
    )
    scores = all_scores(policy, past, thoughts)
    for row, items in enumerate(exclude):
        scores[row, items] = -torch.inf
    expected, items = scores.topk(7)
    assert torch.equal(ranking.items, items)
    torch.testing.assert_close(ranking.scores, expected, atol=1e-4, rtol=1e-4)


def test_exact_search_finds_what_a_narrow_beam_loses(monkeypatch):
    monkeypatch.setattr(beam, "WIDTH", 1)
    policy = distinct_policy()
    trie, past = catalogue(policy), histories(len(policy.item_tokens), [4] * 40)
    best = recommend(policy, trie, past, 5, beam=None, exact=True)
    narrow = recommend(policy, trie, past, 5, beam=5, exact=True)
    assert (best.scores >= narrow.scores - 1e-4).all()
    assert not torch.equal(best.items, narrow.items)
    wide = recommend(policy, trie, past, 5, beam=200, exact=True)
    assert torch.equal(best.items, wide.items)


def test_as_many_items_come_as_are_asked_for_while_the_catalogue_has_them():
    policy = distinct_policy(think_codebook=3)
    policy.item_tokens = policy.item_tokens[:40]
    past, trie = histories(40, [6, 3]), catalogue(policy)
    some = PolicyRecommender(policy, trie, think=2, beam=5)
    for k, barred in ((30, 0), (60, 25)):
        found = some.recommend(past, k, exclude=[np.arange(barred)] * 2)
        for items, scores in zip(found.items.tolist(), found.scores.tolist(), strict=True):
            there = [item for item in items if item >= 0]
            assert len(set(there)) == len(there) == min(k, 40 - barred) and min(there) >= barred
            assert scores[: len(there)] == sorted(scores[: len(there)], reverse=True)


def test_a_narrow_beam_is_narrow_in_an_evaluation_too():
    policy = distinct_policy()
    past, trie = histories(40, [6, 3]), catalogue(policy)
    found = PolicyRecommender(policy, trie, beam=5, narrow=True).recommend(past, 9)
    ranking = recommend(policy, trie, past, 5, beam=5)
    assert torch.equal(found.items[:, :5], ranking.items) and (found.items[:, 5:] == -1).all()
