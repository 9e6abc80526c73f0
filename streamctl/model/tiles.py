"""Matrix products for compiled loops, with weights stored in the tiles that they read.

A tile holds `WIDTH` outputs of a weight; its words (a float32, or two bf16 that one instruction
multiplies) lie in the order in which the product reads them, so that a tile stays in the first
cache while rows pass by in groups whose sums stay in registers. Sums are float32 and added in the
order of the inputs: a row's result depends on nothing but the row and the weight.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from streamctl.kernels import simd

VECTORS = 2
WIDTH = VECTORS * simd.LANES  # outputs of a tile
BLOCK = 40  # rows of a block: their activations fill half of a small second-level cache
# Rows whose sums stay in registers together, beside a tile's vectors.
MOST, SOME, FEW = (10, 5, 2) if simd.LANES == 16 else (6, 3, 2)
_INTEGER, _WORD = ir.IntType(64), ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), simd.LANES)
_WORDS = ir.VectorType(_WORD, simd.LANES)


def padded(width: int) -> int:
    """The width of an output that holds whole tiles."""
    return -(-width // WIDTH) * WIDTH


def pack(weight: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """A weight (out, in) as tiles (ceil(out / WIDTH), words, WIDTH) int32 of float32 or bf16.

    With bf16 the number of inputs must be even.
    """
    out, inputs = weight.shape
    rows = torch.zeros(padded(out), inputs, dtype=dtype)
    rows[:out] = weight.detach()
    each = 2 if dtype == torch.bfloat16 else 1
    tiles = rows.view(-1, WIDTH, inputs // each, each).transpose(1, 2).contiguous()
    return tiles.view(torch.int32).view(*tiles.shape[:3]).numpy()


def _body(builder: ir.IRBuilder, rows: int, bf16: bool, args) -> None:
    """out[r] = x[r] @ tile (+ out[r]) for `rows` rows; addresses are integers, strides in bytes."""
    x, stride, tile, words, more, out, out_stride = args
    const = lambda value: ir.Constant(_INTEGER, value)  # noqa: E731
    at = lambda base, offset, kind: builder.inttoptr(  # noqa: E731
        builder.add(base, offset), kind.as_pointer()
    )
    multiply_add = simd.fused_multiply_add(builder, bf16)
    columns = [const(4 * simd.LANES * v) for v in range(VECTORS)]
    places = [
        at(builder.add(out, builder.mul(out_stride, const(r))), column, _FLOATS)
        for r in range(rows)
        for column in columns
    ]
    zero = ir.Constant(_FLOATS, None)
    more = builder.trunc(more, ir.IntType(1))
    start = [builder.select(more, builder.load(place, align=4), zero) for place in places]
    lines = [builder.add(x, builder.mul(stride, const(r))) for r in range(rows)]
    before = builder.block
    loop, after = builder.append_basic_block("words"), builder.append_basic_block("store")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_INTEGER)
    step.add_incoming(const(0), before)
    sums = [builder.phi(_FLOATS) for _ in places]
    base = builder.add(tile, builder.mul(step, const(4 * WIDTH)))
    vectors = [builder.load(at(base, column, _WORDS), align=4) for column in columns]
    offset, totals = builder.mul(step, const(4)), []
    for r in range(rows):
        word = builder.load(at(lines[r], offset, _WORD), align=2)
        value = simd.splat(builder, word, _WORDS)
        for v in range(VECTORS):
            totals.append(multiply_add(sums[r * VECTORS + v], vectors[v], value))
    for total, first, final in zip(sums, start, totals, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(final, loop)
    following = builder.add(step, const(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, words), loop, after)
    builder.position_at_end(after)
    for place, total in zip(places, totals, strict=True):
        builder.store(total, place, align=4)


def _rows(rows: int):
    @intrinsic
    def multiply_rows(typing, like, x, stride, tile, words, more, out, out_stride):
        bf16 = like == types.uint16

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [_INTEGER] * 7)
            name = f"streamctl_tile_{'bf16' if bf16 else 'f32'}_{rows}"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            if function.is_declaration:
                function.linkage = "internal"
                function.attributes.add("noinline")  # called from many places: compiled once
                inner = ir.IRBuilder(function.append_basic_block("entry"))
                _body(inner, rows, bf16, function.args)
                inner.ret_void()
            builder.call(function, args[1:])
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 7), codegen

    return multiply_rows


most, some, few, one = (_rows(count) for count in (MOST, SOME, FEW, 1))
