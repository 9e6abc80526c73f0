"""The loops of `fused.py`, compiled by Numba: float32 or bf16 bits in and out, float32 inside.

Each fills rows (or flat elements) first..last of its outputs, so that threads can share the work.
Dropout keeps an element where the hash of (seed, position) is at least the threshold.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from streamctl.kernels.compiled import OPTIONS

_SUMS: dict[str, Any] = {**OPTIONS, "fastmath": {"reassoc", "contract", "nsz"}}
# Comparisons vectorize only where NaN need not be kept: NaN is looked for apart.
_ORDERED: dict[str, Any] = {**OPTIONS, "fastmath": {"reassoc", "contract", "nsz", "nnan"}}


@intrinsic
def widen(typing, value):
    """float32 of a float32, or of bf16 bits (uint16)."""

    def codegen(context, builder, signature, args):
        if value == types.float32:
            return args[0]
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), codegen


@intrinsic
def narrow(typing, value, like):
    """A float32 as float32, or rounded to even as bf16 bits: whichever type `like` has."""

    def codegen(context, builder, signature, args):
        if like == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        bits = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(bits, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), codegen


@numba.njit(**OPTIONS)
def _hash(position, seed):
    """32 well mixed bits of a position and a seed (two rounds of multiply and shift)."""
    # Numba widens arithmetic on uint32 to 64 bits, hence the casts.
    bits = np.uint32(np.uint32(position) ^ np.uint32(seed))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> 16)) * np.uint32(0x7FEB352D))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> 15)) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ np.uint32(bits >> 16))


@numba.njit(**_SUMS)
def norm_forward(x, delta, weight, eps, seed, threshold, scale, first, last, total, out, inverse):
    """total = x + dropout(delta); out = total * inverse * weight, rows first..last."""
    width = x.shape[1]
    for row in range(first, last):
        base = np.uint32(row * width)
        square = np.float32(0)
        if delta.shape[0]:
            for j in range(width):
                value = widen(delta[row, j])
                if threshold:
                    kept = _hash(base + np.uint32(j), seed) >= threshold
                    value = value * scale if kept else np.float32(0)
                stored = narrow(widen(x[row, j]) + value, x[row, j])
                total[row, j] = stored
                value = widen(stored)
                square += value * value
            source = total
        else:
            for j in range(width):
                value = widen(x[row, j])
                square += value * value
            source = x
        factor = np.float32(1) / np.sqrt(square / np.float32(width) + eps)
        inverse[row] = factor
        for j in range(width):
            out[row, j] = narrow(widen(source[row, j]) * factor * weight[j], out[row, j])


@numba.njit(**_SUMS)
def norm_backward(
    total, weight, inverse, grad_total, grad_out, seed, threshold, scale, first, last,
    grad_x, grad_delta, grad_weight,
):  # fmt: skip
    """Gradients of `norm_forward`; grad_weight (width,) is added to."""
    width = total.shape[1]
    for row in range(first, last):
        base = np.uint32(row * width)
        factor = inverse[row]
        dot = np.float32(0)
        for j in range(width):
            value, slope = widen(total[row, j]), widen(grad_out[row, j])
            grad_weight[j] += slope * value * factor
            dot += slope * weight[j] * value
        pull = dot * factor * factor * factor / np.float32(width)
        for j in range(width):
            slope = widen(grad_out[row, j]) * weight[j] * factor
            value = slope - pull * widen(total[row, j])
            if grad_total.shape[0]:
                value += widen(grad_total[row, j])
            grad_x[row, j] = narrow(value, grad_x[row, j])
            if grad_delta.shape[0]:
                if threshold:
                    kept = _hash(base + np.uint32(j), seed) >= threshold
                    value = value * scale if kept else np.float32(0)
                grad_delta[row, j] = narrow(value, grad_delta[row, j])


@numba.njit(**OPTIONS)
def drop(x, seed, threshold, scale, first, last, out):
    """out = dropout(x) over the flat elements first..last."""
    # Counted from zero in 32 bits, which vectorizes; positions are those of the whole array.
    base, source, target = np.uint32(first), x[first:last], out[first:last]
    for i in range(last - first):
        kept = _hash(base + np.uint32(i), seed) >= threshold
        value = widen(source[i]) * scale if kept else np.float32(0)
        target[i] = narrow(value, target[i])


@intrinsic
def _nearest(typing, value):
    """The whole number nearest to a float32."""

    def codegen(context, builder, signature, args):
        single = ir.FloatType()
        kind = ir.FunctionType(single, [single])
        name = "llvm.nearbyint.f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return types.float32(types.float32), codegen


@intrinsic
def _power_of_two(typing, exponent):
    """2 ** exponent as float32, for an int32 exponent in -126..127."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@numba.njit(**OPTIONS)
def _exponential(value):
    """exp(value) for value <= 0, within 3e-7 relatively; written out so that it vectorizes."""
    value = value if value > np.float32(-87.0) else np.float32(-87.0)
    whole = _nearest(value * np.float32(1.44269504))
    r = value - whole * np.float32(0.693359375) - whole * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * _power_of_two(np.int32(whole)) if value > np.float32(-87.0) else np.float32(0)


@intrinsic
def _is_nan(typing, value):
    """Whether a float32 is NaN, by its bits: comparisons are optimised away under nnan."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.and_(builder.bitcast(args[0], word), ir.Constant(word, 0x7FFFFFFF))
        return builder.icmp_unsigned(">", bits, ir.Constant(word, 0x7F800000))

    return types.boolean(types.float32), codegen


@numba.njit(**_ORDERED)
def weigh(values, width):
    """values[:width] = softmax(values[:width]), all NaN if one of them is; float32."""
    top = np.float32(-np.inf)
    strange = False
    for j in range(width):
        strange |= _is_nan(values[j])
    if strange:
        for j in range(width):
            values[j] = np.float32(np.nan)
        return
    for j in range(width):
        top = values[j] if values[j] > top else top
    total = np.float32(0)
    for j in range(width):
        value = _exponential(values[j] - top)
        values[j] = value
        total += value
    share = np.float32(1) / total
    for j in range(width):
        values[j] *= share


@numba.njit(**OPTIONS)
def softmax_forward(scores, bias, mask, per_user, first, last, out):
    """out = softmax(scores + bias) row by row; closed keys get no weight.

    Row r takes row r % len(bias) of the bias and row r // per_user of the mask.
    """
    width = scores.shape[1]
    row_values = np.empty(width, np.float32)
    for row in range(first, last):
        for j in range(width):
            row_values[j] = widen(scores[row, j])
        if bias.shape[0]:
            added = bias[row % bias.shape[0]]
            for j in range(width):
                row_values[j] += added[j]
        if mask.shape[0]:
            open_keys = mask[row // per_user]
            for j in range(width):
                if not open_keys[j]:
                    row_values[j] = np.float32(-np.inf)
        weigh(row_values, width)
        for j in range(width):
            out[row, j] = narrow(row_values[j], out[row, j])


@numba.njit(**_SUMS)
def softmax_backward(weights, grad, first, last, out, grad_bias):
    """Gradient of the scores; added up over the rows of a bias into grad_bias (if it has rows)."""
    width = weights.shape[1]
    for row in range(first, last):
        dot = np.float32(0)
        for j in range(width):
            dot += widen(weights[row, j]) * widen(grad[row, j])
        for j in range(width):
            value = widen(weights[row, j]) * (widen(grad[row, j]) - dot)
            out[row, j] = narrow(value, out[row, j])
        if grad_bias.shape[0]:
            line = grad_bias[row % grad_bias.shape[0]]
            for j in range(width):
                line[j] += widen(weights[row, j]) * (widen(grad[row, j]) - dot)


@numba.njit(**_SUMS)
def attend(qkv, store, index, bias, first, last, out):
    """Causal attention of each branch's new tokens over its own tokens, old and new.

    Args:
        qkv: (branches * steps, 3 * h * d_kv) of the new tokens, whose keys and values are put into
            the store.
        store: (rows, 2 * h * d_kv) of a layer.
        index: (tokens, branches) int64, the store's rows.
        bias: (h, steps, tokens) float32.
        first, last: which branches.
        out: (branches * steps, h * d_kv), filled in.
    """
    heads, steps, tokens = bias.shape
    inner = out.shape[1]
    size = inner // heads
    before = tokens - steps
    query = np.empty(inner, np.float32)
    mixed = np.empty(inner, np.float32)
    weights = np.empty((heads, tokens), np.float32)
    for branch in range(first, last):
        for step in range(steps):
            line, row = branch * steps + step, index[before + step, branch]
            for j in range(2 * inner):
                store[row, j] = qkv[line, inner + j]
        for step in range(steps):
            line, seen = branch * steps + step, before + step + 1
            for j in range(inner):
                query[j] = widen(qkv[line, j])
                mixed[j] = np.float32(0)
            for token in range(seen):
                key = store[index[token, branch]]
                for head in range(heads):
                    begin = head * size
                    dot = bias[head, step, token]
                    for j in range(size):
                        dot += query[begin + j] * widen(key[begin + j])
                    weights[head, token] = dot
            for head in range(heads):
                weigh(weights[head], seen)
            for token in range(seen):
                value = store[index[token, branch]]
                for head in range(heads):
                    begin, share = head * size, weights[head, token]
                    for j in range(size):
                        mixed[begin + j] += share * widen(value[inner + begin + j])
            for j in range(inner):
                out[line, j] = narrow(mixed[j], out[line, j])
