"""T5 mathematics (Raffel et al. 2020), written for short sequences on CPUs and GPUs.

Parameter names are those of `transformers.T5ForConditionalGeneration`, so a state dict moves
between the two unchanged. What differs is the cost: attention is two plain matrix products (flash
attention does not pay for 10 to 90 tokens), sequences of one length need no mask, and the decoder
works on (user, branch) pairs, so that beams, rollouts and negatives of a user share the user's
encoder keys and the keys of their common prefix instead of copying them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the encoder and of each decoder."""

    vocabulary: int
    d_model: int
    d_kv: int
    heads: int
    d_ff: int
    layers: int  # of the encoder
    decoder_layers: int
    buckets: int = 32  # of relative distances
    max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean is taken, no bias added."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return x * (scale * self.weight).to(x.dtype)


class FeedForward(nn.Module):
    """wo(relu(wi(x))), under the name that T5 gives it."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(x)))


class FeedForwardLayer(nn.Module):
    """x + dropout(FeedForward(norm(x)))."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class Attention(nn.Module):
    """The four projections of one attention; scores are not scaled by 1/sqrt(d_kv) (T5)."""

    def __init__(self, config: BackboneConfig, *, biased: bool = False):
        super().__init__()
        self.heads, self.d_kv = config.heads, config.d_kv
        inner = config.heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(..., T, h * d_kv) -> (..., h, T, d_kv)."""
        return x.unflatten(-1, (self.heads, self.d_kv)).transpose(-3, -2)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """(..., h, T, d_kv) -> (..., T, d_model) through the output projection."""
        return self.o(x.transpose(-3, -2).flatten(-2))

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Three (..., h, T, d_kv) from one matrix product."""
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        return tuple(self.split(part) for part in F.linear(x, weight).chunk(3, -1))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (..., h, T, d_kv) from one matrix product."""
        key, value = F.linear(x, torch.cat([self.k.weight, self.v.weight])).chunk(2, -1)
        return self.split(key), self.split(value)


def _weights(scores: torch.Tensor) -> torch.Tensor:
    """Softmax in fp32, in the dtype of the scores."""
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


def relative_buckets(
    queries: torch.Tensor, keys: torch.Tensor, *, bidirectional: bool, buckets: int, limit: int
) -> torch.Tensor:
    """T5's bucket of each distance key - query: exact when near, logarithmic up to `limit`.

    Args:
        queries: (T,) int64 positions.
        keys: (S,) int64 positions.

    Returns:
        (T, S) int64 in 0..buckets-1.
    """
    distance = keys[None, :] - queries[:, None]
    bucket = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket += (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = distance.clamp(min=1).float().div(exact).log() / math.log(limit / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


class SelfAttentionLayer(nn.Module):
    """x + dropout(attention(norm(x)))."""

    def __init__(self, config: BackboneConfig, *, biased: bool):
        super().__init__()
        self.SelfAttention = Attention(config, biased=biased)
        self.layer_norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x (B, T, d), bias (1 or B, h, T, T) with -inf where a key may not be seen."""
        query, key, value = self.SelfAttention.queries_keys_values(self.layer_norm(x))
        scores = query @ key.transpose(-1, -2) + bias
        return x + self.dropout(self.SelfAttention.merge(_weights(scores) @ value))

    def branches(
        self, x: torch.Tensor, bias: torch.Tensor, past: LayerPast | None
    ) -> tuple[torch.Tensor, LayerPast]:
        """The causal form on branches.

        Args:
            x: (B, W, T, d), T new tokens of each branch.
            bias: (h, T, P + O + T): shared prefix P, own past O, new tokens T.
            past: keys and values of the tokens before.
        """
        query, key, value = self.SelfAttention.queries_keys_values(self.layer_norm(x))
        shared = past.shared if past else None
        if past and past.own is not None:
            key = torch.cat([past.own[0], key], -2)
            value = torch.cat([past.own[1], value], -2)
        own = key.shape[-2]
        scores = query @ key.transpose(-1, -2) + bias[..., -own:]
        if shared is None:
            mixed = _weights(scores) @ value
        else:
            flat = _by_head(query)  # (B, h, W * T, dk)
            common = _by_branch(flat @ shared[0].transpose(-1, -2), x) + bias[..., :-own]
            weights = _weights(torch.cat([common, scores], -1))
            mixed = weights[..., -own:] @ value
            mixed = mixed + _by_branch(_by_head(weights[..., :-own]) @ shared[1], x)
        return x + self.dropout(self.SelfAttention.merge(mixed)), LayerPast(shared, (key, value))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(B, W, h, T, n) -> (B, h, W * T, n): all branches of a user in one matrix."""
    return x.transpose(1, 2).flatten(2, 3)


def _by_branch(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, h, W * T, n) -> (B, W, h, T, n), W and T those of `like` (B, W, T, d)."""
    return x.unflatten(2, like.shape[1:3]).transpose(1, 2)


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
        """Branch w continues old branch parent[:, w]; the shared prefix is not touched.

        Args:
            parent: (B, W') int64.
        """
        rows = torch.arange(len(parent), device=parent.device)[:, None]
        layers = [
            LayerPast(x.shared, None if x.own is None else tuple(p[rows, parent] for p in x.own))
            for x in self.layers
        ]
        return Past(layers, self.length)

    def rows(self, index: torch.Tensor) -> Past:
        """The past of some users only."""

        def take(pair):
            return None if pair is None else tuple(part[index] for part in pair)

        return Past([LayerPast(take(x.shared), take(x.own)) for x in self.layers], self.length)


class CrossAttentionLayer(nn.Module):
    """x + dropout(attention from the decoder to the user's encoder states)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (B, W, T, d); memory two (B, h, S, d_kv); mask (B, 1, 1, S) added, or None."""
        attention = self.EncDecAttention
        query = _by_head(attention.split(attention.q(self.layer_norm(x))))  # (B, h, W * T, dk)
        scores = query @ memory[0].transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        mixed = _by_branch(_weights(scores) @ memory[1], x)
        return x + self.dropout(attention.merge(mixed))


class Block(nn.Module):
    """An encoder or decoder block: its `layer` list is numbered as in T5."""

    def __init__(self, config: BackboneConfig, *, decoder: bool, biased: bool):
        super().__init__()
        layers: list[nn.Module] = [SelfAttentionLayer(config, biased=biased)]
        if decoder:
            layers.append(CrossAttentionLayer(config))
        self.layer = nn.ModuleList([*layers, FeedForwardLayer(config)])


class Encoder(nn.Module):
    """Embedded positions -> states."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(
            Block(config, decoder=False, biased=not i) for i in range(config.layers)
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, S, d), mask (B, S) bool (True = real) or None when nothing is padded."""
        place = torch.arange(x.shape[1], device=x.device)
        config = self.config
        bucket = relative_buckets(
            place, place, bidirectional=True, buckets=config.buckets, limit=config.max_distance
        )
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(bucket).permute(2, 0, 1)[None].to(x.dtype)  # (1, h, S, S)
        if mask is not None:
            bias = bias + closed(mask, x.dtype)
        x = self.dropout(x)
        for block in self.block:
            x = block.layer[1](block.layer[0](x, bias))
        return self.dropout(self.final_layer_norm(x))


def closed(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, S) bool -> (B, 1, 1, S) to add to scores: 0 where True, the lowest number elsewhere."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]


class Decoder(nn.Module):
    """Tokens of each branch of each user -> hidden states, by teacher forcing or step by step."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(
            Block(config, decoder=True, biased=not i) for i in range(config.decoder_layers)
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def memory(self, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values of the encoder states (B, S, d): once a user."""
        return [block.layer[1].EncDecAttention.keys_values(states) for block in self.block]

    def forward(
        self,
        x: torch.Tensor,
        memory: list[tuple[torch.Tensor, torch.Tensor]],
        mask: torch.Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[torch.Tensor, Past]:
        """Run T new tokens of each branch.

        Args:
            x: (B, W, T, d) embedded tokens.
            memory: of `memory()`.
            mask: (B, S) bool over encoder positions, or None when nothing is padded.
            past: of the call before, or None.

        Returns:
            hidden (B, W, T, d), and the past with the new tokens.
        """
        before = past.length if past else 0
        total = before + x.shape[2]
        place = torch.arange(total, device=x.device)
        config = self.config
        bucket = relative_buckets(
            place[before:], place, bidirectional=False,
            buckets=config.buckets, limit=config.max_distance,
        )  # fmt: skip
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(bucket).permute(2, 0, 1).to(x.dtype)  # (h, T, total)
        if x.shape[2] > 1:
            later = place[None, :] > place[before:, None]
            bias = bias.masked_fill(later, torch.finfo(x.dtype).min)
        hidden_keys = None if mask is None else closed(mask, x.dtype)
        x = self.dropout(x)
        layers = []
        for number, block in enumerate(self.block):
            layer_past = past.layers[number] if past else None
            x, new = block.layer[0].branches(x, bias, layer_past)
            x = block.layer[2](block.layer[1](x, memory[number], hidden_keys))
            layers.append(new)
        return self.dropout(self.final_layer_norm(x)), Past(layers, total)


@torch.no_grad()
def initialise(module: nn.Module, config: BackboneConfig, generator: torch.Generator) -> None:
    """T5's initial weights: normal, with the deviations that its unscaled attention needs.

    Args:
        module: an encoder or decoder of this shape.
    """
    inner = config.heads * config.d_kv
    deviations = {
        "q.weight": (config.d_model * config.d_kv) ** -0.5,
        "k.weight": config.d_model**-0.5,
        "v.weight": config.d_model**-0.5,
        "o.weight": inner**-0.5,
        "wi.weight": config.d_model**-0.5,
        "wo.weight": config.d_ff**-0.5,
        "relative_attention_bias.weight": config.d_model**-0.5,
    }
    for name, parameter in module.named_parameters():
        for ending, deviation in deviations.items():
            if name.endswith("." + ending):
                parameter.normal_(0.0, deviation, generator=generator)
