"""The inner loop of nearest-codeword search as LLVM vector code, for Numba to inline.

Numba's loop vectorizer keeps neither a tile of accumulators in registers nor bf16 dot products,
so the tile is written out here: ROWS rows x TILE codewords, accumulated over the dimensions, then
folded into each row's running best two scores per lane. The plain float32 code is portable
(LLVM splits its vectors to fit the machine); the bf16 dot product needs AVX512-BF16.
"""

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()

# True when one instruction multiplies pairs of bf16 and adds them to float32: twice the products.
HAS_BF16_DOT = bool(_FEATURES.get("avx512bf16"))

# Lanes of a vector, rows and vectors of a tile: the accumulators, one row of codewords and one
# broadcast value fill the register file (32 registers with AVX-512 and on Arm, else 16).
if _FEATURES.get("avx512f"):
    LANES, ROWS, VECTORS = 16, 6, 4
elif _FEATURES.get("avx2"):
    LANES, ROWS, VECTORS = 8, 4, 3
else:
    LANES, ROWS, VECTORS = 4, 6, 4
TILE = LANES * VECTORS

_I64, _I32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_WORDS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(_F32, LANES)


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()


def splat(builder, value, vector):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector.count), None)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def fused_multiply_add(builder, bf16):
    """A function (accumulator, codewords, value) -> accumulator + codewords * value, as IR."""
    if bf16:
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        kind = ir.FunctionType(_FLOATS, [_FLOATS, pairs, pairs])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return lambda a, c, v: builder.call(
            function, [a, builder.bitcast(c, pairs), builder.bitcast(v, pairs)]
        )
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return lambda a, c, v: builder.call(
        function, [builder.bitcast(c, _FLOATS), builder.bitcast(v, _FLOATS), a]
    )


def _scan_body(builder, bf16, args):
    """For tiles [first, last) of packed codewords and ROWS packed rows: fold scores into the state.

    score = bias[k] + sum over steps of x * codes. The low bits of a score that are clear in
    `keep` are replaced by the number of its vector among the codebook's, so the running best
    carries its own index; `second` is the second best of each lane. Addresses are integers;
    x rows lie `stride` bytes apart, `best` and `second` rows one vector apart.
    """
    x, stride, codes, bias, best, second, steps, first, last, keep = args
    at = lambda base, offset, kind: builder.inttoptr(  # noqa: E731
        builder.add(base, offset), kind.as_pointer()
    )
    const = lambda value: ir.Constant(_I64, value)  # noqa: E731
    mul, add = builder.mul, builder.add
    multiply_add = fused_multiply_add(builder, bf16)
    vector_bytes = 4 * LANES
    tile_bytes = mul(steps, const(4 * TILE))
    keep = splat(builder, keep, _WORDS)
    larger = lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)  # noqa: E731
    smaller = lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b)  # noqa: E731
    rows = [add(x, mul(stride, const(r))) for r in range(ROWS)]

    with cgutils.for_range_slice(builder, first, last, const(1)) as (tile, _):
        tile_base = add(codes, mul(tile, tile_bytes))
        bias_base = add(bias, mul(tile, const(4 * TILE)))
        start = [
            builder.load(at(bias_base, const(v * vector_bytes), _FLOATS), align=4)
            for v in range(VECTORS)
        ]
        # The loop over dimensions, with the accumulators as phi nodes (registers).
        before = builder.block
        loop, after = builder.append_basic_block("dims"), builder.append_basic_block("fold")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(const(0), before)
        phis = [[builder.phi(_FLOATS) for _ in range(VECTORS)] for _ in range(ROWS)]
        for row in phis:
            for phi, value in zip(row, start, strict=True):
                phi.add_incoming(value, before)
        line = add(tile_base, mul(step, const(4 * TILE)))
        vectors = [
            builder.load(at(line, const(v * vector_bytes), _WORDS), align=4) for v in range(VECTORS)
        ]
        for r in range(ROWS):
            word = builder.load(at(rows[r], mul(step, const(4)), _I32), align=4)
            value = splat(builder, word, _WORDS)
            for v in range(VECTORS):
                phis[r][v].add_incoming(multiply_add(phis[r][v], vectors[v], value), loop)
        following = add(step, const(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

        builder.position_at_end(after)
        total = [[phi.incomings[1][0] for phi in row] for row in phis]
        number = builder.trunc(mul(tile, const(VECTORS)), _I32)
        tags = [splat(builder, add(number, ir.Constant(_I32, v)), _WORDS) for v in range(VECTORS)]
        for r in range(ROWS):
            best_at = at(best, const(r * vector_bytes), _FLOATS)
            second_at = at(second, const(r * vector_bytes), _FLOATS)
            top, runner_up = builder.load(best_at, align=4), builder.load(second_at, align=4)
            for v in range(VECTORS):
                bits = builder.bitcast(total[r][v], _WORDS)
                bits = builder.or_(builder.and_(bits, keep), tags[v])
                score = builder.bitcast(bits, _FLOATS)
                runner_up = larger(runner_up, smaller(top, score))
                top = larger(top, score)
            builder.store(top, best_at, align=4)
            builder.store(runner_up, second_at, align=4)


def _make_scan(bf16):
    @intrinsic
    def scan(typing, x, stride, codes, bias, best, second, steps, first, last, keep):
        signature = types.void(*[types.intp] * 9, types.int32)

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [_I64] * 9 + [_I32])
            name = f"streamctl_scan_{'bf16' if bf16 else 'f32'}_{ROWS}x{VECTORS}x{LANES}"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            if function.is_declaration:
                function.linkage = "internal"
                inner = ir.IRBuilder(function.append_basic_block("entry"))
                _scan_body(inner, bf16, function.args)
                inner.ret_void()
            builder.call(function, args)
            return context.get_dummy_value()

        return signature, codegen

    return scan


scan_f32 = _make_scan(False)
scan_bf16 = _make_scan(True) if HAS_BF16_DOT else scan_f32


def _vector_at(builder, base, index, kind=_FLOATS):
    """Pointer to the LANES float32 that start at element `index` of the array at `base`."""
    offset = builder.mul(index, ir.Constant(_I64, 4))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _total(builder, vector):
    """The sum of a vector's lanes, by halves."""
    distance = LANES // 2
    while distance:
        swap = ir.Constant(_WORDS, [lane ^ distance for lane in range(LANES)])
        swapped = builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), swap)
        vector = builder.fadd(vector, swapped)
        distance //= 2
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _make_pack(bf16):
    @intrinsic
    def pack(typing, row, centre, rounded, packed, norms, width):
        """Write x' = row - centre as the scan reads it; norms[0] = sum x'^2, norms[1] = sum slip^2.

        All are float32 arrays at addresses, zero beyond `width` up to a whole vector; `rounded` is
        scratch with two vectors to spare. The slip is fl(x') - packed x'. With bf16, word s holds
        the dimensions s and s + half, half = ceil(width / 2).
        """
        signature = types.void(*[types.intp] * 6)

        def codegen(context, builder, signature, args):
            row, centre, rounded, packed, norms, width = args
            const = lambda value: ir.Constant(_I64, value)  # noqa: E731
            words = lambda value: ir.Constant(_WORDS, [value] * LANES)  # noqa: E731
            zero = ir.Constant(_FLOATS, None)
            square_at, slip_at = (cgutils.alloca_once_value(builder, zero) for _ in range(2))
            target = rounded if bf16 else packed
            with cgutils.for_range_slice(builder, const(0), width, const(LANES)) as (d, _):
                value = builder.fsub(
                    builder.load(_vector_at(builder, row, d), align=4),
                    builder.load(_vector_at(builder, centre, d), align=4),
                )
                if bf16:
                    bits = builder.bitcast(value, _WORDS)
                    odd = builder.and_(builder.lshr(bits, words(16)), words(1))
                    bits = builder.add(builder.add(bits, words(0x7FFF)), odd)
                    near = builder.bitcast(builder.and_(bits, words(0xFFFF0000)), _FLOATS)
                    off = builder.fsub(value, near)
                    slip = builder.fadd(builder.load(slip_at), builder.fmul(off, off))
                    builder.store(slip, slip_at)
                else:
                    near = value
                square = builder.fadd(builder.load(square_at), builder.fmul(value, value))
                builder.store(square, square_at)
                builder.store(near, _vector_at(builder, target, d), align=4)
            if bf16:
                half = builder.lshr(builder.add(width, const(1)), const(1))
                with cgutils.for_range_slice(builder, const(0), half, const(LANES)) as (s, _):
                    low_at = _vector_at(builder, rounded, s, _WORDS)
                    high_at = _vector_at(builder, rounded, builder.add(s, half), _WORDS)
                    low = builder.lshr(builder.load(low_at, align=4), words(16))
                    word = builder.or_(low, builder.load(high_at, align=4))
                    builder.store(word, _vector_at(builder, packed, s, _WORDS), align=4)
            for at, number in ((square_at, 0), (slip_at, 1)):
                place = builder.inttoptr(builder.add(norms, const(4 * number)), _F32.as_pointer())
                builder.store(_total(builder, builder.load(at)), place)
            return context.get_dummy_value()

        return signature, codegen

    return pack


pack_f32 = _make_pack(False)
pack_bf16 = _make_pack(True)


@intrinsic
def subtract(typing, row, chosen, width):
    """row -= chosen, float32 arrays at addresses, up to a whole vector past `width`."""

    def codegen(context, builder, signature, args):
        row, chosen, width = args
        zero, step = ir.Constant(_I64, 0), ir.Constant(_I64, LANES)
        with cgutils.for_range_slice(builder, zero, width, step) as (d, _):
            at = _vector_at(builder, row, d)
            chosen_at = _vector_at(builder, chosen, d)
            difference = builder.fsub(builder.load(at, align=4), builder.load(chosen_at, align=4))
            builder.store(difference, at, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def sole_leader(typing, best, second, margin):
    """The lane of the highest of LANES float32 at `best`, or -1 if any other comes near.

    Near is within `margin` (float64, finite) of it; those at `second` are others too.
    """
    mask_type = ir.IntType(LANES)

    def codegen(context, builder, signature, args):
        best, second, margin = args
        scores = builder.load(builder.inttoptr(best, _FLOATS.as_pointer()), align=4)
        others = builder.load(builder.inttoptr(second, _FLOATS.as_pointer()), align=4)
        top = scores
        distance = LANES // 2
        while distance:
            order = [lane ^ distance for lane in range(LANES)]
            swap = ir.Constant(ir.VectorType(_I32, LANES), order)
            swapped = builder.shuffle_vector(top, ir.Constant(_FLOATS, ir.Undefined), swap)
            top = builder.select(builder.fcmp_ordered(">", top, swapped), top, swapped)
            distance //= 2
        highest = builder.extract_element(top, ir.Constant(_I32, 0))
        floor = builder.fsub(builder.fpext(highest, ir.DoubleType()), margin)
        floor = splat(builder, builder.fptrunc(floor, _F32), _FLOATS)
        near = builder.bitcast(builder.fcmp_unordered(">=", scores, floor), mask_type)
        other = builder.bitcast(builder.fcmp_unordered(">=", others, floor), mask_type)
        # One bit set in `near` and none in `other`.
        one = builder.and_(near, builder.sub(near, ir.Constant(mask_type, 1)))
        alone = builder.icmp_unsigned("==", builder.or_(one, other), ir.Constant(mask_type, 0))
        lane = builder.zext(builder.cttz(near, ir.Constant(ir.IntType(1), 0)), _I64)
        return builder.select(alone, lane, ir.Constant(_I64, -1))

    return types.int64(types.intp, types.intp, types.float64), codegen
