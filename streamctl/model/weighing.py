"""The weighing network: a weight for each piece of evidence, and how far the thought is trusted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.retrieval.evidence import FEATURES, HOPS

HIDDEN = 64
TRUST = 5  # what the mixture reads, see `Weighing.trust`
FAR = 5.0  # standardised features are cut here
FIRST_TRUST = 3.0  # log-odds of the codes before anything was learned


class Weighing(nn.Module):
    """A small network over the pieces of evidence, and the mixture of thought and codes.

    A piece's logit is linear in its standardised features plus a network of one hidden layer that
    also reads the mean of that layer over the user's pieces. Both begin at zero: all pieces weigh
    the same, and the codes are trusted.

    Attributes:
        mean, scale: (F,), see `standardise`.
        hop: (7, d) embedding of the hop that found a thought's item; the last is for no item.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, dropout: float = 0.1):
        super().__init__()
        features = len(FEATURES)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.read = nn.Linear(features, HIDDEN)
        self.compare = nn.Linear(2 * HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        self.linear = nn.Linear(features, 1)
        self.dropout = nn.Dropout(dropout)
        self.hop = nn.Embedding(len(HOPS) + 1, width)
        self.codes_trust = nn.Linear(TRUST, 1)
        for layer in (self.out, self.linear, self.codes_trust):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.codes_trust.bias, FIRST_TRUST)
        nn.init.zeros_(self.hop.weight)

    @torch.no_grad()
    def standardise(self, features: torch.Tensor, real: torch.Tensor) -> None:
        """Take the mean and deviation of features (B, C, F) where `real` (B, C) bool."""
        known = features[real].double()
        self.mean.copy_(known.mean(0))
        self.scale.copy_(known.std(0).clamp(min=1e-3))

    def forward(self, features: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """(B, C, F) features and (B, C) bool -> (B, C) float32 logits, -inf where nothing is."""
        with torch.autocast(features.device.type, enabled=False):
            x = ((features.float() - self.mean) / self.scale).clamp(-FAR, FAR)
            x = x * real[..., None]
            hidden = F.gelu(self.read(x))
            count = real.sum(1).clamp(min=1)[:, None, None]
            mean = (hidden * real[..., None]).sum(1, keepdim=True) / count
            # A product of both halves, without the mean copied to every piece.
            own, shared = self.compare.weight.chunk(2, 1)
            hidden = F.linear(self.dropout(hidden), own, self.compare.bias)
            hidden = self.dropout(F.gelu(hidden + F.linear(self.dropout(mean), shared)))
            logits = (self.out(hidden) + self.linear(x))[..., 0]
        return logits.masked_fill(~real, -torch.inf)

    def trust(self, weights: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """log odds of the codes against the thought.

        Args:
            weights: (..., l) log-weights of a thought, -inf for none.
            first: (..., K) log-probabilities of the first code.

        Returns:
            (...) float32; infinite where the thought is empty: the codes alone answer.
        """
        share, chance = weights.float().exp(), first.float().exp()
        read = torch.stack(
            [
                share.amax(-1),
                -(share * weights.float().clamp(min=-30)).sum(-1),
                torch.log1p((share > 0).sum(-1).float()),
                chance.amax(-1),
                -(chance * first.float().clamp(min=-30)).sum(-1),
            ],
            -1,
        ).detach()
        with torch.autocast(read.device.type, enabled=False):
            odds = self.codes_trust(read)[..., 0]
        return torch.where((share > 0).any(-1), odds, torch.inf)
