"""Decoding on a CPU: a backbone's weights packed once, a whole pass in a few compiled calls.

Without gradients nothing need be kept for a backward pass: weights are laid out for the processor
once a version, and a block of rows goes through all layers without leaving its core (`passes.py`).
Padded positions are in no product. Keys and values of decoded tokens lie in an append-only
`Store`: a branch is a column of row numbers in it, so that beams are reordered, rollouts begun and
thoughts shared without copying any of them.

`Encoder`, `Decoder`, their `memory` and `Policy.logits` use this by themselves where it applies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from streamctl.errors import UsageError
from streamctl.kernels import choice, compiled, threads

WAYS = ("auto", "packed", "plain")
_way: ContextVar[str | None] = ContextVar("streamctl_decode", default=None)  # while one is timed
_USERS = (1, 4, 16)  # batches that are measured; larger ones do as the largest of these
_LENGTH = 16  # positions of each of their users
_BEAM = 20  # branches of a decoder that is measured
_SPARE = 4  # a store that grows makes room for so many steps like the one that it grows for
_RANGE = 4  # blocks of rows a thread takes at a time: milliseconds beside its waking up
_PACKED: WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple]] = WeakKeyDictionary()
_CHOSEN: WeakKeyDictionary[nn.Module, dict[tuple, str]] = WeakKeyDictionary()


def _tiles() -> Any:
    """Read where packed decoding begins: an answer in plain torch does not wait for Numba."""
    from streamctl.model import tiles

    return tiles


def _like(dtype: torch.dtype, *widths: int) -> torch.dtype:
    """bf16 where it is wanted and the processor multiplies pairs of these widths; else float32."""
    pairs = _tiles().simd.HAS_BF16_DOT and not any(width % 2 for width in widths)
    return dtype if pairs else torch.float32


def _numpy(x: torch.Tensor) -> np.ndarray:
    """float32, or the bits of bf16, of any shape and strides."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _passes() -> Any:
    """The compiled passes: importing them compiles, or loads what was compiled."""
    from streamctl.model import passes

    return passes


def _over_rows(run: Callable[[int, int], None], count: int, each: int = 1) -> None:
    """run(first, last) over `count` things of `each` rows, on all threads."""
    share = -(-count // torch.get_num_threads())
    share = -(-share // _tiles().SOME) * _tiles().SOME
    threads.over_ranges(run, count, max(1, min(share, _RANGE * _tiles().BLOCK // max(1, each))))


class Rows:
    """The real positions of a padded batch, user by user.

    Attributes:
        place: (N,) int64 their places in the flat batch; None when nothing is padded.
        users: (N,) int64 whose they are. starts: (B + 1,) int64 each user's first.
    """

    def __init__(self, batch: int, length: int, mask: torch.Tensor | None):
        if mask is None:
            self.place, counts = None, np.full(batch, length)
        else:
            self.place, counts = mask.flatten().nonzero()[:, 0], mask.sum(1).numpy()
        self.counts = counts.astype(np.int64)
        self.users = np.repeat(np.arange(batch), self.counts)
        self.starts = np.concatenate([np.zeros(1, np.int64), self.counts.cumsum()])

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (N, d)."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.place is None else x.index_select(0, self.place)

    def restore(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """(N, d) -> (B, S, d), zero where padded."""
        if self.place is None:
            return x.view(shape)
        return x.new_zeros(shape[0] * shape[1], shape[2]).index_copy_(0, self.place, x).view(shape)


class _PackedStack:
    """What the packed forms of both stacks have in common.

    Attributes:
        dtype: of what goes in and comes out.
        like: of the weights and of what products read, see `_like`.
    """

    def __init__(self, stack: nn.Module, dtype: torch.dtype):
        first, last = stack.block[0].layer[0].SelfAttention, stack.block[0].layer[-1]
        self.heads, self.d_kv = first.heads, first.d_kv
        d_ff, d_model = last.DenseReluDense.wi.weight.shape
        self.dtype, self.like = dtype, _like(dtype, d_model, d_ff, self.d_kv)
        self.eps = np.float32(stack.final_layer_norm.eps)
        layers = [layer for block in stack.block for layer in block.layer]
        norms = [*(layer.layer_norm for layer in layers), stack.final_layer_norm]
        self.norms = np.stack([norm.weight.detach().float().numpy() for norm in norms])
        attentions = [block.layer[0].SelfAttention for block in stack.block]
        joined = [torch.cat([a.q.weight, a.k.weight, a.v.weight]) for a in attentions]
        self.joined = self.stacked(joined)
        self.merge = self.stacked([a.o.weight for a in attentions])
        feed_forward = [block.layer[-1].DenseReluDense for block in stack.block]
        self.up = self.stacked([layer.wi.weight for layer in feed_forward])
        self.down = self.stacked([layer.wo.weight for layer in feed_forward])

    def stacked(self, weights: list[torch.Tensor]) -> np.ndarray:
        """A weight of every layer: (layers, tiles, words, WIDTH)."""
        return np.stack([_tiles().pack(weight, self.like) for weight in weights])

    def kept(self, layers: int, users: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for keys and values as `passes` lays them out, zero."""
        each = 2 if self.like == torch.bfloat16 else 1
        across = _tiles().padded(positions) // _tiles().WIDTH, self.d_kv // each
        along = _tiles().padded(self.d_kv) // _tiles().WIDTH, -(-positions // each)
        return tuple(
            torch.zeros(layers, users, self.heads, *part, _tiles().WIDTH, each, dtype=self.like)
            for part in (across, along)
        )


class PackedEncoder(_PackedStack):
    """The weights of an `Encoder` in one dtype."""

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """States (B, S, d) of embedded positions (B, S, d); zero where the mask is False."""
        batch, length, width = x.shape
        rows = Rows(batch, length, mask)
        count = len(rows.users)
        stream = torch.zeros(count, _tiles().padded(width))
        stream[:, :width] = rows.take(x)
        out = torch.empty(count, width, dtype=self.like)
        queries = torch.empty(count, self.heads * self.d_kv, dtype=self.like)
        kept = self.kept(2, batch, length)  # of this layer and of the next, in turns
        keys, values = (_numpy(part) for part in kept)
        table = bias.float().contiguous().numpy()
        weights = self.norms, self.eps, self.joined, self.merge, self.up, self.down
        arrays = (stream.numpy(), *weights, table, rows.users, rows.starts)
        passes = _passes()
        for layer in range(-1, len(self.joined)):
            old, new = layer % 2, (layer + 1) % 2

            def run(first, last, layer=layer, old=old, new=new):
                passes.encode(
                    layer, *arrays, first, last, _numpy(queries), keys[old], values[old],
                    keys[new], values[new], _numpy(out),
                )  # fmt: skip

            _over_rows(run, count)
        return rows.restore(out.to(self.dtype), x.shape)

    @staticmethod
    def sample(encoder: nn.Module, x: torch.Tensor) -> None:
        """Work that is typical of an encoder, to be timed."""
        encoder(x)


class Memory:
    """Every layer's cross-attention keys and values of B users, and the decoder they belong to.

    Attributes:
        keys, values: (layers, B, h, tiles, words, WIDTH, 1 or 2), see `passes.remember`.
        counts: (B,) int64 positions of each user.
    """

    def __init__(
        self, decoder: PackedDecoder, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor
    ):
        self.decoder, self.keys, self.values, self.counts = decoder, keys, values, counts

    def rows(self, index: torch.Tensor) -> Memory:
        """Some users only, or users repeated: index (B',) int64."""
        kept = self.keys[:, index], self.values[:, index]
        return Memory(self.decoder, *kept, self.counts[index])


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
        """Itself: branches to come read the same rows of the store."""
        return self

    def reorder(self, parent: torch.Tensor) -> Branches:
        """Branch w continues old branch parent[:, w]; parent (B, W') int64."""
        taken = parent.expand(len(self.index), *parent.shape)
        return Branches(self.store, self.index.gather(2, taken))

    def extended(self, users: int, branches: int, steps: int) -> Branches:
        """The same with `steps` more tokens of each branch, whose rows are still to be filled."""
        count = users * branches * steps
        first = self.store.add(count, spare=self.length > 0)
        new = torch.arange(first, first + count).view(users, branches, steps)
        old = self.index.expand(-1, users, branches)
        return Branches(self.store, torch.cat([old, new.permute(2, 0, 1)]))


class PackedDecoder(_PackedStack):
    """The weights of a `Decoder` in one dtype."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype):
        super().__init__(decoder, dtype)
        attentions = [block.layer[1].EncDecAttention for block in decoder.block]
        self.query = self.stacked([a.q.weight for a in attentions])
        self.cross = self.stacked([a.o.weight for a in attentions])
        joined = torch.cat([w for a in attentions for w in (a.k.weight, a.v.weight)])
        self.keys_values = _tiles().pack(joined, self.like)

    def memory(self, states: torch.Tensor, mask: torch.Tensor | None) -> Memory:
        """Keys and values of all layers from one matrix product over the real positions."""
        rows = Rows(*states.shape[:2], mask)
        keys, values = self.kept(len(self.joined), *states.shape[:2])
        given = rows.take(states).to(self.like).contiguous()
        arrays = _numpy(given), self.keys_values, rows.users, rows.starts
        passes = _passes()
        kept = _numpy(keys), _numpy(values)

        def run(first, last):
            passes.remember(*arrays, first, last, *kept)

        _over_rows(run, len(given))
        return Memory(self, keys, values, torch.from_numpy(rows.counts))

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        memory: Memory,
        past: Branches | None,
        last_only: bool,
    ) -> tuple[torch.Tensor, Branches]:
        """`Decoder.forward`: x (B, W, T, d) embedded, bias (h, T, all tokens)."""
        users, branches, steps, width = x.shape
        if past is None:
            store = Store(len(self.joined), 2 * self.heads * self.d_kv, self.like)
            past = Branches(store, torch.empty(0, users, branches, dtype=torch.int64))
        past = past.extended(users, branches, steps)
        shape = users, branches, 1 if last_only else steps, width
        out = torch.empty(shape, dtype=self.like)
        arrays = (
            x.reshape(-1, width).float().contiguous().numpy(), self.norms, self.eps, self.joined,
            self.merge, self.query, self.cross, self.up, self.down, _numpy(past.store.rows),
            past.index.flatten(1).numpy(), bias.float().contiguous().numpy(), _numpy(memory.keys),
            _numpy(memory.values), memory.counts.numpy(), branches, last_only,
        )  # fmt: skip
        hidden, passes = _numpy(out.view(-1, width)), _passes()

        def run(first, last):
            passes.decode(*arrays, first, last, hidden)

        _over_rows(run, users * branches, steps)
        return out.to(self.dtype), past

    @staticmethod
    def sample(decoder: nn.Module, states: torch.Tensor) -> None:
        """Work that is typical of a decoder, to be timed: keys, a first token, a beam of them."""
        memory, first = decoder.memory(states), states[:, None, :1]
        _, past = decoder(first, memory)
        branches = torch.zeros(len(states), _BEAM, dtype=torch.int64)
        decoder(first.expand(-1, _BEAM, -1, -1), memory, None, past.reorder(branches))


class PackedTable:
    """The tied embedding as the last product: its weights in one dtype."""

    def __init__(self, table: nn.Embedding, dtype: torch.dtype):
        self.like = _like(dtype, table.embedding_dim)
        self.size, self.weight = len(table.weight), _tiles().pack(table.weight, self.like)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V) float32."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self.like).contiguous()
        out = torch.empty(len(rows), _tiles().padded(self.size))
        arrays, target = (_numpy(rows), self.weight), out.numpy()
        passes = _passes()

        def run(first, last):
            passes.product(*arrays, first, last, target)

        _over_rows(run, len(rows))
        return out.view(*hidden.shape[:-1], out.shape[1])[..., : self.size]


def scores(table: nn.Embedding, hidden: torch.Tensor) -> torch.Tensor:
    """(..., d) times the tied embedding: (..., V).

    Float32 without gradients: a logit in bf16 would be off by a hundredth, and products are few.
    """
    if (ready := packed(table, PackedTable, hidden)) is not None:
        return ready(hidden)
    if hidden.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(hidden, table.weight)
    with torch.autocast("cpu", enabled=False):
        return F.linear(hidden.float(), table.weight.float())


def packed(module: nn.Module, kind: Callable[..., Any], x: torch.Tensor) -> Any:
    """The module's packed weights, or None where they do not apply or plain PyTorch is faster.

    They apply on a CPU, in float32 or bf16, where no gradient is wanted and no dropout is on; the
    dtype is autocast's where it is on. They are packed again when a weight has changed. Which way
    is faster is measured once (`kernels.choice`), unless STREAMCTL_DECODE=packed or plain.

    Args:
        module: an encoder, a decoder or the token embedding. kind: its packed form.
        x: what it is about to be given, (B, S, d).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or not compiled.ready():
        return None
    if module.training and getattr(module, "p", 0):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    way = _way.get() or os.environ.get("STREAMCTL_DECODE") or "auto"
    if way not in WAYS:
        raise UsageError(f"STREAMCTL_DECODE: unknown way {way!r}; known: {', '.join(WAYS)}")
    if way == "auto" and hasattr(kind, "sample"):
        way = _faster(module, kind, x, dtype)
    return None if way == "plain" else _ready(module, kind, dtype)


def _ready(module: nn.Module, kind: Callable[..., Any], dtype: torch.dtype) -> Any:
    kept = _PACKED.setdefault(module, {})
    if dtype in kept:
        weights, version, ready = kept[dtype]
        if _versions(weights) == version:
            return ready
        del ready
        kept[dtype] = [], None, None  # the old ones go before the new ones take as much memory
    weights = list(module.parameters())
    version = _versions(weights)
    with torch.autocast("cpu", enabled=False):
        ready = kind(module, dtype)
    kept[dtype] = weights, version, ready
    return ready


def _faster(
    module: nn.Module, kind: Callable[..., Any], x: torch.Tensor, dtype: torch.dtype
) -> str:
    """The way that `choice.fastest` has found for roughly so many users."""
    users = min((size for size in _USERS if size * 2 >= len(x)), default=_USERS[-1])
    key = dtype, users, torch.get_num_threads()
    known = _CHOSEN.setdefault(module, {})
    if key not in known:
        # Of its own generator: a training's chance must not depend on what has been measured.
        own = torch.Generator().manual_seed(0)
        sample = torch.randn(users, _LENGTH, x.shape[-1], generator=own).to(x.dtype)
        known[key] = choice.fastest(*_question(module, kind, sample, dtype))
    return known[key]


def _question(
    module: nn.Module, kind: Callable[..., Any], sample: torch.Tensor, dtype: torch.dtype
) -> tuple[str, dict[str, Callable[[], Any]]]:
    """What `choice.fastest` is asked: the shapes, and the two ways."""
    users, length, _ = sample.shape
    weights = [weight for weight in module.parameters() if weight.ndim == 2][:8]
    shapes = "/".join("x".join(map(str, weight.shape)) for weight in weights)
    name = f"{kind.__name__} {len(list(module.parameters()))} weights {shapes}"
    name += f" {dtype} {users} users of {length}, {torch.get_num_threads()} threads"

    def by(way: str) -> Callable[[], Any]:
        def run() -> None:
            token = _way.set(way)
            try:
                kind.sample(module, sample)
            finally:
                _way.reset(token)

        return run

    return name, {way: by(way) for way in WAYS[1:]}


def _count(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Marks what an optimiser has just trained: fused ones leave no trace in the weights."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.steps_taken = getattr(weight, "steps_taken", 0) + 1


register_optimizer_step_post_hook(_count)


def _versions(weights: list[nn.Parameter]) -> list[tuple[int, int, int]]:
    """Changes when a weight is written to, trained or moved."""
    return [
        (w.data_ptr(), 0 if w.is_inference() else w._version, getattr(w, "steps_taken", 0))
        for w in weights
    ]
