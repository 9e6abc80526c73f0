"""Decoding on a CPU: a backbone's weights packed once, its steps with few and small operations.

Without gradients nothing need be kept for a backward pass, so the residual stream is updated in
place, weights are cast to the working precision, joined (queries, keys, values) and laid out for
the processor once a version, and padded positions are left out of every matrix product. Keys and
values of decoded tokens lie in an append-only `Store`: a branch is a column of row numbers in it,
so that beams are reordered, rollouts begun and thoughts shared without copying any of them.

`Encoder`, `Decoder` and their `memory` use this by themselves where `packed` finds that it applies.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from streamctl.kernels import threads
from streamctl.model import fused, loops

_DTYPES = (torch.float32, torch.bfloat16)
_SPARE = 4  # a store that grows makes room for so many steps like the one that it grows for
_PACKED: WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple]] = WeakKeyDictionary()


class Linear:
    """x @ weight.T, optionally with ReLU; bf16 weights are laid out for oneDNN in advance."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, *, relu: bool = False):
        self.weight, self.relu = weight.detach().to(dtype), relu
        self.native = (
            dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if self.native:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out)."""
        if self.native:
            after = "relu" if self.relu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, after, [], "")
        out = F.linear(x, self.weight)
        return out.relu_() if self.relu else out


class Norm:
    """The weights of an RMSNorm, applied to a residual stream in place."""

    def __init__(self, norm: nn.Module):
        self.weight = norm.weight.detach().float().numpy().copy()
        self.eps = np.float32(norm.eps)

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """Add delta to x (N, d), in place, and return the norm of the sum (N, d)."""
        return fused.add_and_norm(x, delta, self.weight, self.eps)


class FeedForward:
    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        self.norm = Norm(layer.layer_norm)
        self.widen = Linear(layer.DenseReluDense.wi.weight, dtype, relu=True)
        self.narrow = Linear(layer.DenseReluDense.wo.weight, dtype)

    def __call__(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.widen(self.norm(x, delta)))


class SelfAttention:
    """Norm, joined query-key-value projection and output projection of a layer."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        attention = layer.SelfAttention
        joined = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
        self.norm = Norm(layer.layer_norm)
        self.project = Linear(joined, dtype)
        self.merge = Linear(attention.o.weight, dtype)


class Padding:
    """Which positions of a batch (B, S) are real; products run over those alone."""

    def __init__(self, mask: torch.Tensor | None):
        self.mask = mask
        self.place = None if mask is None else mask.flatten().nonzero()[:, 0]

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """(B * S, n) -> (N, n)."""
        return x if self.place is None else x.index_select(0, self.place)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(N, n) -> (B * S, n), zero where padded."""
        if self.place is None:
            return x
        return x.new_zeros(self.mask.numel(), x.shape[1]).index_copy_(0, self.place, x)


class PackedEncoder:
    """The weights of an `Encoder` in one dtype."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        first = encoder.block[0].layer[0].SelfAttention
        self.heads, self.d_kv = first.heads, first.d_kv
        self.blocks = [
            (SelfAttention(block.layer[0], dtype), FeedForward(block.layer[1], dtype))
            for block in encoder.block
        ]
        self.norm = Norm(encoder.final_layer_norm)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """States (B, S, d) of embedded positions (B, S, d); zero where the mask is False."""
        batch, length, width = x.shape
        padding, delta = Padding(mask), None
        x = padding.drop(x.reshape(-1, width)).to(self.dtype, copy=True)
        for attention, feed_forward in self.blocks:
            qkv = padding.restore(attention.project(attention.norm(x, delta)))
            query, key, value = qkv.view(batch, length, 3, self.heads, self.d_kv).permute(
                2, 0, 3, 1, 4
            )
            weights = fused.softmax_(query @ key.transpose(-1, -2), bias, mask)
            mixed = (weights @ value).transpose(1, 2).reshape(batch * length, -1)
            delta = attention.merge(padding.drop(mixed))
            delta = feed_forward(x, delta)
        return padding.restore(self.norm(x, delta)).view(batch, length, width)


class Memory:
    """Every layer's cross-attention keys and values of B users, and the decoder they belong to.

    Attributes:
        keys, values: (layers, B, h, S, d_kv).
    """

    def __init__(self, decoder: PackedDecoder, keys: torch.Tensor, values: torch.Tensor):
        self.decoder, self.keys, self.values = decoder, keys, values

    def rows(self, index: torch.Tensor) -> Memory:
        """Some users only, or users repeated: index (B',) int64."""
        return Memory(self.decoder, self.keys[:, index], self.values[:, index])


class Store:
    """Keys and values of decoded tokens, layer by layer, a row a token; rows are only added."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype):
        self.rows = torch.empty(layers, 0, width, dtype=dtype)
        self.used = 0

    def add(self, count: int, *, spare: bool) -> int:
        """Make room for `count` rows; returns the number of the first."""
        begin, self.used = self.used, self.used + count
        if self.used > self.rows.shape[1]:
            layers, _, width = self.rows.shape
            room = begin + (_SPARE if spare else 1) * count
            grown = self.rows.new_empty(layers, room, width)
            grown[:, :begin] = self.rows[:, :begin]
            self.rows = grown
        return begin


class Branches:
    """What each of W branches of B users has decoded so far; what `Past` is to the modules.

    Attributes:
        store: holds the tokens' keys and values.
        index: (length, B, W) int64, the store's row of each token of each branch.
    """

    def __init__(self, store: Store, index: torch.Tensor):
        self.store, self.index = store, index

    @property
    def length(self) -> int:
        """Tokens that each branch stands for."""
        return len(self.index)

    def share(self) -> Branches:
        """The single branch's tokens in a store of their own, for branches to come."""
        old = self.store
        store = Store(len(old.rows), old.rows.shape[-1], old.rows.dtype)
        store.add(self.index.numel(), spare=False)
        store.rows.copy_(old.rows[:, self.index.flatten()])
        return Branches(store, torch.arange(store.used).view_as(self.index))

    def reorder(self, parent: torch.Tensor) -> Branches:
        """Branch w continues old branch parent[:, w]; parent (B, W') int64."""
        taken = parent.expand(len(self.index), *parent.shape)
        return Branches(self.store, self.index.gather(2, taken))

    def rows(self, index: torch.Tensor) -> Branches:
        """Some users only."""
        return Branches(self.store, self.index[:, index])

    def extended(self, users: int, branches: int, steps: int) -> Branches:
        """The same with `steps` more tokens of each branch, whose rows are still to be filled."""
        count = users * branches * steps
        first = self.store.add(count, spare=self.length > 0)
        new = torch.arange(first, first + count).view(users, branches, steps)
        old = self.index.expand(-1, users, branches)
        return Branches(self.store, torch.cat([old, new.permute(2, 0, 1)]))


class PackedDecoder:
    """The weights of a `Decoder` in one dtype."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        first = decoder.block[0].layer[0].SelfAttention
        self.heads, self.d_kv = first.heads, first.d_kv
        cross = [block.layer[1] for block in decoder.block]
        self.blocks = [
            (
                SelfAttention(block.layer[0], dtype),
                Norm(layer.layer_norm),
                Linear(layer.EncDecAttention.q.weight, dtype),
                Linear(layer.EncDecAttention.o.weight, dtype),
                FeedForward(block.layer[2], dtype),
            )
            for block, layer in zip(decoder.block, cross, strict=True)
        ]
        attentions = [layer.EncDecAttention for layer in cross]
        joined = torch.cat([w for a in attentions for w in (a.k.weight, a.v.weight)])
        self.keys_values = Linear(joined, dtype)
        self.norm = Norm(decoder.final_layer_norm)

    def memory(self, states: torch.Tensor, mask: torch.Tensor | None) -> Memory:
        """Keys and values of all layers from one matrix product over the real positions."""
        batch, length, width = states.shape
        padding = Padding(mask)
        rows = padding.drop(states.reshape(-1, width)).to(self.dtype)
        shape = batch, length, len(self.blocks), 2, self.heads, self.d_kv
        parts = padding.restore(self.keys_values(rows)).view(shape).permute(3, 2, 0, 4, 1, 5)
        return Memory(self, *parts.contiguous())

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        memory: Memory,
        mask: torch.Tensor | None,
        past: Branches | None,
    ) -> tuple[torch.Tensor, Branches]:
        """`Decoder.forward`: x (B, W, T, d) embedded, bias (h, T, all tokens), mask (B, S)."""
        users, branches, steps, width = x.shape
        if past is None:
            store = Store(len(self.blocks), 2 * self.heads * self.d_kv, self.dtype)
            past = Branches(store, torch.empty(0, users, branches, dtype=torch.int64))
        past = past.extended(users, branches, steps)
        index, bias = past.index.flatten(1).numpy(), bias.float().contiguous().numpy()
        x, delta = x.reshape(-1, width).to(self.dtype, copy=True), None
        by_head = users, branches * steps, self.heads, self.d_kv
        for number, (attention, norm, queries, merge, feed_forward) in enumerate(self.blocks):
            qkv = attention.project(attention.norm(x, delta))
            mixed = _attend(qkv, past.store.rows[number], index, bias, steps)
            query = queries(norm(x, attention.merge(mixed))).view(by_head).transpose(1, 2)
            scores = query @ memory.keys[number].transpose(-1, -2)
            weights = fused.softmax_(scores, None, mask)
            mixed = (weights @ memory.values[number]).transpose(1, 2).reshape(len(x), -1)
            delta = feed_forward(x, merge(mixed))
        return self.norm(x, delta).view(users, branches, steps, width), past


def _attend(
    qkv: torch.Tensor, store: torch.Tensor, index: np.ndarray, bias: np.ndarray, steps: int
) -> torch.Tensor:
    """Causal self-attention of each branch's new tokens over its own tokens, old and new.

    Args:
        qkv: (branches * steps, 3 * h * d_kv) of the new tokens, whose keys and values are put into
            the store.
        store: (rows, 2 * h * d_kv) of a layer.
        index: (tokens, branches) int64, the store's rows.
        bias: (h, steps, tokens) float32.

    Returns:
        (branches * steps, h * d_kv).
    """
    out = qkv.new_empty(len(qkv), store.shape[1] // 2)
    arrays = fused.array(qkv), fused.array(store), index, bias
    target = fused.array(out)

    def run(first, last):
        loops.attend(*arrays, first, last, target)

    threads.over_ranges(run, index.shape[1], max(1, fused.RANGE // (steps * qkv.shape[1])))
    return out


def packed(stack: nn.Module, x: torch.Tensor) -> PackedEncoder | PackedDecoder | None:
    """The stack's packed weights, or None where they do not apply.

    They apply on a CPU, in float32 or bf16, where no gradient is wanted and no dropout is on; the
    dtype is autocast's where it is on. They are packed again when a weight has changed.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or (stack.training and stack.p):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in _DTYPES:
        return None
    kept = _PACKED.setdefault(stack, {})
    if dtype in kept:
        weights, version, ready = kept[dtype]
        if _versions(weights) == version:
            return ready
    weights = list(stack.parameters())
    kind = PackedDecoder if stack.is_decoder else PackedEncoder
    with torch.autocast("cpu", enabled=False):
        kept[dtype] = weights, _versions(weights), kind(stack, dtype)
    return kept[dtype][2]


class _Steps:
    """Counts optimiser steps of the whole process: fused ones leave no trace in the weights."""

    taken = 0

    @classmethod
    def count(cls, *_: object) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


def _versions(weights: list[nn.Parameter]) -> list[tuple[int, int, int]]:
    """Changes when a weight is written to, trained or moved."""
    return [(w.data_ptr(), 0 if w.is_inference() else w._version, _Steps.taken) for w in weights]
