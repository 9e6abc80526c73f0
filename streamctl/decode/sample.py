"""Rollouts: sampled thoughts and codes with the log-probabilities they were drawn with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamctl.decode.think import draw, sample_thoughts, think_logits
from streamctl.device import autocast
from streamctl.distributed import Share
from streamctl.kernels import CsrTrie
from streamctl.model.policy import Encoded, Policy
from streamctl.tokenizer.trie import PrefixTrie


@dataclass(frozen=True)
class Rollout:
    """A GRPO group for each user.

    Codes are sampled from the whole vocabulary, so that a rollout may be no item at all, or from
    the catalogue's.
    """

    think: torch.Tensor  # (B, G, l) int64 think tokens
    codes: torch.Tensor  # (B, G, m) int64 tokens sampled after BOS
    logprobs: torch.Tensor  # (B, G, l + m) float32, of each sampled token when it was drawn
    legal: torch.Tensor | None = None  # (B, G, m, V) bool, what codes were drawn from; None: all

    @property
    def group(self) -> int:
        return self.codes.shape[1]


@torch.no_grad()
def rollout(
    policy: Policy,
    history: torch.Tensor,
    *,
    group: int,
    think: int,
    temperature: float = 1.0,
    seed: int = 0,
    bf16: bool = True,
    trie: PrefixTrie | None = None,
    share: Share | None = None,
) -> Rollout:
    """Sample `group` thoughts and items for each user; the user is encoded once.

    Args:
        history: (B, H) int64 items, oldest first, -1 on the right.
        think: l, think tokens.
        temperature: of the softmax that tokens are drawn from.
        seed: the same seed gives the same rollouts.
        trie: draw codes among the legal continuations alone, so that every rollout is an item.
        share: which users of a batch in several processes these are.

    The policy's dropout must be off (`policy.eval()`), or the log-probabilities are another
    model's.
    """
    device = policy.item_tokens.device
    generator = torch.Generator().manual_seed(seed)
    with autocast(device, bf16):
        encoded = policy.encode(history.to(device))
        feed = torch.full((len(history), group, 1), policy.tokens.BOS, device=device)
        past, thoughts, logprobs = None, feed[..., :0], []
        if think:
            thoughts, steps, past = sample_thoughts(
                policy, encoded, think, group, temperature=temperature, generator=generator,
                share=share,
            )  # fmt: skip
            logprobs.append(steps)
            feed = torch.cat([thoughts[..., -1:], feed], -1)
        codes, legal = [], []
        node = torch.zeros_like(feed[..., 0])
        for _ in range(policy.tokens.levels):
            hidden, past = policy.extend(encoded, feed, "slow", past)
            scores = policy.logits(hidden[:, :, -1]).float() / temperature
            if trie is not None:
                below = children(trie.on(device), node, policy.tokens.size)
                legal.append(below >= 0)
                scores = scores.masked_fill(~legal[-1], -torch.inf)
            distribution = torch.log_softmax(scores, -1)
            drawn = draw(distribution, generator, share)
            if trie is not None:
                node = below.gather(-1, drawn[..., None])[..., 0]
            codes.append(drawn)
            logprobs.append(distribution.gather(-1, drawn[..., None]))
            feed = drawn[..., None]
    return Rollout(
        thoughts,
        torch.stack(codes, -1),
        torch.cat(logprobs, -1),
        torch.stack(legal, 2) if legal else None,
    )


def children(trie: CsrTrie, node: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The node that each token leads to: node (...) int64 -> (..., V) int64, -1 where illegal."""
    flat = node.flatten()
    first, count = trie.child_start[flat], trie.child_start[flat + 1] - trie.child_start[flat]
    row = torch.repeat_interleave(torch.arange(len(flat), device=node.device), count)
    edge = torch.arange(len(row), device=node.device) + (first - count.cumsum(0) + count)[row]
    below = torch.full((len(flat), vocabulary), -1, dtype=torch.int64, device=node.device)
    below[row, trie.child_token[edge]] = trie.child_node[edge]
    return below.view(*node.shape, vocabulary)


def rollout_logprobs(
    policy: Policy, encoded: Encoded, rollouts: Rollout, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, G, l + m) float32 of the sampled tokens by teacher forcing, with
    gradients, and the decoder's states (B, G, l + m, d) at the positions that predicted them."""
    think, codes = rollouts.think, rollouts.codes
    length = think.shape[-1]
    inputs = torch.cat([policy.around(think), codes[..., :-1]], -1)
    hidden, _ = policy.extend(encoded, inputs)
    parts = []
    if length:
        low, _ = policy.tokens.think_range
        distribution = think_logits(policy, hidden[:, :, :length], temperature)
        parts.append(distribution.gather(-1, (think - low)[..., None])[..., 0])
        # The position of the last think token predicts BOS, which is given.
        hidden = torch.cat([hidden[:, :, :length], hidden[:, :, length + 1 :]], 2)
    scores = policy.logits(hidden[:, :, length:]).float() / temperature
    if rollouts.legal is not None:
        scores = scores.masked_fill(~rollouts.legal, -torch.inf)
    parts.append(torch.log_softmax(scores, -1).gather(-1, codes[..., None])[..., 0])
    return torch.cat(parts, -1), hidden
