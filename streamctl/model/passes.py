"""Passes of a stack over blocks of rows, compiled: what `frozen.py` runs on its threads.

A row is a position of a user's history or a token of a branch. Everything that a block of rows
needs between two points where rows meet stays in one core's cache: norms, products (`tiles.py`),
attention, the residual stream (float32). Arrays that products read are float32 or bf16 bits, the
dtype of the weights ("like" below); keys and values lie as tiles of their own, a user and head
together, and hold real positions only.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from streamctl.kernels.compiled import OPTIONS
from streamctl.model import tiles
from streamctl.model.loops import attend, narrow, weigh

BLOCK, _WIDTH = tiles.BLOCK, tiles.WIDTH
_SUMS: dict[str, Any] = {**OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}


# Signatures, lest Numba compile it again for every mixture of signed, unsigned and literal numbers.
@numba.njit(
    [types.void(like, *[types.intp] * 10) for like in (types.float32, types.uint16)], **OPTIONS
)
def multiply(like, x, stride, rows, weight, tile_bytes, count, words, more, out, out_stride):
    """out = x @ weight.T for `rows` rows and the first `count` tiles of a weight.

    Args:
        like: an element of x, float32 or bf16 bits (uint16).
        x, weight, out: addresses; the rows of x lie `stride` bytes apart, those of out, float32,
            `out_stride`, the tiles of the weight `tile_bytes`.
        words: how many of a tile's words, and of a row's, are read; one or more.
        more: 1 adds to what is in out, 0 does not.
    """
    for number in range(count):
        tile, target, row = weight + number * tile_bytes, out + 4 * _WIDTH * number, 0
        while row + tiles.MOST <= rows:
            at = target + row * out_stride
            tiles.most(like, x + row * stride, stride, tile, words, more, at, out_stride)
            row += tiles.MOST
        while row + tiles.SOME <= rows:
            at = target + row * out_stride
            tiles.some(like, x + row * stride, stride, tile, words, more, at, out_stride)
            row += tiles.SOME
        while row + tiles.FEW <= rows:
            at = target + row * out_stride
            tiles.few(like, x + row * stride, stride, tile, words, more, at, out_stride)
            row += tiles.FEW
        if row < rows:
            at = target + row * out_stride
            tiles.one(like, x + row * stride, stride, tile, words, more, at, out_stride)


@numba.njit(**_SUMS)
def _norm(stream, weight, eps, rows, out):
    """out[:rows] = RMSNorm of the stream, whose rows may be wider than the weight."""
    width = weight.shape[0]
    for row in range(rows):
        square = np.float32(0)
        for j in range(width):
            square += stream[row, j] * stream[row, j]
        factor = np.float32(1) / np.sqrt(square / np.float32(width) + eps)
        for j in range(width):
            out[row, j] = narrow(stream[row, j] * factor * weight[j], out[row, j])


@numba.njit(**OPTIONS)
def _narrowed(source, rows, width, relu, out):
    """out[:rows, :width] = source, rounded, after ReLU where wanted."""
    for row in range(rows):
        for j in range(width):
            value = source[row, j]
            if relu:
                value = value if value > np.float32(0) else np.float32(0)
            out[row, j] = narrow(value, out[row, j])


@numba.njit(**OPTIONS)
def _product(x, rows, weight, more, out):
    """out[:rows] = x @ weight (+ out); weight (tiles, words, WIDTH), out (.., tiles * WIDTH)."""
    multiply(
        x[0, 0], x.ctypes.data, x.strides[0], rows, weight.ctypes.data, weight.strides[0],
        weight.shape[0], weight.shape[1], more, out.ctypes.data, out.strides[0],
    )  # fmt: skip


@numba.njit(**OPTIONS)
def product(x, weight, first, last, out):
    """Rows first..last of out (N, tiles * WIDTH) float32 = x (N, words) @ weight."""
    _product(x[first:last], last - first, weight, 0, out[first:last])


@numba.njit(**OPTIONS)
def _keep(row, position, keys, values):
    """Put a row's keys and values where those of its user's other rows lie.

    Args:
        row: like, h * size keys, then as many values.
        keys: (h, tiles, words, WIDTH, each) like, a tile WIDTH positions.
        values: (h, tiles, words, WIDTH, each) like, a tile WIDTH columns.
    """
    heads, _, words, _, each = keys.shape
    size, odd = words * each, each - 1  # each is 1 or 2: shifts instead of divisions
    tile, lane = position // _WIDTH, position % _WIDTH
    word, half = position >> odd, position & odd
    for head in range(heads):
        source = row[head * size : (head + 1) * size]
        target = keys[head, tile]
        for j in range(size):
            target[j >> odd, lane, j & odd] = source[j]
        source = row[(heads + head) * size : (heads + head + 1) * size]
        for number in range(values.shape[1]):
            line, begin = values[head, number, word], number * _WIDTH
            for j in range(min(_WIDTH, size - begin)):
                line[j, half] = source[begin + j]


@numba.njit(**OPTIONS)
def _look(queries, rows, keys, values, count, bias, position, scores, shares, mixed):
    """Attention of a user's queries to `count` kept positions.

    Args:
        queries: (rows, h * size) like. scores, shares: scratch, (rows, ..) float32 and like.
        bias: (h, T, S) float32, row position + i for query i; without rows none is added.
        mixed: (rows, >= h * size + WIDTH) float32, filled.
    """
    heads, _, words, _, each = keys.shape
    like, size = queries[0, 0], words * each
    if not count:
        mixed[:rows, : heads * size] = 0
        return
    whole = -(-count // each)  # words of the values that hold a position
    for head in range(heads):
        place = queries.ctypes.data + head * size * queries.itemsize
        multiply(
            like, place, queries.strides[0], rows, keys[head].ctypes.data, keys.strides[1],
            -(-count // _WIDTH), words, 0, scores.ctypes.data, scores.strides[0],
        )  # fmt: skip
        for row in range(rows):
            line = scores[row]
            if bias.shape[0]:
                added = bias[head, position + row]
                for j in range(count):
                    line[j] += added[j]
            weigh(line, count)
            for j in range(count, whole * each):
                line[j] = np.float32(0)
        _narrowed(scores, rows, whole * each, False, shares)
        # The columns past a head's are the next one's, which overwrites them.
        multiply(
            like, shares.ctypes.data, shares.strides[0], rows, values[head].ctypes.data,
            values.strides[1], values.shape[1], whole, 0,
            mixed.ctypes.data + head * size * mixed.itemsize, mixed.strides[0],
        )  # fmt: skip


@numba.njit(**OPTIONS)
def _feed_forward(stream, rows, norm, eps, up, down, normed, wide, inner):
    """stream[:rows] += the feed-forward layer of its norm."""
    _norm(stream, norm, eps, rows, normed)
    _product(normed, rows, up, 0, wide)
    _narrowed(wide, rows, up.shape[0] * _WIDTH, True, inner)
    _product(inner, rows, down, 1, stream)


@numba.njit(**OPTIONS)
def encode(
    layer, stream, norms, eps, joined, merge, up, down, bias, users, starts, first, last,
    queries, keys, values, next_keys, next_values, out,
):  # fmt: skip
    """A layer of an encoder on rows first..last, and what the next one needs of them.

    Args:
        layer: its number; -1 only makes the first layer's queries, keys and values.
        stream: (N, padded d) float32, the residual stream of all users' positions, updated.
        norms: (2 * layers + 1, d) float32. joined, merge, up, down: (layers, tiles, words, WIDTH).
        bias: (h, S, S) float32.
        users: (N,) int64 whose row it is. starts: (B + 1,) int64, each user's first row.
        queries: (N, h * size) like, read, then overwritten with the next layer's.
        keys, values: (B, h, tiles, words, WIDTH, each) like, this layer's of all rows.
        next_keys, next_values: the same of the next layer, filled in; not after the last layer.
        out: (N, d) like, the norm of the stream, filled in after the last layer.
    """
    width, inner, positions = norms.shape[1], queries.shape[1], bias.shape[1]
    like, layers = queries, len(joined)
    normed = np.empty((BLOCK, width), like.dtype)
    mixed = np.empty((BLOCK, inner), like.dtype)
    wide_columns = max(joined.shape[1], up.shape[1]) * _WIDTH
    wide = np.empty((BLOCK, max(wide_columns, inner + _WIDTH)), np.float32)
    hidden = np.empty((BLOCK, up.shape[1] * _WIDTH), like.dtype)
    kept = np.empty((BLOCK, 2 * inner), like.dtype)
    scores = np.empty((BLOCK, (positions + _WIDTH) // _WIDTH * _WIDTH), np.float32)
    shares = np.empty((BLOCK, positions + 1), like.dtype)
    for begin in range(first, last, BLOCK):
        end = min(last, begin + BLOCK)
        rows, own = end - begin, stream[begin:end]
        if layer >= 0:
            row = begin
            while row < end:
                user = users[row]
                stop = min(end, starts[user + 1])
                _look(
                    queries[row:stop], stop - row, keys[user], values[user],
                    starts[user + 1] - starts[user], bias, row - starts[user], scores, shares,
                    wide[row - begin :],
                )  # fmt: skip
                row = stop
            _narrowed(wide, rows, inner, False, mixed)
            _product(mixed, rows, merge[layer], 1, own)
            norm = norms[2 * layer + 1]
            _feed_forward(own, rows, norm, eps, up[layer], down[layer], normed, wide, hidden)
        if layer + 1 == layers:
            _norm(own, norms[2 * layers], eps, rows, out[begin:end])
            continue
        _norm(own, norms[2 * layer + 2], eps, rows, normed)
        _product(normed, rows, joined[layer + 1], 0, wide)
        _narrowed(wide, rows, inner, False, queries[begin:end])
        _narrowed(wide[:, inner:], rows, 2 * inner, False, kept)
        for row in range(rows):
            user = users[begin + row]
            position = begin + row - starts[user]
            _keep(kept[row], position, next_keys[user], next_values[user])


@numba.njit(**OPTIONS)
def remember(states, weight, users, starts, first, last, keys, values):
    """Cross-attention keys and values of encoder states (N, d) like, rows first..last.

    Args:
        weight: (tiles, words, WIDTH), each layer's keys and values side by side.
        keys, values: (layers, B, h, tiles, words, WIDTH, each) like, filled in.
    """
    layers, _, heads, _, words, _, each = keys.shape
    inner = heads * words * each
    wide = np.empty((BLOCK, weight.shape[0] * _WIDTH), np.float32)
    kept = np.empty((BLOCK, 2 * layers * inner), states.dtype)
    for begin in range(first, last, BLOCK):
        rows = min(last, begin + BLOCK) - begin
        _product(states[begin : begin + rows], rows, weight, 0, wide)
        _narrowed(wide, rows, 2 * layers * inner, False, kept)
        for row in range(rows):
            user = users[begin + row]
            position = begin + row - starts[user]
            for layer in range(layers):
                own = kept[row, 2 * layer * inner : 2 * (layer + 1) * inner]
                _keep(own, position, keys[layer, user], values[layer, user])


@numba.njit(**OPTIONS)
def decode(
    x, norms, eps, joined, merge, query, cross, up, down, store, index, bias, keys, values,
    counts, branches, last_only, first, last, out,
):  # fmt: skip
    """New tokens of branches first..last (of all users, side by side) through a decoder.

    Args:
        x: (N, d) float32 embedded tokens, `steps` a branch.
        norms: (3 * layers + 1, d) float32.
        joined, merge, query, cross, up, down: (layers, tiles, words, WIDTH).
        store: (layers, rows, 2 * h * size) like. index: (tokens, all branches) int64; see
            `loops.attend`, which fills in the new tokens' rows.
        bias: (h, steps, tokens) float32.
        keys, values: of `remember`. counts: (B,) int64 positions of each user.
        branches: of a user.
        last_only: only the states of each branch's last token are wanted.
        out: (N, d) like, filled in; (branches, d) of the last ones only.
    """
    width, inner, steps = norms.shape[1], store.shape[2] // 2, bias.shape[1]
    like, layers = store, len(joined)
    block = max(BLOCK // steps, 1)
    most, positions = block * steps, keys.shape[3] * _WIDTH
    stream = np.zeros((most, down.shape[1] * _WIDTH), np.float32)
    normed = np.empty((most, width), like.dtype)
    mixed = np.empty((most, inner), like.dtype)
    wide_columns = max(joined.shape[1], up.shape[1]) * _WIDTH
    wide = np.empty((most, max(wide_columns, inner + _WIDTH)), np.float32)
    projected = np.empty((most, 3 * inner), like.dtype)
    hidden = np.empty((most, up.shape[1] * _WIDTH), like.dtype)
    scores = np.empty((most, positions), np.float32)
    shares = np.empty((most, positions + 1), like.dtype)
    no_bias = np.empty((0, 0, 0), np.float32)
    for begin in range(first, last, block):
        end = min(last, begin + block)
        rows, each = (end - begin) * steps, steps
        for row in range(rows):  # a loop: an assignment of slices takes seconds to compile
            for j in range(width):
                stream[row, j] = x[begin * steps + row, j]
        for layer in range(layers):
            _norm(stream, norms[3 * layer], eps, rows, normed)
            _product(normed, rows, joined[layer], 0, wide)
            _narrowed(wide, rows, 3 * inner, False, projected)
            attend(projected, store[layer], index[:, begin:end], bias, 0, end - begin, mixed)
            if last_only and layer + 1 == layers:  # of the others only keys and values are read
                rows, each = end - begin, 1
                for row in range(rows):
                    line = (row + 1) * steps - 1
                    for j in range(width):
                        stream[row, j] = stream[line, j]
                    for j in range(inner):
                        mixed[row, j] = mixed[line, j]
            _product(mixed, rows, merge[layer], 1, stream)
            _norm(stream, norms[3 * layer + 1], eps, rows, normed)
            _product(normed, rows, query[layer], 0, wide)
            _narrowed(wide, rows, inner, False, mixed)
            branch = begin
            while branch < end:
                user = branch // branches
                stop = min(end, (user + 1) * branches)
                at, until = (branch - begin) * each, (stop - begin) * each
                _look(
                    mixed[at:until], until - at, keys[layer, user], values[layer, user],
                    counts[user], no_bias, 0, scores, shares, wide[at:],
                )  # fmt: skip
                branch = stop
            _narrowed(wide, rows, inner, False, mixed)
            _product(mixed, rows, cross[layer], 1, stream)
            norm = norms[3 * layer + 2]
            _feed_forward(stream, rows, norm, eps, up[layer], down[layer], normed, wide, hidden)
        _norm(stream, norms[3 * layers], eps, rows, out[begin * each : end * each])
