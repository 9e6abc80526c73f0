"""The two small heads of iterative inference (Sec. 2.3.1): the state and the residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Head(nn.Module):
    """x + W2 gelu(W1 x): the identity at first, because W2 begins at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.wi = nn.Linear(width, width)
        self.wo = nn.Linear(width, width)
        nn.init.zeros_(self.wo.weight)
        nn.init.zeros_(self.wo.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wo(F.gelu(self.wi(x)))


class Thinker(nn.Module):
    """MLP_s and MLP_r, shared over steps."""

    def __init__(self, width: int):
        super().__init__()
        self.state = Head(width)
        self.residual_head = Head(width)

    def states(self, start: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """s_i = MLP_s(d_0 + ... + d_i), all of them: (..., l + 1, d).

        d_0 (..., d) is the mean of the encoder's states; d_1..d_l (..., l, d), None for l = 0, are
        the decoder's last states at o_1..o_l.
        """
        steps = start[..., None, :]
        if hidden is not None:
            steps = torch.cat([steps, hidden.to(steps.dtype)], -2)
        return self.state(steps.cumsum(-2))

    def residual(
        self, target: torch.Tensor, state: torch.Tensor, *, normalise: bool = True
    ) -> torch.Tensor:
        """r = MLP_r(t - s) for the next step, of the target t and the state s of the step before.

        Both are taken to unit length first; without that, which is the paper's letter, the states'
        growing length drowns the target.
        """
        if normalise:
            target, state = F.normalize(target, dim=-1), F.normalize(state, dim=-1)
        return self.residual_head(target - state)
