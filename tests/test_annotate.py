"""Iterative inference, beside a slow transcription of the paper, and the health of its labels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_model import histories, small_policy

from streamctl.training.letter.annotate import collapsed, describe, infer, perplexity, think_vectors


def awake_policy(seed: int = 0):
    """A small policy whose heads have weights that matter: at first they are the identity."""
    policy = small_policy("items", seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in policy.thinker.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


def head(module, x):
    """x + W2 gelu(W1 x + b1) + b2, the erf form."""
    inner = module.wi.weight @ x + module.wi.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    return x + module.wo.weight @ inner + module.wo.bias


def unit(x):
    return x / x.norm()


@torch.no_grad()
def transcription(policy, history, target, length, normalised):
    """Sec. 2.3.1 for one user, the whole decoder run anew at every step, in float64."""
    policy = copy.deepcopy(policy).double()
    encoded = policy.encode(history[None])
    learned = policy.item_tokens[target]
    t = torch.stack([policy.shared.weight[token] for token in learned]).mean(0)
    d = [encoded.states[0].mean(0)]
    s = [head(policy.thinker.state, d[0])]
    low, high = policy.tokens.think_range
    tokens = [policy.tokens.THINK]
    for _ in range(length):
        gap = unit(t) - unit(s[-1]) if normalised else t - s[-1]
        r = head(policy.thinker.residual_head, gap)  # Eq. 13
        distances = []
        for token in range(low, high):
            e = policy.shared.weight[token]
            distances.append(((r - (unit(e) if normalised else e)) ** 2).sum())
        tokens.append(low + int(torch.stack(distances).argmin()))  # Eq. 12
        hidden = policy.decode(encoded, torch.tensor([tokens]))
        d.append(hidden[0, -1])
        s.append(head(policy.thinker.state, torch.stack(d).sum(0)))
    return tokens[1:], torch.stack(s)


@pytest.mark.parametrize("mode", ["normalised", "literal"])
def test_eq_12_and_eq_13_step_by_step_as_the_paper_has_them(mode):
    policy = awake_policy()
    past = histories(40, [6, 6, 6, 6, 6])
    targets = torch.tensor([3, 0, 39, 7, 7])
    with torch.no_grad():
        found = infer(policy, policy.encode(past), targets, 4, mode)
    for row in range(len(past)):
        tokens, states = transcription(policy, past[row], targets[row], 4, mode == "normalised")
        assert found.chosen[row].tolist() == tokens
        torch.testing.assert_close(found.states[row].double(), states, atol=1e-5, rtol=1e-5)


def test_eq_12_takes_the_nearest_legal_token():
    policy = awake_policy()
    past = histories(40, [4] * 6)
    with torch.no_grad():
        found = infer(policy, policy.encode(past), torch.arange(6), 3)
    low, _ = policy.tokens.think_range
    vectors = think_vectors(policy).double()
    chosen = torch.cdist(found.residuals.double(), vectors[None]).argmin(-1)
    assert torch.equal(found.chosen - low, chosen)


def test_thoughts_lead_to_the_target_they_were_derived_from():
    policy = awake_policy()
    past = histories(40, [5]).expand(2, -1)
    with torch.no_grad():
        found = infer(policy, policy.encode(past), torch.tensor([1, 2]), 4)
    assert found.chosen[0].tolist() != found.chosen[1].tolist()


def test_no_gradient_reaches_the_target():
    policy = awake_policy()
    found = infer(policy, policy.encode(histories(40, [5])), torch.tensor([1]), 2)
    assert not found.target.requires_grad and found.residuals.requires_grad


def test_perplexity_counts_tokens_in_effective_use():
    assert perplexity(np.array([0, 1, 2, 3]), 8) == pytest.approx(4)
    assert perplexity(np.zeros(10, int), 8) == pytest.approx(1)


def test_labels_that_are_all_alike_have_collapsed():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 500, 2000)
    varied = describe(rng.integers(0, 256, (2000, 4)), 1024, targets)
    assert not varied["collapsed"] and varied["distinct_chains"] > 1990
    alike = describe(rng.integers(0, 3, (2000, 4)), 1024, targets)
    assert alike["collapsed"]
    few_chains = describe(np.repeat(rng.integers(0, 256, (20, 4)), 100, 0), 256, targets)
    assert few_chains["perplexity"] > 256 / 20 and collapsed(few_chains)
