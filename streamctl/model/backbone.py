"""T5 mathematics (Raffel et al. 2020), written for short sequences on CPUs and GPUs.

Parameter names are those of `transformers.T5ForConditionalGeneration`, so a state dict moves
between the two unchanged. What differs is the cost: attention is two plain matrix products (flash
attention does not pay for 10 to 90 tokens), sequences of one length need no mask, the residual
stream is bf16 under autocast, a residual connection, its dropout and the norm after it are one
pass (`fused.py`), and the decoder works on (user, branch) pairs, so that beams, rollouts and
negatives of a user share the user's encoder keys and the keys of their common prefix instead of
copying them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.model import frozen, fused
from streamctl.model.past import LayerPast, Past

# Cross-attention keys and values of every layer, with or without gradients.
Memory = list[tuple[torch.Tensor, torch.Tensor]] | frozen.Memory


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
    """x / sqrt(mean(x^2) + eps) * weight, after what the layer before adds to x."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps, self.p = config.eps, config.dropout

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x + dropout(delta), and its norm."""
        return fused.residual_norm(x, delta, self.weight, self.eps, self.p * self.training)


class FeedForward(nn.Module):
    """wo(relu(wi(x))), under the name that T5 gives it."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(x), inplace=True))


class FeedForwardLayer(nn.Module):
    """What the feed-forward layer adds to the residual stream."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., d), normed."""
        return self.DenseReluDense(x)


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


def relative_buckets(
    queries: torch.Tensor, keys: torch.Tensor, *, bidirectional: bool, buckets: int, limit: int
) -> torch.Tensor:
    """T5's bucket (T, S) int64 of each distance key - query, positions (S,) and (T,): exact when
    near, logarithmic up to `limit`."""
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


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # a table first made while serving is read by a training later
def _bucket_table(
    first: int, length: int, bidirectional: bool, buckets: int, limit: int, device: torch.device
) -> torch.Tensor:
    """Buckets of queries first..length-1 and keys 0..length-1: (length - first, length) int64."""
    place = torch.arange(length)
    table = relative_buckets(
        place[first:], place, bidirectional=bidirectional, buckets=buckets, limit=limit
    )
    return table.to(device)


class SelfAttentionLayer(nn.Module):
    """What self-attention adds to the residual stream."""

    def __init__(self, config: BackboneConfig, *, biased: bool):
        super().__init__()
        self.config = config
        self.SelfAttention = Attention(config, biased=biased)
        self.layer_norm = RMSNorm(config)

    def bias(self, first: int, length: int, *, bidirectional: bool) -> torch.Tensor:
        """(h, T, S) float32 of the first block: queries first..length-1, keys 0..length-1.

        A decoder's is -inf where a key comes after its query.
        """
        config, table = self.config, self.SelfAttention.relative_attention_bias.weight
        device = table.device
        bucket = _bucket_table(
            first, length, bidirectional, config.buckets, config.max_distance, device
        )
        bias = F.embedding(bucket, table).permute(2, 0, 1)
        if bidirectional or length - first == 1:
            return bias
        place = torch.arange(length, device=device)
        return bias.masked_fill(place > place[first:, None], -torch.inf)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x (B, T, d), normed; bias of `bias()`; mask (B, T) bool, or None."""
        query, key, value = self.SelfAttention.queries_keys_values(x)
        weights = fused.softmax(query @ key.transpose(-1, -2), bias, mask)
        return self.SelfAttention.merge(weights @ value)

    def branches(
        self, x: torch.Tensor, bias: torch.Tensor, past: LayerPast | None
    ) -> tuple[torch.Tensor, LayerPast]:
        """The causal form on branches.

        Args:
            x: (B, W, T, d), normed, T new tokens of each branch.
            bias: (h, T, P + O + T): shared prefix P, own past O, new tokens T.
            past: keys and values of the tokens before.
        """
        query, key, value = self.SelfAttention.queries_keys_values(x)
        shared = past.shared if past else None
        if past and past.own is not None:
            key = torch.cat([past.own[0], key], -2)
            value = torch.cat([past.own[1], value], -2)
        own = key.shape[-2]
        scores = query @ key.transpose(-1, -2)
        if shared is None:
            mixed = fused.softmax(scores, bias) @ value
        else:
            common = _by_branch(_by_head(query) @ shared[0].transpose(-1, -2), x)
            weights = fused.softmax(torch.cat([common, scores], -1), bias)
            mixed = weights[..., -own:] @ value
            mixed = mixed + _by_branch(_by_head(weights[..., :-own]) @ shared[1], x)
        return self.SelfAttention.merge(mixed), LayerPast(shared, (key, value))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(B, W, h, T, n) -> (B, h, W * T, n): all branches of a user in one matrix."""
    return x.transpose(1, 2).flatten(2, 3)


def _by_branch(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, h, W * T, n) -> (B, W, h, T, n), W and T those of `like` (B, W, T, d)."""
    return x.unflatten(2, like.shape[1:3]).transpose(1, 2)


class CrossAttentionLayer(nn.Module):
    """What attention from the decoder to the user's encoder states adds to the residual stream."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config)

    def forward(
        self,
        x: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (B, W, T, d), normed; memory two (B, h, S, d_kv); mask (B, S) bool, or None."""
        attention = self.EncDecAttention
        query = _by_head(attention.split(attention.q(x)))  # (B, h, W * T, dk)
        weights = fused.softmax(query @ memory[0].transpose(-1, -2), mask=mask)
        return attention.merge(_by_branch(weights @ memory[1], x))


class Block(nn.Module):
    """An encoder or decoder block: its `layer` list is numbered as in T5."""

    def __init__(self, config: BackboneConfig, *, decoder: bool, biased: bool):
        super().__init__()
        layers: list[nn.Module] = [SelfAttentionLayer(config, biased=biased)]
        if decoder:
            layers.append(CrossAttentionLayer(config))
        self.layer = nn.ModuleList([*layers, FeedForwardLayer(config)])


def in_stream(x: torch.Tensor) -> torch.Tensor:
    """Embedded inputs in the dtype of the residual stream: autocast's, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Encoder(nn.Module):
    """Embedded positions -> states."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.p = config.dropout
        self.block = nn.ModuleList(
            Block(config, decoder=False, biased=not i) for i in range(config.layers)
        )
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """States (B, S, d) of x (B, S, d); mask (B, S) bool, None when nothing is padded."""
        bias = self.block[0].layer[0].bias(0, x.shape[1], bidirectional=True)
        if (ready := frozen.packed(self, frozen.PackedEncoder, x)) is not None:
            return ready(x, bias, mask)
        p = self.p * self.training
        x, delta = fused.dropout(in_stream(x), p), None
        for block in self.block:
            attention, feed_forward = block.layer
            x, normed = attention.layer_norm(x, delta)
            delta = attention(normed, bias, mask)
            x, normed = feed_forward.layer_norm(x, delta)
            delta = feed_forward(normed)
        return fused.dropout(self.final_layer_norm(x, delta)[1], p)


class Decoder(nn.Module):
    """Tokens of each branch of each user -> hidden states, by teacher forcing or step by step."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.p = config.dropout
        self.block = nn.ModuleList(
            Block(config, decoder=True, biased=not i) for i in range(config.decoder_layers)
        )
        self.final_layer_norm = RMSNorm(config)

    def memory(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> Memory:
        """Each layer's keys and values of the encoder states (B, S, d): once a user."""
        if (ready := frozen.packed(self, frozen.PackedDecoder, states)) is not None:
            return ready.memory(states, mask)
        return [block.layer[1].EncDecAttention.keys_values(states) for block in self.block]

    def forward(
        self,
        x: torch.Tensor,
        memory: Memory,
        mask: torch.Tensor | None = None,
        past: Past | frozen.Branches | None = None,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Past | frozen.Branches]:
        """Run T new tokens of each branch.

        Args:
            x: (B, W, T, d) embedded tokens.
            memory: of `memory()`.
            mask: (B, S) bool over encoder positions, or None when nothing is padded.
            past: of the call before, or None.
            last_only: only the last token's state is wanted.

        Returns:
            hidden (B, W, T or 1, d), and the past with the new tokens.
        """
        before = past.length if past else 0
        total = before + x.shape[2]
        bias = self.block[0].layer[0].bias(before, total, bidirectional=False)
        if isinstance(memory, frozen.Memory):
            return memory.decoder(x, bias, memory, past, last_only)
        p = self.p * self.training
        x, delta = fused.dropout(in_stream(x), p), None
        layers = []
        for number, block in enumerate(self.block):
            attention, cross_attention, feed_forward = block.layer
            x, normed = attention.layer_norm(x, delta)
            delta, new = attention.branches(normed, bias, past.layers[number] if past else None)
            layers.append(new)
            x, normed = cross_attention.layer_norm(x, delta)
            delta = cross_attention(normed, memory[number], mask)
            x, normed = feed_forward.layer_norm(x, delta)
            delta = feed_forward(normed)
        hidden = fused.dropout(self.final_layer_norm(x, delta)[1], p)
        return hidden[:, :, -1:] if last_only else hidden, Past(layers, total)


@torch.no_grad()
def initialise(module: nn.Module, config: BackboneConfig, generator: torch.Generator) -> None:
    """T5's initial weights: normal, with the deviations that its unscaled attention needs."""
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
