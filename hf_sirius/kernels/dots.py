"""Dot products of rows of a weight with a few tokens: loops that numba compiles, around vectors that it would not find
by itself.

A block of rows is read once for several tokens, and each number of it is widened once. Where no library brings such a
loop, a product of 8 tokens takes 4 to 7 times as long as one of a single token. Weights of 8 and 4 bits are multiplied
as integers, with inputs that are rounded to 16 and 8 bits, which takes a half and a quarter of float32's instructions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vectors
from .vectors import ADDRESS, BYTE, CHUNK, FLOAT, INT, SHORT


INTEGERS = ("grouped", "int4")  # what is multiplied as integers
_NUM_ARGUMENTS = 12  # of a product
_SHARE_ROWS = 24  # that stay in a core's cache while all tokens pass

_STORED = {"float32": FLOAT, "bfloat16": SHORT, "grouped": BYTE, "int4": BYTE}
_NUM_BYTES = {"float32": 4, "bfloat16": 2, "grouped": 1, "int4": 1}
_SCALE_BYTES = {"float32": 4, "bfloat16": 4, "grouped": 4, "int4": 8}  # of each chunk
_FACTORS, _SCALE = 5, 4  # float32 numbers that go with a chunk of inputs that is rounded, and which is its scale
_INPUTS = {"grouped": (SHORT, 2, 32767.0), "int4": (BYTE, 1, 127.0)}  # as rounded: type, bytes and greatest number
_MAGIC = 1.5 * 2**23  # added to a small number it leaves the nearest integer in the lower bits
_LEAST = 1e-30  # magnitude of a chunk's inputs below which they count as 0


def compiled(stored: str, symbols: dict[str, int]) -> Any:
    """Returns a compiled kernel, whose `address` is that of a C function for each of OpenMP's threads.

    It takes the address of int64: how many products there are, of the same inputs, and for each 12 more: the addresses
    of inputs [num_tokens, in_features], weight [out_features, in_features], scales, columns, rows [num_rows] and
    outputs [num_tokens, out_features], then num_tokens, out_features, in_features, num_rows (-1: all of them), whether
    inputs and outputs are bfloat16 (in place of float32), and, if so or if the weight's numbers are integers, the
    address of float32 [num_threads, num_tokens, in_features] to compute with.

    Args:
        stored: how the weight's numbers are: `"float32"`; `"bfloat16"`; `"grouped"`, int8 with float32 scales
            [out_features, in_features / 64]; or `"int4"`, of each 64 inputs 32 bytes with those of the first half in
            their lower bits, bfloat16 steps and least values [out_features, in_features / 32, 2], and bfloat16 columns
            [in_features] that the inputs are multiplied with.
        symbols: the addresses of OpenMP's functions `omp_get_thread_num` and `omp_get_num_threads`.
    """
    thread_num, num_threads = (_c_function(*symbol) for symbol in symbols.items())
    is_integer, most_tokens = stored in INTEGERS, max(_block_sizes(stored))
    one_row, (of_one, of_two, of_four, *more) = _dots(stored, 1, 1), _blocks(stored)
    of_eight = more[0] if more else of_four
    rounded, rounded_narrow = (is_integer and _rounding(inputs, stored) for inputs in ("float32", "bfloat16"))

    @njit
    def block(given, rows, token, num_tokens, start, end):
        """Computes a block of tokens with a share of the rows."""
        if num_tokens == 1:
            first_left = of_one(given, rows, token, start, end)
        elif num_tokens == 2:
            first_left = of_two(given, rows, token, start, end)
        elif num_tokens <= 4:
            first_left = of_four(given, rows, token, start, end)
        else:
            first_left = of_eight(given, rows, token, start, end)
        for i in range(first_left, end):
            for each in range(token, token + num_tokens):
                one_row(given, (_row_at(rows, i),), each)

    @njit
    def product(all_given, thread, threads):
        """Computes a thread's share of a product."""
        inputs, narrow = all_given[0], all_given[10]
        num_tokens, out_features, in_features, num_rows = all_given[6], all_given[7], all_given[8], all_given[9]
        num_inputs = num_tokens * in_features
        own = all_given[11] + 4 * thread * num_inputs
        factors = own + 2 * num_inputs
        if is_integer:
            if narrow:
                rounded_narrow(inputs, own, factors, all_given[3], num_inputs // CHUNK, in_features // CHUNK)
            else:
                rounded(inputs, own, factors, all_given[3], num_inputs // CHUNK, in_features // CHUNK)
            inputs = own
        elif narrow:
            narrow_inputs = carray(_pointer(inputs), (num_inputs,), np.uint16)
            widened = carray(_pointer(own), (num_inputs,), np.float32)
            for i in range(num_inputs):
                widened[i] = _of_bfloat16(narrow_inputs[i])
            inputs = own
        # Of chosen rows nobody knows which come next.
        ahead = 1 if num_rows == -1 else 0
        given = (
            inputs, factors, all_given[1], all_given[2], all_given[5],
            num_tokens, out_features, in_features, narrow, ahead,
        )  # fmt: skip
        rows = carray(_pointer(all_given[4]), (max(num_rows, 0),), np.int64)
        num_read = out_features if num_rows == -1 else num_rows
        last = num_read * (thread + 1) // threads
        for start in range(num_read * thread // threads, last, _SHARE_ROWS):
            for token in range(0, num_tokens, most_tokens):
                block(given, rows, token, min(most_tokens, num_tokens - token), start, min(start + _SHARE_ROWS, last))

    @cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def kernel(arguments):
        num_products = carray(arguments, 1)[0]
        all_given = carray(arguments, 1 + _NUM_ARGUMENTS * num_products)[1:]
        thread, threads = thread_num(), num_threads()
        for i in range(num_products):
            product(all_given[_NUM_ARGUMENTS * i :], thread, threads)

    return kernel


def _block_sizes(stored: str) -> dict[int, int]:
    """Returns how many rows are read side by side, by how many tokens. Of the sums of more of them LLVM puts some away
    and reads them again.
    """
    if vectors.WIDTH == 16 and stored not in INTEGERS:  # with 32 registers
        return {1: 4, 2: 4, 4: 4, 8: 2}
    return {1: 4, 2: 4, 4: 3}


def _blocks(stored: str) -> list[Callable[..., int]]:
    """Returns for each number of tokens a function that computes them, with as many of some rows as go into whole
    blocks, and returns the first that does not.
    """

    def over_rows(dots, size):
        @njit
        def compute(given, rows, token, start, end):
            in_blocks = end - (end - start) % size
            for i in range(start, in_blocks, size):
                first, second = _row_at(rows, i), _row_at(rows, i + 1)
                if size == 2:
                    dots(given, (first, second), token)
                elif size == 3:
                    dots(given, (first, second, _row_at(rows, i + 2)), token)
                else:
                    dots(given, (first, second, _row_at(rows, i + 2), _row_at(rows, i + 3)), token)
            return in_blocks

        return compute

    sizes = _block_sizes(stored).items()
    return [over_rows(_dots(stored, num_rows, num_tokens), num_rows) for num_tokens, num_rows in sizes]


@njit
def _row_at(rows, i):
    return rows[i] if len(rows) else i


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
        return builder.bitcast(builder.shl(builder.zext(arguments[0], INT), INT(16)), FLOAT)

    return types.float32(types.uint16), generate


@functools.cache
def _rounding(dtype: str, stored: str) -> Callable[..., None]:
    """Returns a function that rounds inputs of a dtype to go with a weight, by a scale for each chunk of them.

    It takes the addresses of the inputs, float32 or bfloat16 [num_chunks, 64], of int16 or int8 [num_chunks, 64], of
    float32 [num_chunks, 5] and of the columns, num_chunks, and how many of these are a token's. The float32 numbers are
    0, the sum of the chunk's first half, 0, that of its second half, and the scale. The scale of inputs that are not
    finite is not either, and all that comes of it.
    """
    integer, num_bytes, greatest_number = _INPUTS[stored]

    @intrinsic
    def rounded(typing_context, inputs, outputs, factors, columns, num_chunks, num_of_token):
        def generate(context, builder, signature, arguments):
            inputs, outputs, factors, columns, num_chunks, num_of_token = arguments
            ints = ir.VectorType(INT, vectors.WIDTH)
            with cgutils.for_range(builder, num_chunks) as loop:
                start = builder.mul(loop.index, ADDRESS(CHUNK))
                places = [builder.add(start, ADDRESS(k)) for k in range(0, CHUNK, vectors.WIDTH)]
                loaded = [
                    vectors.load(builder, inputs, _NUM_BYTES[dtype], j, _STORED[dtype], vectors.WIDTH) for j in places
                ]
                states = [vectors.widened(builder, dtype, vector, vectors.WIDTH) for vector in loaded]
                if stored == "int4":
                    first = builder.mul(builder.urem(loop.index, num_of_token), ADDRESS(CHUNK))
                    for i, state in enumerate(states):
                        place = builder.add(first, ADDRESS(i * vectors.WIDTH))
                        column = vectors.load(builder, columns, 2, place, SHORT, vectors.WIDTH)
                        states[i] = builder.fmul(state, vectors.widened(builder, "bfloat16", column, vectors.WIDTH))
                # As integers magnitudes have the same order.
                magnitudes = [
                    builder.and_(builder.bitcast(state, ints), ir.Constant(ints, [0x7FFFFFFF] * vectors.WIDTH))
                    for state in states
                ]
                greatest = vectors.greatest(builder, magnitudes)
                is_finite = builder.icmp_unsigned("<", greatest, INT(0x7F800000))
                largest = builder.bitcast(greatest, FLOAT)
                is_seen = builder.and_(is_finite, builder.fcmp_ordered(">", largest, FLOAT(_LEAST)))
                per_step = builder.select(is_seen, builder.fdiv(FLOAT(greatest_number), largest), FLOAT(0.0))
                magic = ir.Constant(ir.VectorType(FLOAT, vectors.WIDTH), [_MAGIC] * vectors.WIDTH)
                single = builder.insert_element(vectors.zeros(1), per_step, INT(0))
                for j, state in zip(places, states, strict=True):
                    moved = builder.fadd(builder.fmul(state, vectors.repeated(builder, single)), magic)
                    number = builder.trunc(builder.bitcast(moved, ints), ir.VectorType(integer, vectors.WIDTH))
                    vectors.put(builder, number, outputs, num_bytes, j)
                half = len(states) // 2
                sums = [
                    vectors.total(builder, functools.reduce(builder.fadd, part))
                    for part in (states[:half], states[half:])
                ]
                place = builder.mul(loop.index, ADDRESS(_FACTORS))
                scale = builder.fdiv(largest, FLOAT(greatest_number))
                for i, value in enumerate((FLOAT(0.0), sums[0], FLOAT(0.0), sums[1], scale)):
                    vectors.put(builder, value, factors, 4, builder.add(place, ADDRESS(i)))
            return context.get_dummy_value()

        return types.void(inputs, outputs, factors, columns, num_chunks, num_of_token), generate

    return rounded


@functools.cache
def _dots(stored: str, num_rows: int, num_tokens: int) -> Callable[..., None]:
    """Returns a function that writes the products of some rows and tokens. It takes `given` (the addresses of inputs,
    of the factors of those that are rounded, of weight, scales and outputs; how many tokens there are, out_features,
    in_features, whether outputs are bfloat16, and whether the rows behind these are read next), the places of
    `num_rows` rows, and the first of `num_tokens` tokens; where there are fewer, the last is computed again.
    """
    tokens = range(num_tokens)
    is_integer = stored in INTEGERS
    input_type, input_bytes, _ = _INPUTS.get(stored, (FLOAT, 4, None))
    # A single sum would wait for itself.
    num_sums = max(1, 4 // (num_rows * num_tokens))

    @intrinsic
    def dots(typing_context, given, places, first_token):
        def generate(context, builder, signature, arguments):
            inputs, factors, weight, scales, outputs, num_given, out_features, in_features, narrow, ahead = (
                cgutils.unpack_tuple(builder, arguments[0])
            )
            rows = cgutils.unpack_tuple(builder, arguments[1])
            places, last = [arguments[2]], builder.sub(num_given, ADDRESS(1))
            for _ in tokens[1:]:
                following = builder.add(places[-1], ADDRESS(1))
                places.append(builder.select(builder.icmp_signed("<", following, num_given), following, last))
            num_chunks = builder.udiv(in_features, ADDRESS(CHUNK))
            states = [vectors.at(builder, inputs, input_bytes, builder.mul(place, in_features)) for place in places]
            chunk_factors = [
                vectors.at(builder, factors, 4 * _FACTORS, builder.mul(place, num_chunks)) for place in places
            ]
            row_size = builder.udiv(in_features, ADDRESS(2)) if stored == "int4" else in_features
            chunk_bytes = CHUNK // 2 if stored == "int4" else CHUNK * _NUM_BYTES[stored]
            block_bytes = builder.mul(ahead, builder.mul(row_size, ADDRESS(num_rows * _NUM_BYTES[stored])))
            weights = [vectors.at(builder, weight, _NUM_BYTES[stored], builder.mul(row, row_size)) for row in rows]
            scales = [vectors.at(builder, scales, _SCALE_BYTES[stored], builder.mul(row, num_chunks)) for row in rows]
            totals = [
                [[vectors.variable(builder, vectors.WIDTH) for _ in range(num_sums)] for _ in tokens] for _ in rows
            ]

            def add_integers(chunk):
                """Adds the products of a chunk of integers."""
                start = builder.mul(chunk, ADDRESS(CHUNK))
                width = 4 // input_bytes * vectors.WIDTH
                read = [
                    [vectors.load(builder, state, input_bytes, builder.add(start, ADDRESS(k)), input_type, width)
                     for k in range(0, CHUNK, width)]
                    for state in states
                ]  # fmt: skip
                factor = builder.mul(chunk, ADDRESS(_FACTORS))
                place_of_scale = builder.add(factor, ADDRESS(_SCALE))
                of_tokens = [
                    vectors.repeated(builder, vectors.load(builder, place, 4, place_of_scale, FLOAT, 1))
                    for place in chunk_factors
                ]
                for row, place, of_row in zip(weights, scales, totals, strict=True):
                    numbers = (vectors.in_4_bits if stored == "int4" else vectors.in_8_bits)(builder, row, chunk)
                    if stored == "int4":
                        pairs = vectors.load(builder, place, 2, builder.mul(chunk, ADDRESS(4)), SHORT, 4)
                        pairs = vectors.widened(builder, "bfloat16", pairs, 4)
                        steps = vectors.by_half(builder, pairs, len(numbers))
                    else:
                        steps = [vectors.repeated(builder, vectors.load(builder, place, 4, chunk, FLOAT, 1))]
                    size = len(numbers) // len(steps)  # vectors of a group
                    for token in tokens:
                        dot = vectors.dot_fours if stored == "int4" else vectors.dot_pairs
                        products = [dot(builder, *both) for both in zip(numbers, read[token], strict=True)]
                        value = vectors.zeros(vectors.WIDTH)
                        for i, step in enumerate(steps):
                            group = functools.reduce(builder.add, products[i * size : (i + 1) * size])
                            value = vectors.add(builder, value, builder.sitofp(group, step.type), step)
                        into = of_row[token][0]
                        total = vectors.add(builder, builder.load(into), value, of_tokens[token])
                        if stored == "int4":  # which stand above a least value
                            sums = vectors.load(builder, chunk_factors[token], 4, factor, FLOAT, 4)
                            total = vectors.add(
                                builder, total, *(vectors.extended(builder, four) for four in (pairs, sums))
                            )
                        builder.store(total, into)

            def add_products(j, width, which):
                """Adds the products of `width` inputs from j on to one of the sums for each row and token."""
                read = [vectors.load(builder, state, 4, j, FLOAT, width) for state in states]
                for row, of_row in zip(weights, totals, strict=True):
                    loaded = vectors.load(builder, row, _NUM_BYTES[stored], j, _STORED[stored], width)
                    numbers = vectors.extended(builder, vectors.widened(builder, stored, loaded, width))
                    for of_token, vector in zip(of_row, read, strict=True):
                        into = of_token[which]
                        value = builder.load(into)
                        builder.store(vectors.add(builder, value, numbers, vectors.extended(builder, vector)), into)

            def add_floats(chunk):
                start = builder.mul(chunk, ADDRESS(CHUNK))
                for k in range(0, CHUNK, vectors.WIDTH):
                    add_products(builder.add(start, ADDRESS(k)), vectors.WIDTH, k // vectors.WIDTH % num_sums)

            with cgutils.for_range(builder, num_chunks) as loop:
                # Processors foresee what follows in a row, and not the next one.
                for row in weights:
                    here = builder.add(row, builder.mul(loop.index, ADDRESS(chunk_bytes)))
                    vectors.prefetch(builder, builder.add(here, block_bytes), chunk_bytes)
                (add_integers if is_integer else add_floats)(loop.index)
            if not is_integer:
                first = builder.mul(num_chunks, ADDRESS(CHUNK))
                with cgutils.for_range_slice(builder, first, in_features, ADDRESS(1), ADDRESS) as (j, _):
                    add_products(j, 1, 0)  # behind the last whole chunk
            sums = [functools.reduce(builder.fadd, map(builder.load, each)) for of_row in totals for each in of_row]
            indices = [builder.add(builder.mul(place, out_features), row) for row in rows for place in places]
            size = math.gcd(len(sums), vectors.WIDTH)
            for i in range(0, len(sums), size):
                values = vectors.totals(builder, sums[i : i + size])
                vectors.put_outputs(builder, values, outputs, indices[i : i + size], narrow)
            return context.get_dummy_value()

        return types.void(given, places, first_token), generate

    return dots
