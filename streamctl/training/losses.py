"""Losses of the three stages (Eqs. 10-11 and 14-20) as functions of tensors.

Sums over steps are the paper's; sums over the batch are means here, so that the weights of
Eq. 19 and the learning rate do not depend on the batch size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from streamctl.model.policy import IGNORED, Policy

ADVANTAGE_EPS = 1e-4


def sequence_loss(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy summed over an answer's positions, mean over the batch (Eqs. 10-11).

    Args:
        logits: (B, T, V) float, p(c) of Eq. 11.
        labels: (B, T) int64 tokens, `model.policy.IGNORED` where nothing is predicted.
        temperature: tau of Eq. 11.

    Returns:
        scalar float32.
    """
    flat = logits.flatten(0, 1).float() / temperature
    total = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / len(labels)


def answer_loss(
    policy: Policy, hidden: torch.Tensor, items: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of an item's codes, summed over them, mean over the batch (Eqs. 10-11); the
    last m positions of hidden (B, T, d) predict them."""
    last = hidden[:, -policy.tokens.levels :]
    return -policy.answer_logprobs(last, items, temperature=temperature).sum(-1).mean()


def step_weights(steps: int) -> torch.Tensor:
    """w_j of Eq. 14 for the states s_0..s_l: proportional to j + 1, summing to one. (steps,)"""
    weights = torch.arange(1, steps + 1, dtype=torch.float32)
    return weights / weights.sum()


def state_target_loss(
    states: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor,
    temperature: float = 0.07,
    first: int = 0,
) -> torch.Tensor:
    """Each state against its target among the batch's targets (Eq. 14).

    Cosine similarity over a temperature stands for the paper's dot product; s_0 takes part, and
    rows of the same item are no negatives of each other.

    Args:
        states: (B, l + 1, d) s_0..s_l.
        targets: (T, d) t of each row of the whole batch, T = B unless several processes share it;
            no gradient is stopped here.
        items: (T,) int64 which item each target is.
        first: row of the whole batch that the states begin at.

    Returns:
        scalar float32: weighted over steps (the weights sum to one), mean over the batch.
    """
    states = F.normalize(states.float(), dim=-1)
    targets = F.normalize(targets.float(), dim=-1)
    logits = torch.einsum("bjd,cd->jbc", states, targets) / temperature
    size = len(states)
    own = torch.arange(first, first + size, device=items.device)
    same = items[own, None] == items[None, :]
    same.scatter_(1, own[:, None], False)
    logits = logits.masked_fill(same, -torch.inf)
    label = own.expand(len(logits), size)
    per_step = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
    weights = step_weights(len(logits)).to(per_step.device)
    return (per_step.view(len(logits), size).mean(1) * weights).sum()


def quantization_loss(
    residuals: torch.Tensor,
    tokens: torch.Tensor,
    beta: float = 0.25,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """|sg[r] - o|^2 + beta |r - sg[o]|^2 (Eq. 15, whose leading minus is a misprint).

    Args:
        residuals: (B, l, d) r_1..r_l.
        tokens: (B, l, d) embeddings of the tokens o_1..o_l.
        real: (B, l) bool, the steps that count; None for all.

    Returns:
        scalar float32: summed over steps and dimensions, mean over the batch.
    """
    residuals, tokens = residuals.float(), tokens.float()
    codebook = (residuals.detach() - tokens).square()
    commitment = (residuals - tokens.detach()).square()
    each = (codebook + beta * commitment).sum(2)
    return (each if real is None else each * real).sum(1).mean()


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """Preference of the target over a look-alike, relative to the direct decoder (Eqs. 16-18).

    Args:
        chosen, rejected: (B,) log pi_theta(y | x, y_think) of the target and the look-alike.
        reference_chosen, reference_rejected: (B,) log pi_ref(y | x), without gradient.

    Returns:
        scalar: mean over the batch.
    """
    plus = chosen - reference_chosen  # Eq. 16
    minus = rejected - reference_rejected  # Eq. 17
    return -F.logsigmoid(beta * (plus - minus)).mean()


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + eps) within each group of rewards (B, G); std over the group itself (no
    Bessel). Exactly zero in a group of equal rewards."""
    centred = rewards - rewards.mean(1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True).sqrt() + ADVANTAGE_EPS)
    return scaled.masked_fill(flat, 0.0)


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """k3 of KL(pi_theta || pi_ref) at tokens sampled from pi_theta: e^x - x - 1 with
    x = log pi_ref - log pi_theta. Never negative, zero where the two agree. Same shape."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def grpo_loss(
    logprobs: torch.Tensor,
    behaviour: torch.Tensor,
    reference: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip: float = 0.2,
    kl_weight: float = 1e-3,
    ratio: Literal["sequence", "token"] = "sequence",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The negative of Eq. 20.

    Args:
        logprobs: (B, G, T) of the sampled tokens under the policy in training.
        behaviour: (B, G, T) under the policy that sampled them.
        reference: (B, G, T) under the frozen reference.
        advantage: (B, G).
        clip: epsilon of Eq. 20.
        kl_weight: beta of Eq. 20.
        ratio: `sequence` is Eq. 20's letter, one ratio a rollout (products over its tokens) and
            the KL summed over them; `token` clips each token's ratio and takes means over tokens.

    Returns:
        (scalar loss, detached metrics: ratio, clipped share, kl a rollout).
    """
    difference = logprobs - behaviour
    kl = kl_estimate(logprobs, reference)
    if ratio == "sequence":
        ratios = difference.sum(2).exp()
        weight = advantage
        penalty = kl.sum(2)
    else:
        ratios = difference.exp()
        weight = advantage[:, :, None]
        penalty = kl
    limited = ratios.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratios * weight, limited * weight) - kl_weight * penalty
    metrics = {
        "ratio": ratios.detach().mean(),
        "clipped": (ratios != limited).float().mean(),
        "kl": kl.detach().sum(2).mean(),
    }
    return -objective.mean(), metrics
