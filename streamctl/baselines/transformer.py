"""The transformer layer that SASRec and BERT4Rec share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

INITIAL_STD = 0.02  # of embeddings, as in BERT; a LayerNorm follows them


class Block(nn.Module):
    """Attention and a GELU network of four times the width, each normalised after its residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, *, visible: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        """x (B, S, d); `visible`, bool of (B, heads, S, S), is what each position may look at, and
        `causal` lets it look at itself and those before."""
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, dropout_p=rate
        )
        x = self.norm_attention(x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))
