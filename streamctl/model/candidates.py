"""log P of many candidate items for many thoughts, each prefix that candidates share read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from streamctl.model.policy import Encoded, Policy


def thoughts_logprob(
    policy: Policy, encoded: Encoded, items: torch.Tensor, think: torch.Tensor
) -> torch.Tensor:
    """log P(each of K items | history, thought) for each of G thoughts of every user.

    A user's encoder keys serve all thoughts, a thought's keys all items, and a prefix's keys all
    items that begin with it. Over the catalogue's softmax an only continuation is certain, so that
    nothing is read beyond the last code that was a choice.

    Args:
        items: (B, K) int64. think: (B, G, l) int64.

    Returns:
        (B, G, K) float32.
    """
    hidden, past = policy.extend(encoded, policy.around(think), last_only=True)
    users, group = think.shape[:2]
    codes = policy.item_tokens[items]  # (B, K, m)
    first = policy.first_logprobs(policy.logits(hidden[:, :, 0]))
    total = first.gather(2, codes[:, None, :, 0].expand(-1, group, -1))
    thought = torch.arange(group, device=items.device)[:, None]
    catalogue = policy.config.softmax == "catalogue"
    branch, width = torch.zeros_like(items), 1
    for level in range(1, policy.tokens.levels):
        open_ = policy.legal.last_choice[items] >= level if catalogue else items >= 0
        prefix = policy.legal.prefix[items, level]
        before, prefixes = branch, width
        branch, one, width = branches(prefix, open_)
        if not width:
            break
        # Every thought grows the same branches; `one` is an item of each.
        feed = codes[..., level - 1].gather(1, one)[:, None].expand(-1, group, -1)
        parent = before.gather(1, one).clamp(max=prefixes - 1)
        past = past.reorder((thought * prefixes + parent[:, None]).flatten(1))
        hidden, past = policy.extend(encoded, feed.flatten(1)[..., None], past=past)
        hidden = hidden.view(users, group, width, -1)
        low, high = policy.tokens.level_range(level) if catalogue else (0, policy.tokens.size)
        scale = policy.config.d_model**-0.5
        scores = F.linear(hidden * scale, policy.shared.weight[low:high]).float()
        if catalogue:
            legal = policy.legal.after(prefix.gather(1, one).flatten(), high - low)
            scores = scores.masked_fill(~legal.view(users, 1, width, -1), -torch.inf)
        norm = scores.logsumexp(-1)
        place = branch.clamp(max=width - 1)[:, None].expand(-1, group, -1)
        cell = place * (high - low) + (codes[:, None, :, level] - low)
        value = scores.flatten(2).gather(2, cell) - norm.gather(2, place)
        total = total + value.masked_fill(~open_[:, None], 0.0)
    return total


def branches(prefix: torch.Tensor, open_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The different prefixes of each user: prefix (B, K) int64 of each item, where open_ (B, K).

    Returns:
        the branch of each item (B, K), without meaning where it is not open; an item of each
        branch (B, W), any item where a user has fewer; and W, the most that a user has.
    """
    last = torch.iinfo(prefix.dtype).max
    ordered, order = prefix.masked_fill(~open_, last).sort(1)
    rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    width = int(torch.where(ordered < last, rank + 1, 0).max()) if prefix.numel() else 0
    branch = torch.empty_like(rank).scatter_(1, order, rank)
    one = torch.zeros(len(prefix), width + 1, dtype=torch.int64, device=prefix.device)
    one.scatter_(1, rank.clamp(max=width), order)
    return branch, one[:, :width], width
