"""What a policy thought, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trace:
    """What the model thought for each user.

    Attributes:
        tokens: (B, l) int64 think tokens.
        states: (B, l + 1, d) float32: s_0 before thinking, then the state after each token.
    """

    tokens: torch.Tensor
    states: torch.Tensor

    def row(self, index: int) -> Trace:
        """One user's trace, its first dimension kept."""
        return Trace(self.tokens[index : index + 1], self.states[index : index + 1])
