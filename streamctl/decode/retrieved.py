"""The retrieved items that a pretrained policy writes before its answer (Eq. 9), as its thought."""

from __future__ import annotations

import torch

from streamctl.device import autocast
from streamctl.model.policy import Policy


@torch.no_grad()
def retrieved_codes(policy: Policy, history: torch.Tensor, count: int) -> torch.Tensor:
    """(B, count * m) int64: the likeliest code at each place, level by level, item after item.

    They are given to `decode.recommend`, whose histories these are, as thoughts.
    """
    history = history.to(policy.device)
    with autocast(policy.device):
        encoded = policy.encode(history)
        feed = torch.full((len(history), 1), policy.tokens.THINK, device=policy.device)
        past, written = None, []
        for place in range(count * policy.tokens.levels):
            hidden, past = policy.extend(encoded, feed[:, None], past=past)
            low, high = policy.tokens.level_range(place % policy.tokens.levels)
            feed = policy.logits(hidden[:, 0])[..., low:high].argmax(-1) + low
            written.append(feed)
    return torch.cat(written, 1)
