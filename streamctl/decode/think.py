"""Thinking: think tokens, the states they lead to, and the cache they leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamctl.distributed import Share
from streamctl.model.frozen import Branches
from streamctl.model.past import Past
from streamctl.model.policy import DecoderName, Encoded, Policy


@dataclass
class Thought:
    """W thoughts of each user, ready for codes.

    Attributes:
        tokens: (B, W, l) int64.
        logprob: (B, W) float32, their log-probability; 0 for given ones.
        hidden: (B, W, l, d), the decoder's states at the think tokens.
        past: the decoder's cache after the last think token; None when l = 0.
    """

    tokens: torch.Tensor
    logprob: torch.Tensor
    hidden: torch.Tensor
    past: Past | Branches | None


def think_logits(policy: Policy, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities over the legal think tokens: hidden (..., d) -> (..., think tokens)."""
    low, high = policy.tokens.think_range
    return torch.log_softmax(policy.logits(hidden)[..., low:high].float() / temperature, -1)


def no_thought(encoded: Encoded) -> Thought:
    """l = 0: the decoder begins with BOS."""
    states = encoded.states
    empty = torch.empty(len(encoded), 1, 0, dtype=torch.int64, device=states.device)
    zero = torch.zeros(len(encoded), 1, device=states.device)
    return Thought(empty, zero, states.new_empty(len(encoded), 1, 0, states.shape[-1]), None)


def given_thought(
    policy: Policy, encoded: Encoded, tokens: torch.Tensor, decoder: DecoderName
) -> Thought:
    """Thoughts (B, l) that come from elsewhere: annotation, chance, another model."""
    begin = torch.full_like(tokens[:, :1], policy.tokens.THINK)
    inputs = torch.cat([begin, tokens], 1)[:, None]
    hidden, past = policy.extend(encoded, inputs, decoder)
    zero = torch.zeros(len(encoded), 1, device=tokens.device)
    return Thought(tokens[:, None], zero, hidden[:, :, 1:], past)


def beam_thoughts(
    policy: Policy, encoded: Encoded, length: int, width: int, decoder: DecoderName
) -> Thought:
    """The `width` most likely thoughts by beam search; width 1 is greedy thinking."""
    low, high = policy.tokens.think_range
    device = encoded.states.device
    feed = torch.full((len(encoded), 1, 1), policy.tokens.THINK, device=device)
    tokens = feed.new_empty(len(encoded), 1, 0)
    score = torch.zeros(len(encoded), 1, device=device)
    states: list[torch.Tensor] = []
    past: Past | Branches | None = None
    for step in range(length):
        hidden, past = policy.extend(encoded, feed, decoder, past)
        total = score[..., None] + think_logits(policy, hidden[:, :, -1])
        # Only THINK is common to all branches; beyond it each has its own cache.
        past = past.share() if step == 0 else past
        score, place = total.flatten(1).topk(min(width, total[0].numel()), -1)
        parent, token = place // (high - low), place % (high - low) + low
        past = past.reorder(parent)
        tokens = torch.cat([_follow(tokens, parent), token[..., None]], -1)
        states = [_follow(state, parent) for state in states]
        if step:
            states.append(_follow(hidden[:, :, -1], parent))
        feed = token[..., None]
    hidden, past = policy.extend(encoded, feed, decoder, past)
    states.append(hidden[:, :, -1])
    return Thought(tokens, score, torch.stack(states, 2), past)


def converged_thoughts(
    policy: Policy, encoded: Encoded, length: int, margin: float, decoder: DecoderName
) -> list[tuple[torch.Tensor, Thought]]:
    """Greedy thoughts that end early: a user stops once a token hardly moves the state.

    A thought has converged when the cosine of s_i and s_{i-1} is 1 - margin or more.

    Args:
        length: l, the most tokens a thought may have.

    Returns:
        for each thought length that occurs: the users (n,) int64 and their thoughts.
    """
    low, _ = policy.tokens.think_range
    device = encoded.states.device
    users = torch.arange(len(encoded), device=device)
    feed = torch.full((len(encoded), 1, 1), policy.tokens.THINK, device=device)
    tokens = feed.new_empty(len(encoded), 1, 0)
    score = torch.zeros(len(encoded), 1, device=device)
    states = encoded.states.new_empty(len(encoded), 1, 0, encoded.states.shape[-1])
    hidden, past = policy.extend(encoded, feed, decoder)
    total = encoded.mean().float()
    state = policy.thinker.state(total)
    groups = []
    for step in range(length):
        chance, place = think_logits(policy, hidden[:, :, -1]).max(-1)
        score = score + chance
        feed = place[..., None] + low
        tokens = torch.cat([tokens, feed], -1)
        hidden, past = policy.extend(encoded, feed, decoder, past)
        states = torch.cat([states, hidden], 2)
        total = total + hidden[:, 0, -1].float()
        before, state = state, policy.thinker.state(total)
        still = torch.cosine_similarity(before.float(), state.float()) >= 1 - margin
        if step == length - 1:
            still = torch.ones_like(still)
        if not bool(still.any()):
            continue
        done, rest = still.nonzero()[:, 0], (~still).nonzero()[:, 0]
        thought = Thought(tokens[done], score[done], states[done], past.rows(done))
        groups.append((users[done], thought))
        if not len(rest):
            break
        users, tokens, score, states = users[rest], tokens[rest], score[rest], states[rest]
        hidden, past, encoded = hidden[rest], past.rows(rest), encoded.rows(rest)
        total, state = total[rest], state[rest]
    return groups


def sample_thoughts(
    policy: Policy,
    encoded: Encoded,
    length: int,
    width: int,
    decoder: DecoderName,
    *,
    temperature: float,
    generator: torch.Generator,
    share: Share | None = None,
) -> tuple[Thought, torch.Tensor]:
    """`width` sampled thoughts of each user, and each token's log-probability (B, W, l)."""
    low, _ = policy.tokens.think_range
    device = encoded.states.device
    feed = torch.full((len(encoded), 1, 1), policy.tokens.THINK, device=device)
    tokens, logprobs, states = [], [], []
    past: Past | Branches | None = None
    for step in range(length):
        hidden, past = policy.extend(encoded, feed, decoder, past)
        distribution = think_logits(policy, hidden[:, :, -1], temperature)
        if step == 0:
            past = past.share()
            distribution = distribution.expand(-1, width, -1)
        else:
            states.append(hidden[:, :, -1])
        drawn = draw(distribution, generator, share)
        tokens.append(drawn + low)
        logprobs.append(distribution.gather(-1, drawn[..., None])[..., 0])
        feed = tokens[-1][..., None]
    hidden, past = policy.extend(encoded, feed, decoder, past)
    states.append(hidden[:, :, -1])
    steps = torch.stack(logprobs, -1)
    thought = Thought(torch.stack(tokens, -1), steps.sum(-1), torch.stack(states, 2), past)
    return thought, steps


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


def _follow(x: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """Branch w takes the value of old branch parent[:, w]."""
    return x[torch.arange(len(parent), device=parent.device)[:, None], parent]
