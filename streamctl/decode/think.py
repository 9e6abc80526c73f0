"""Think tokens of the vocabulary (the paper's letter): chosen greedily or sampled."""

from __future__ import annotations

import torch

from streamctl.distributed import Share
from streamctl.model.frozen import Branches
from streamctl.model.past import Past
from streamctl.model.policy import Encoded, Policy


def think_logits(policy: Policy, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities over the legal think tokens: hidden (..., d) -> (..., think tokens)."""
    low, high = policy.tokens.think_range
    return torch.log_softmax(policy.logits(hidden)[..., low:high].float() / temperature, -1)


def greedy_thought(policy: Policy, encoded: Encoded, length: int) -> torch.Tensor:
    """The likeliest think tokens, one after the other: (B, l) int64."""
    low, _ = policy.tokens.think_range
    feed = torch.full((len(encoded), 1, 1), policy.tokens.THINK, device=encoded.states.device)
    tokens, past = [feed[:, 0, :0]], None
    for _ in range(length):
        hidden, past = policy.extend(encoded, feed, past=past)
        feed = think_logits(policy, hidden[:, :, -1]).argmax(-1, keepdim=True) + low
        tokens.append(feed[:, 0])
    return torch.cat(tokens, 1)


def sample_thoughts(
    policy: Policy,
    encoded: Encoded,
    length: int,
    width: int,
    *,
    temperature: float,
    generator: torch.Generator,
    share: Share | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Past | Branches]:
    """`width` sampled thoughts of each user.

    Returns:
        tokens (B, W, l) int64, their log-probabilities (B, W, l), and the past before the last one.
    """
    low, _ = policy.tokens.think_range
    feed = torch.full((len(encoded), 1, 1), policy.tokens.THINK, device=encoded.states.device)
    tokens, logprobs, past = [], [], None
    for step in range(length):
        hidden, past = policy.extend(encoded, feed, "slow", past)
        distribution = think_logits(policy, hidden[:, :, -1], temperature)
        if step == 0:  # only THINK is common to all branches
            past = past.share()
            distribution = distribution.expand(-1, width, -1)
        drawn = draw(distribution, generator, share)
        logprobs.append(distribution.gather(-1, drawn[..., None])[..., 0])
        feed = drawn[..., None] + low
        tokens.append(feed[..., 0])
    return torch.stack(tokens, -1), torch.stack(logprobs, -1), past


def draw(
    logprobs: torch.Tensor, generator: torch.Generator, share: Share | None = None
) -> torch.Tensor:
    """A sample of each distribution: (B, ..., n) normalised log-probabilities -> (B, ...) int64.

    By inversion of the cumulative distribution with one uniform number a row, drawn on the CPU,
    so that the same seed gives the same samples on every device. `share` says which rows of a
    batch in several processes these are: each row gets the numbers it would get in one.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    share = share or Share.whole(len(logprobs))
    shape = (share.total, *logprobs.shape[1:-1])
    uniform = share.of(torch.rand(shape, dtype=torch.float64, generator=generator))
    level = uniform.to(logprobs.device)[..., None] * cumulative[..., -1:]
    chosen = torch.searchsorted(cumulative, level, right=True)[..., 0]
    return chosen.clamp(max=logprobs.shape[-1] - 1)
