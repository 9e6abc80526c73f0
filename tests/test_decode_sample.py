"""Rollouts are drawn from the model's own distribution, and say with which probability."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_model import histories, small_policy

from streamctl.decode import Rollout, rollout, rollout_logprobs
from streamctl.decode.sample import children, draw
from streamctl.tokenizer.trie import PrefixTrie


def test_behaviour_log_probabilities_are_those_of_teacher_forcing():
    policy = small_policy("items", think_codebook=5)
    past = histories(40, [5, 5, 5])
    for length, temperature in itertools.product((0, 3), (1.0, 0.7)):
        found = rollout(
            policy, past, group=6, think=length, temperature=temperature, seed=2, bf16=False
        )
        assert found.think.shape == (3, 6, length) and found.codes.shape == (3, 6, 3)
        with torch.no_grad():
            forced, hidden = rollout_logprobs(
                policy, policy.encode(past), found, temperature=temperature
            )
        assert hidden.shape == (3, 6, length + 3, 24)
        torch.testing.assert_close(found.logprobs, forced, atol=1e-4, rtol=1e-4)


def test_rollouts_are_a_function_of_the_seed():
    policy = small_policy("items")
    past = histories(40, [5, 2])
    first, again, other = (rollout(policy, past, group=8, think=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.think, again.think)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.codes, other.codes)


def test_thoughts_are_legal_and_codes_free():
    policy = small_policy("items", think_codebook=5)
    found = rollout(policy, histories(40, [5] * 20), group=32, think=2, seed=0)
    low, high = policy.tokens.think_range
    assert found.think.min() >= low and found.think.max() < high
    first, last = policy.tokens.level_range(0)
    assert ((found.codes[..., 0] < first) | (found.codes[..., 0] >= last)).any()


@torch.no_grad()
def test_sampled_sequences_follow_the_exact_distribution():
    """Chi-square over every (thought, code) of a tiny model."""
    policy = small_policy("items", think_codebook=3)
    policy.item_tokens = policy.item_tokens[:, :3]
    past = histories(40, [4])
    found = rollout(policy, past, group=20_000, think=1, seed=11, bf16=False)
    low, high = policy.tokens.think_range
    size = policy.tokens.size
    encoded = policy.encode(past)
    start = torch.tensor([[policy.tokens.THINK]])
    thought = torch.log_softmax(policy.logits(policy.decode(encoded, start))[0, 0, low:high], -1)
    expected = torch.empty(high - low, size)
    for token in range(low, high):
        inputs = torch.tensor([[policy.tokens.THINK, token, policy.tokens.BOS]])
        code = torch.log_softmax(policy.logits(policy.decode(encoded, inputs))[0, -1], -1)
        expected[token - low] = (thought[token - low] + code).exp()
    seen = np.bincount(
        ((found.think[0, :, 0] - low) * size + found.codes[0, :, 0]).numpy(),
        minlength=expected.numel(),
    )
    wanted = expected.flatten().double().numpy() * 20_000
    rare = wanted < 5
    if rare.any():
        seen = np.append(seen[~rare], seen[rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
    assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_draw_never_takes_what_has_no_probability():
    table = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(4000, 5)
    drawn = draw(table, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5).tolist()
    assert counts[0] == counts[2] == counts[4] == 0
    assert abs(counts[1] - 2000) < 150


def test_rollouts_inside_the_catalogue_are_items_with_renormalised_probabilities():
    policy = small_policy("items")
    trie = PrefixTrie(policy.item_tokens.numpy())
    past = histories(40, [5, 5])
    found = rollout(policy, past, group=64, think=2, seed=3, bf16=False, trie=trie)
    known = {tuple(row) for row in policy.item_tokens.tolist()}
    assert all(tuple(row) in known for row in found.codes.flatten(0, 1).tolist())
    with torch.no_grad():
        forced, _ = rollout_logprobs(policy, policy.encode(past), found)
    torch.testing.assert_close(found.logprobs, forced, atol=1e-4, rtol=1e-4)
    # Given a thought, the probabilities of all items of the catalogue sum to one.
    first = found.legal[:, :, 0]
    assert torch.equal(first[0, 0].nonzero()[:, 0], policy.item_tokens[:, 0].unique())
    total = 0.0
    for codes in sorted(known):
        rows = torch.tensor(codes).expand(1, 1, -1)
        node, legal = trie.root, []
        for token in codes:
            legal.append(children(trie.on("cpu"), torch.tensor([[node]]), policy.tokens.size) >= 0)
            node = trie.child(node, token)
        one = Rollout(found.think[:1, :1], rows, torch.zeros(1, 1, 5), torch.stack(legal, 2))
        with torch.no_grad():
            total += rollout_logprobs(policy, policy.encode(past[:1]), one)[0][0, 0, 2:].sum().exp()
    assert float(total) == pytest.approx(1, abs=1e-4)
