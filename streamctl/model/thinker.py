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
        """s_i = MLP_s(d_0 + ... + d_i).

        Args:
            start: d_0 (..., d), the mean of the encoder's states.
            hidden: d_1..d_l (..., l, d), the decoder's last states at o_1..o_l; None for l = 0.

        Returns:
            s_0..s_l (..., l + 1, d).
        """
        steps = start[..., None, :]
        if hidden is not None:
            steps = torch.cat([steps, hidden.to(steps.dtype)], -2)
        return self.state(steps.cumsum(-2))

    def residual(
        self, target: torch.Tensor, state: torch.Tensor, *, normalise: bool = True
    ) -> torch.Tensor:
        """r = MLP_r(t - s) for the next step.

        Args:
            target: t (..., d).
            state: s (..., d), of the step before.
            normalise: take both to unit length first; False is the paper's letter, which lets the
                states' growing length drown the target.
        """
        if normalise:
            target, state = F.normalize(target, dim=-1), F.normalize(state, dim=-1)
        return self.residual_head(target - state)
