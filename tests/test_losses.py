"""Equations 10, 11 and 14-20, worked by hand or by a few independent lines in float64."""

import math

import numpy as np
import pytest
import torch

from streamctl.model.policy import IGNORED
from streamctl.training import losses


def softmax64(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def test_eq_10_pretraining_loss_sums_over_every_position():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    labels = torch.tensor([[1, 2]])
    assert losses.sequence_loss(logits, labels).item() == pytest.approx(
        -math.log(0.25) - math.log(0.8), rel=1e-6
    )


def test_eq_10_a_position_that_is_given_is_not_scored():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.2, 0.8]]]))
    labels = torch.tensor([[IGNORED, 0], [IGNORED, 1]])
    assert losses.sequence_loss(logits, labels).item() == pytest.approx(
        -(math.log(0.9) + math.log(0.8)) / 2, rel=1e-6
    )


def test_eq_11_temperature_divides_the_logits():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    labels = np.array([[0, 4, 2], [1, 1, 3]])
    want = -sum(
        math.log(softmax64(logits[b, t] / 0.7)[labels[b, t]]) for b in range(2) for t in range(3)
    )
    found = losses.sequence_loss(torch.tensor(logits), torch.tensor(labels), temperature=0.7)
    assert found.item() == pytest.approx(want / 2, rel=1e-6)


def test_eq_14_state_target_contrastive_loss():
    random = np.random.default_rng(1)
    states, targets = random.normal(size=(3, 3, 4)), random.normal(size=(3, 4))
    items = [7, 8, 7]  # rows 0 and 2 share an item: no negatives of each other

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    want = 0.0
    for j, weight in enumerate((1 / 6, 2 / 6, 3 / 6)):
        for i in range(3):
            logit = {
                c: cosine(states[i, j], targets[c]) / 0.07
                for c in range(3)
                if c == i or items[c] != items[i]
            }
            want -= weight * (logit[i] - math.log(sum(math.exp(v) for v in logit.values()))) / 3
    found = losses.state_target_loss(
        torch.tensor(states), torch.tensor(targets), torch.tensor(items)
    )
    assert found.item() == pytest.approx(want, rel=1e-5)


def test_eq_14_later_steps_weigh_more():
    assert losses.step_weights(4).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_eq_14_states_at_their_targets_cost_nothing():
    targets = torch.eye(3)
    items = torch.arange(3)
    at_target = losses.state_target_loss(targets[:, None].repeat(1, 2, 1), targets, items)
    away = losses.state_target_loss(targets.roll(1, 0)[:, None].repeat(1, 2, 1), targets, items)
    assert at_target.item() < 1e-4 and away.item() > 10


def test_eq_15_quantisation_loss_and_its_gradients():
    residual = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], requires_grad=True)
    token = torch.tensor([[[3.0, 2.0]], [[0.0, 1.0]]], requires_grad=True)
    loss = losses.quantization_loss(residual, token, beta=0.25)
    assert loss.item() == pytest.approx((1.25 * 4 + 1.25 * 1) / 2)  # positive: no leading minus
    loss.backward()
    # d/do |sg[r] - o|^2 = 2 (o - r); d/dr beta |r - sg[o]|^2 = 2 beta (r - o); halved by B = 2
    assert token.grad.tolist() == [[[2.0, 0.0]], [[0.0, 1.0]]]
    assert residual.grad.tolist() == [[[-0.5, 0.0]], [[0.0, -0.25]]]


def test_eq_16_17_18_dpo_loss():
    chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -2.0])
    reference_chosen, reference_rejected = torch.tensor([-2.0, -2.0]), torch.tensor([-2.5, -3.0])
    plus = (1.0, -2.0)  # Eq. 16
    minus = (-0.5, 1.0)  # Eq. 17
    want = 0.0
    for a, b in zip(plus, minus, strict=True):
        want -= math.log(math.exp(0.1 * a) / (math.exp(0.1 * a) + math.exp(0.1 * b))) / 2
    found = losses.dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    assert found.item() == pytest.approx(want, rel=1e-6)


def test_eq_16_is_zero_for_a_policy_that_equals_its_reference():
    logprob = torch.tensor([-3.0])
    assert losses.dpo_loss(logprob, logprob, logprob, logprob).item() == pytest.approx(math.log(2))


def test_eq_17_a_likelier_look_alike_costs_more():
    base = torch.tensor([-3.0])
    low, high = (losses.dpo_loss(base, base + d, base, base).item() for d in (-1.0, 1.0))
    assert low < math.log(2) < high


def test_eq_18_gradient_is_beta_times_the_probability_of_the_wrong_order():
    chosen = torch.tensor([-1.0], requires_grad=True)
    losses.dpo_loss(chosen, torch.tensor([-2.0]), torch.zeros(1), torch.zeros(1), 0.5).backward()
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.exp(0.5)), rel=1e-6)


def test_advantages_of_a_hand_made_group():
    # mean 2, deviations -1 -1 0 2, variance 6 / 4
    found = losses.advantages(torch.tensor([[1.0, 1.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0]]))
    std = math.sqrt(1.5) + losses.ADVANTAGE_EPS
    assert found[0].tolist() == pytest.approx([-1 / std, -1 / std, 0, 2 / std], rel=1e-5)
    assert found[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def grpo_transcription(logprobs, behaviour, reference, advantage, clip, kl_weight):
    """Eq. 20 rollout by rollout."""
    total = 0.0
    for b in range(logprobs.shape[0]):
        group = 0.0
        for i in range(logprobs.shape[1]):
            ratio = torch.exp(sum(logprobs[b, i]) - sum(behaviour[b, i]))
            clipped = torch.clip(ratio, 1 - clip, 1 + clip)
            a = advantage[b, i]
            surrogate = torch.min(ratio * a, clipped * a)
            log_ratios = [r - p for r, p in zip(reference[b, i], logprobs[b, i], strict=True)]
            kl = sum(torch.exp(x) - x - 1 for x in log_ratios)
            group = group + surrogate - kl_weight * kl
        total = total + group / logprobs.shape[1]
    return -total / logprobs.shape[0]


def test_eq_20_grpo_value_and_gradient():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = (-random(3, 4, 5).abs()).requires_grad_()
    behaviour = logprobs.detach() + 0.1 * random(3, 4, 5)
    reference = logprobs.detach() + 0.3 * random(3, 4, 5)
    advantage = random(3, 4)
    loss, metrics = losses.grpo_loss(
        logprobs, behaviour, reference, advantage, clip=0.2, kl_weight=0.05
    )
    want = grpo_transcription(logprobs, behaviour, reference, advantage, 0.2, 0.05)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert 0 < metrics["clipped"] < 1 and metrics["kl"] > 0
    found = torch.autograd.grad(loss, logprobs)[0]
    expected = torch.autograd.grad(want, logprobs)[0]
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_eq_20_at_the_sampling_policy_is_the_policy_gradient():
    logprobs = torch.full((1, 2, 3), -1.0, requires_grad=True)
    fixed = logprobs.detach()
    loss, metrics = losses.grpo_loss(logprobs, fixed, fixed, torch.tensor([[1.0, -1.0]]))
    assert metrics["ratio"] == 1 and metrics["kl"] == 0 and metrics["clipped"] == 0
    loss.backward()
    assert logprobs.grad[0, 0].tolist() == [-0.5] * 3 and logprobs.grad[0, 1].tolist() == [0.5] * 3


def test_eq_20_token_ratios_clip_each_token():
    behaviour = torch.zeros(1, 1, 2)
    logprobs = torch.tensor([[[0.5, -0.1]]])
    loss, metrics = losses.grpo_loss(logprobs, behaviour, logprobs, torch.ones(1, 1), ratio="token")
    assert loss.item() == pytest.approx(-(1.2 + math.exp(-0.1)) / 2)
    assert metrics["clipped"].item() == 0.5
