"""The decoder's KV cache: keys and values that a user's branches share, and their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LayerPast:
    """Keys and values of one decoder layer.

    shared: two (B, h, P, d_kv), the prefix that all branches of a user have in common, or None.
    own: two (B, W, h, O, d_kv), what each branch added, or None.
    """

    shared: tuple[torch.Tensor, torch.Tensor] | None
    own: tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class Past:
    """All layers' keys and values, and how many tokens they stand for."""

    layers: list[LayerPast]
    length: int

    def share(self) -> Past:
        """Make the single branch's tokens the prefix of all branches to come."""
        layers = []
        for layer in self.layers:
            own = tuple(part[:, 0] for part in layer.own)
            if layer.shared is not None:
                own = tuple(torch.cat(pair, -2) for pair in zip(layer.shared, own, strict=True))
            layers.append(LayerPast(own, None))
        return Past(layers, self.length)

    def reorder(self, parent: torch.Tensor) -> Past:
        """Branch w continues old branch parent[:, w]; parent (B, W') int64."""
        rows = torch.arange(len(parent), device=parent.device)[:, None]
        layers = [
            LayerPast(x.shared, None if x.own is None else tuple(p[rows, parent] for p in x.own))
            for x in self.layers
        ]
        return Past(layers, self.length)
