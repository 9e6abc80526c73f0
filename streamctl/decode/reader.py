"""Reading evidence: a small network that weighs what the look-ups found against the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

CANDIDATES = 200  # items of highest summed score that are read
HIDDEN = 32
_OWN, _FOUND = 7, 2  # clues of an item, and of an item in one look-up
_SCALES = (3.0, 100.0)  # of the logarithms of evidence: for much of it and for little


@dataclass(frozen=True)
class Clues:
    """What there is to say of each user's candidates.

    Attributes:
        items: (B, C) int64, by falling summed score.
        summed: (B, C, l + 1) float32, the summed scores after 0, 1, ..., l look-ups.
        own: (B, C, 7) float32: the state's opinion; whether the history has the item; log(1 + how
            often it is in training); cosines of its vector with the last item's, and of its text
            with the last item's and with the mean text of the history; log of the history's length.
        found: (B, C, l, 2) float32: by look-up, the weights of the rows whose users took the item
            next, and later.
    """

    items: torch.Tensor
    summed: torch.Tensor
    own: torch.Tensor
    found: torch.Tensor

    def rows(self, rows: torch.Tensor) -> Clues:
        """Those of some users."""
        return Clues(self.items[rows], self.summed[rows], self.own[rows], self.found[rows])


class Network(nn.Module):
    """Clues of a candidate (..., width) -> a correction of its score, nothing before training."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1, bias=False)
        self.straight = nn.Linear(width, 1, bias=False)
        for layer in (self.out, self.straight):
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) of x (..., width)."""
        return (self.out(F.gelu(self.hidden(x))) + self.straight(x))[..., 0]


class Reader(nn.Module):
    """Clues -> scores: the summed score, corrected by a network for every length of a thought.

    Each length has a network of its own: one network for all lengths reads most of them worse. A
    network is also told the most that each look-up said for any of the user's candidates.

    Attributes:
        networks: one for 0, 1, ..., l look-ups, the most that it can read.
        texts: (N, e) float32 buffer, text vectors of length 1.
        popularity: (N,) float32 buffer, log(1 + interactions in training).
    """

    texts: torch.Tensor
    popularity: torch.Tensor

    def __init__(self, look_ups: int, texts: torch.Tensor, popularity: torch.Tensor):
        """An untrained reader, its weights drawn from torch's global generator.

        Args:
            look_ups: l.
            texts: (N, e) text vectors of any length.
            popularity: (N,) interactions in training.
        """
        super().__init__()
        found = _FOUND * len(_SCALES)
        self.networks = nn.ModuleList(
            Network(_OWN + count * (found + _FOUND)) for count in range(look_ups + 1)
        )
        self.register_buffer("own_mean", torch.zeros(_OWN))
        self.register_buffer("own_std", torch.ones(_OWN))
        self.register_buffer("found_std", torch.ones(look_ups, found))
        self.register_buffer("texts", F.normalize(texts.float(), dim=1), persistent=False)
        self.register_buffer("popularity", torch.log1p(popularity.float()), persistent=False)

    def own(
        self,
        items: torch.Tensor,
        opinion: torch.Tensor,
        vectors: torch.Tensor,
        history: torch.Tensor,
    ) -> torch.Tensor:
        """`Clues.own` (B, C, 7) of the candidates.

        Args:
            items: (B, C) int64. opinion: (B, C) log-probabilities before any look-up.
            vectors: (N, d) that rank. history: (B, H) int64, oldest first, -1 on the right.
        """
        there = history >= 0
        length = there.sum(1)
        last = history.gather(1, (length - 1).clamp(min=0)[:, None]).clamp(min=0)[:, 0]
        taste = (self.texts[history.clamp(min=0)] * there[..., None]).sum(1)
        texts, near = self.texts[items], F.normalize(vectors[items], dim=2)
        return torch.stack(
            [
                opinion,
                (items[:, :, None] == history[:, None]).any(2).float(),
                self.popularity[items],
                _products(near, F.normalize(vectors[last], dim=1)),
                _products(texts, self.texts[last]),
                _products(texts, F.normalize(taste, dim=1)),
                length.clamp(min=1).log()[:, None].expand(items.shape),
            ],
            2,
        )

    def fit_scale(self, clues: Clues) -> None:
        """Take the clues' means and deviations from those that it will be trained on."""
        spread = _logarithms(clues.found)
        self.own_mean.copy_(clues.own.mean((0, 1)))
        self.own_std.copy_(clues.own.std((0, 1)) + 1e-6)
        self.found_std.copy_(spread.std((0, 1)) + 1e-6)

    def forward(self, clues: Clues, look_ups: int | None = None) -> torch.Tensor:
        """Scores (B, C) float32 of the candidates after `look_ups` look-ups; None for all."""
        asked = clues.found.shape[2] if look_ups is None else look_ups
        own = (clues.own - self.own_mean) / self.own_std
        evidence = clues.found[:, :, :asked]
        found = _logarithms(evidence) / self.found_std[:asked]
        # How sure a look-up was of any candidate, the same for all of a user's; halved, it is
        # about as large as the other clues.
        surest = torch.log1p(_SCALES[-1] * evidence.amax(1, keepdim=True)) / 2
        parts = own, found.flatten(2), surest.expand_as(evidence).flatten(2)
        said = self.networks[asked](torch.cat(parts, 2))
        return clues.summed[:, :, asked] + said


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, C) of (B, C, d) and (B, d)."""
    return (a @ b[:, :, None])[:, :, 0]


def _logarithms(found: torch.Tensor) -> torch.Tensor:
    """(B, C, l, 2 * scales) of evidence (B, C, l, 2)."""
    return torch.cat([torch.log1p(scale * found) for scale in _SCALES], 3)
