"""Dot products of rows of a weight with a few tokens: loops that numba compiles, around vectors that it would not find
by itself.

A block of rows is read once for several tokens, and each number of it is widened to float32 once. Where no
library brings such a loop, a product of 8 tokens takes 4 to 7 times as long as one of a single token.
"""

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


CHUNK = 64  # inputs that are read in one go; of a grouped weight they share a scale
_BLOCK_TOKENS = 4
_BLOCK_ROWS = 3  # with 4 tokens 12 sums, which leaves 4 of AVX2's 16 registers
_SHARE_ROWS = 8 * _BLOCK_ROWS  # that stay in a core's cache while all tokens pass
_WIDTH = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8  # numbers in a register
_FAST = ("reassoc", "contract", "nsz")  # sums in any order; infinities and NaN stay what they are

_FLOAT, _INT, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_STORED = {"float32": _FLOAT, "bfloat16": ir.IntType(16), "grouped": ir.IntType(8), "int4": ir.IntType(8)}
_NUM_BYTES = {"float32": 4, "bfloat16": 2, "grouped": 1, "int4": 1}
_SCALE_BYTES = {"float32": 4, "bfloat16": 4, "grouped": 4, "int4": 8}  # of each chunk


def compiled(stored: str, symbols: dict[str, int]) -> Any:
    """Returns a compiled kernel, whose `address` is that of a C function for each of OpenMP's threads.

    It takes the address of 11 int64: the addresses of inputs [num_tokens, in_features], weight
    [out_features, in_features], scales, rows [num_rows] and outputs [num_tokens, out_features], then num_tokens,
    out_features, in_features, num_rows (-1: all of them), whether inputs and outputs are bfloat16 (in place of
    float32), and, if so, the address of float32 [num_threads, num_tokens, in_features] to compute with.

    Args:
        stored: how the weight's numbers are: `"float32"`; `"bfloat16"`; `"grouped"`, int8 with float32 scales
            [out_features, in_features / 64]; or `"int4"`, of each 64 inputs 32 bytes with those of the first half in
            their lower bits, and bfloat16 steps and least values [out_features, in_features / 32, 2].
        symbols: the addresses of OpenMP's functions `omp_get_thread_num` and `omp_get_num_threads`.
    """
    thread_num, num_threads = (_c_function(*symbol) for symbol in symbols.items())
    one_row = _dots(stored, 1, 1)
    two, three, four = (_dots(stored, _BLOCK_ROWS, num_tokens) for num_tokens in range(2, _BLOCK_TOKENS + 1))

    @njit
    def row_at(rows, i):
        return rows[i] if len(rows) else i

    @njit
    def block(given, rows, first_token, num_tokens, start, end):
        """Computes a block of tokens with a share of the rows."""
        in_blocks = start if num_tokens == 1 else end - (end - start) % _BLOCK_ROWS
        for i in range(start, in_blocks, _BLOCK_ROWS):
            places = row_at(rows, i), row_at(rows, i + 1), row_at(rows, i + 2)
            if num_tokens == 4:
                four(given, places, first_token)
            elif num_tokens == 3:
                three(given, places, first_token)
            else:
                two(given, places, first_token)
        for i in range(in_blocks, end):
            for token in range(first_token, first_token + num_tokens):
                one_row(given, (row_at(rows, i),), token)

    @cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments):
        all_given = carray(arguments, 11)
        inputs = all_given[0]
        num_tokens, out_features, in_features, num_rows = all_given[5], all_given[6], all_given[7], all_given[8]
        thread, threads = thread_num(), num_threads()
        if all_given[9]:
            num_inputs = num_tokens * in_features
            narrow = carray(_pointer(inputs), (num_inputs,), np.uint16)
            inputs = all_given[10] + 4 * thread * num_inputs
            widened = carray(_pointer(inputs), (num_inputs,), np.float32)
            for i in range(num_inputs):
                widened[i] = _of_bfloat16(narrow[i])
        given = (inputs, all_given[1], all_given[2], all_given[4], out_features, in_features, all_given[9])
        rows = carray(_pointer(all_given[3]), (max(num_rows, 0),), np.int64)
        num_read = out_features if num_rows == -1 else num_rows
        last = num_read * (thread + 1) // threads
        for start in range(num_read * thread // threads, last, _SHARE_ROWS):
            for token in range(0, num_tokens, _BLOCK_TOKENS):
                num = min(_BLOCK_TOKENS, num_tokens - token)
                block(given, rows, token, num, start, min(start + _SHARE_ROWS, last))

    return kernel


def _c_function(name: str, address: int) -> Callable[[], int]:
    llvmlite.binding.add_symbol(f"hf_sirius_{name}", address)
    return types.ExternalFunction(f"hf_sirius_{name}", types.int32())


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _of_bfloat16(typing_context, bits):  # which are the upper half of a float32's
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _INT), _INT(16)), _FLOAT)

    return types.float32(types.uint16), generate


@functools.cache
def _dots(stored: str, num_rows: int, num_tokens: int) -> Callable[..., None]:
    """Returns a function that writes the products of some rows and tokens. It takes `given` (the addresses of inputs,
    weight, scales and outputs; out_features, in_features, whether outputs are bfloat16), the places of `num_rows` rows,
    and the first of `num_tokens` tokens.
    """
    tokens = range(num_tokens)
    # A single sum would wait for itself.
    num_sums = max(1, 4 // (num_rows * num_tokens))

    @intrinsic
    def dots(typing_context, given, places, first_token):
        def generate(context, builder, signature, arguments):
            inputs, weight, scales, outputs, out_features, in_features, narrow = cgutils.unpack_tuple(
                builder, arguments[0]
            )
            rows = cgutils.unpack_tuple(builder, arguments[1])
            places = [builder.add(arguments[2], _ADDRESS(token)) for token in tokens]
            states = [_at(builder, inputs, 4, builder.mul(place, in_features)) for place in places]
            num_chunks = builder.udiv(in_features, _ADDRESS(CHUNK))
            row_size = builder.udiv(in_features, _ADDRESS(2)) if stored == "int4" else in_features
            weights = [_at(builder, weight, _NUM_BYTES[stored], builder.mul(row, row_size)) for row in rows]
            scales = [_at(builder, scales, _SCALE_BYTES[stored], builder.mul(row, num_chunks)) for row in rows]

            def add_chunk_of_4_bits(sums, chunk):
                """Adds the products of a chunk, whose numbers are made first: vectors by row, token and part."""
                steps = [
                    [_of_upper_half(builder, place, builder.add(builder.mul(chunk, _ADDRESS(4)), _ADDRESS(i)))
                     for i in range(4)]
                    for place in scales
                ]  # fmt: skip
                for k in range(0, CHUNK, _WIDTH):
                    half, which = 2 * k // CHUNK, k // _WIDTH % num_sums
                    j = builder.add(builder.mul(chunk, _ADDRESS(CHUNK)), _ADDRESS(k))
                    at = builder.add(builder.mul(chunk, _ADDRESS(CHUNK // 2)), _ADDRESS(k % (CHUNK // 2)))
                    vectors = [_load(builder, state, 4, j, _FLOAT, _WIDTH) for state in states]
                    for row, (first, low, second, other_low), of_row in zip(weights, steps, sums, strict=True):
                        step, least = (second, other_low) if half else (first, low)
                        numbers = _of_4_bits(builder, _load(builder, row, 1, at, _STORED[stored], _WIDTH), half)
                        numbers = _add(builder, least, numbers, step)
                        for token in tokens:
                            of_row[token][which] = _add(builder, of_row[token][which], numbers, vectors[token])

            def add_products(sums, j, width):
                """Adds the products of `width` inputs from j on to vectors by row and token."""
                vectors = [_load(builder, state, 4, j, _FLOAT, width) for state in states]
                for row, of_row in zip(weights, sums, strict=True):
                    loaded = _load(builder, row, _NUM_BYTES[stored], j, _STORED[stored], width)
                    numbers = _widened(builder, stored, loaded, width)
                    for token in tokens:
                        of_row[token] = _add(builder, of_row[token], numbers, vectors[token])

            def add_chunk_as_it_is(parts, chunk):
                """Adds the products of a chunk to vectors by row, token and part."""
                for k in range(0, CHUNK, _WIDTH):
                    which = k // _WIDTH % num_sums
                    sums = [[of_token[which] for of_token in of_row] for of_row in parts]
                    add_products(sums, builder.add(builder.mul(chunk, _ADDRESS(CHUNK)), _ADDRESS(k)), _WIDTH)
                    for of_row, new in zip(parts, sums, strict=True):
                        for token in tokens:
                            of_row[token][which] = new[token]

            totals = [[[_variable(builder, _WIDTH) for _ in range(num_sums)] for _ in tokens] for _ in rows]
            with cgutils.for_range(builder, num_chunks) as chunk:
                parts = [
                    [
                        [_zeros(_WIDTH) if stored == "grouped" else builder.load(total) for total in of_token]
                        for of_token in of_row
                    ]
                    for of_row in totals
                ]
                add_chunk = add_chunk_of_4_bits if stored == "int4" else add_chunk_as_it_is
                add_chunk(parts, chunk.index)
                for place, of_row, into in zip(scales, parts, totals, strict=True):
                    scale = stored == "grouped" and _load(builder, place, 4, chunk.index, _FLOAT, 1)
                    for token in tokens:
                        for part, total in zip(of_row[token], into[token], strict=True):
                            if stored == "grouped":
                                part = _add(builder, builder.load(total), part, _repeated(builder, scale))
                            builder.store(part, total)
            rest = [[_variable(builder, 1) for _ in tokens] for _ in rows]
            if stored in ("float32", "bfloat16"):
                first = builder.mul(num_chunks, _ADDRESS(CHUNK))
                with cgutils.for_range_slice(builder, first, in_features, _ADDRESS(1), _ADDRESS) as (j, _):
                    sums = [[builder.load(total) for total in of_row] for of_row in rest]
                    add_products(sums, j, 1)
                    for of_row, new in zip(rest, sums, strict=True):
                        for total, value in zip(of_row, new, strict=True):
                            builder.store(value, total)
            for row, of_row, rest_of_row in zip(rows, totals, rest, strict=True):
                for place, of_token, remaining in zip(places, of_row, rest_of_row, strict=True):
                    vector = functools.reduce(builder.fadd, map(builder.load, of_token))
                    value = builder.fadd(_total(builder, vector), _total(builder, builder.load(remaining)))
                    index = builder.add(builder.mul(place, out_features), row)
                    _store(builder, value, outputs, index, narrow)
            return context.get_dummy_value()

        return types.void(given, places, first_token), generate

    return dots


def _at(builder: ir.IRBuilder, address: ir.Value, num_bytes: int, index: ir.Value) -> ir.Value:
    return builder.add(address, builder.mul(index, _ADDRESS(num_bytes)))


def _load(
    builder: ir.IRBuilder, address: ir.Value, num_bytes: int, index: ir.Value, stored: ir.Type, width: int
) -> ir.Value:
    pointer = builder.inttoptr(_at(builder, address, num_bytes, index), ir.VectorType(stored, width).as_pointer())
    return builder.load(pointer, align=num_bytes)


def _widened(builder: ir.IRBuilder, stored: str, vector: ir.Value, width: int) -> ir.Value:
    floats, ints = ir.VectorType(_FLOAT, width), ir.VectorType(_INT, width)
    if stored == "bfloat16":
        return builder.bitcast(builder.shl(builder.zext(vector, ints), ir.Constant(ints, [16] * width)), floats)
    return builder.sitofp(builder.sext(vector, ints), floats) if stored == "grouped" else vector


def _of_4_bits(builder: ir.IRBuilder, vector: ir.Value, is_upper: int) -> ir.Value:
    """Returns the numbers 0 to 15 in the lower or the upper halves of bytes."""
    ints = ir.VectorType(_INT, _WIDTH)
    wide = builder.zext(vector, ints)
    if is_upper:
        wide = builder.lshr(wide, ir.Constant(ints, [4] * _WIDTH))
    else:
        wide = builder.and_(wide, ir.Constant(ints, [15] * _WIDTH))
    return builder.sitofp(wide, ir.VectorType(_FLOAT, _WIDTH))


def _of_upper_half(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """Returns a register full of one bfloat16 number."""
    bits = _load(builder, address, 2, index, ir.IntType(16), 1)
    return _repeated(builder, _widened(builder, "bfloat16", bits, 1))


def _zeros(width: int) -> ir.Value:
    return ir.Constant(ir.VectorType(_FLOAT, width), [0.0] * width)


def _variable(builder: ir.IRBuilder, width: int) -> ir.Value:
    return cgutils.alloca_once_value(builder, _zeros(width))


def _add(builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    return builder.fadd(total, builder.fmul(left, right, flags=_FAST), flags=_FAST)


def _repeated(builder: ir.IRBuilder, single: ir.Value) -> ir.Value:
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT, _WIDTH), [0] * _WIDTH))


def _total(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Returns the sum of a vector's numbers, by halves."""
    while (width := vector.type.count) > 1:
        halves = [
            ir.Constant(ir.VectorType(_INT, width // 2), list(range(start, start + width // 2)))
            for start in (0, width // 2)
        ]
        vector = builder.fadd(*(builder.shuffle_vector(vector, vector, half) for half in halves))
    return builder.extract_element(vector, _INT(0))


def _store(builder: ir.IRBuilder, value: ir.Value, outputs: ir.Value, index: ir.Value, narrow: ir.Value) -> None:
    with builder.if_else(builder.icmp_unsigned("!=", narrow, _ADDRESS(0))) as (then, otherwise):
        with then:
            bits = builder.bitcast(value, _INT)
            # To the nearest, and to the even one of two; a NaN keeps its upper bits.
            even = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
            rounded = builder.add(bits, builder.add(even, _INT(0x7FFF)))
            is_nan = builder.fcmp_unordered("uno", value, value)
            upper = builder.lshr(builder.select(is_nan, builder.or_(bits, _INT(0x400000)), rounded), _INT(16))
            pointer = builder.inttoptr(_at(builder, outputs, 2, index), ir.IntType(16).as_pointer())
            builder.store(builder.trunc(upper, ir.IntType(16)), pointer)
        with otherwise:
            builder.store(value, builder.inttoptr(_at(builder, outputs, 4, index), _FLOAT.as_pointer()))
