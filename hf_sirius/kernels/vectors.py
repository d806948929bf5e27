"""Vectors of a weight's numbers, as LLVM has them: loaded, widened, multiplied and summed."""

import functools

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, config


CHUNK = 64  # inputs that are read in one go; those of 8 bits share a scale, those of 4 bits two
# numba may have been told to compile for another processor than this one.
_IS_HOST = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
_FEATURES = llvmlite.binding.get_host_cpu_features() if _IS_HOST else {}
WIDTH = 16 if _FEATURES.get("avx512f") else 8  # float32 numbers in a register
_HAS_FOURS = _FEATURES.get("avx512vnni", False)  # an instruction for the products of four neighbours
_FOURS = "llvm.x86.avx512.vpdpbusd.512"
FLOAT, INT, ADDRESS, SHORT, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16), ir.IntType(8)
_FAST = ("reassoc", "contract", "nsz")  # sums in any order; infinities and NaN stay what they are
_CACHE_LINE = 64  # bytes


def at(builder: ir.IRBuilder, address: ir.Value, num_bytes: int, index: ir.Value) -> ir.Value:
    return builder.add(address, builder.mul(index, ADDRESS(num_bytes)))


def load(
    builder: ir.IRBuilder, address: ir.Value, num_bytes: int, index: ir.Value, stored: ir.Type, width: int
) -> ir.Value:
    pointer = builder.inttoptr(at(builder, address, num_bytes, index), ir.VectorType(stored, width).as_pointer())
    return builder.load(pointer, align=num_bytes)


def prefetch(builder: ir.IRBuilder, address: ir.Value, num_bytes: int) -> None:
    """Has memory brought into the cache, which fails in silence where there is none."""
    pointer = BYTE.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, INT, INT, INT]), "llvm.prefetch.p0i8"
    )
    for i in range(0, num_bytes, _CACHE_LINE):
        place = builder.inttoptr(builder.add(address, ADDRESS(i)), pointer)
        builder.call(function, [place, *map(INT, (0, 3, 1))])  # to read, as near as can be, data


def put(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, num_bytes: int, index: ir.Value) -> None:
    pointer = builder.inttoptr(at(builder, address, num_bytes, index), value.type.as_pointer())
    builder.store(value, pointer, align=num_bytes)


def widened(builder: ir.IRBuilder, stored: str, vector: ir.Value, width: int) -> ir.Value:
    if stored == "float32":
        return vector
    floats, ints = ir.VectorType(FLOAT, width), ir.VectorType(INT, width)
    return builder.bitcast(builder.shl(builder.zext(vector, ints), ir.Constant(ints, [16] * width)), floats)


def in_8_bits(builder: ir.IRBuilder, row: ir.Value, chunk: ir.Value) -> list[ir.Value]:
    """Returns the numbers of a chunk in 16 bits."""
    width = 2 * WIDTH
    start = builder.mul(chunk, ADDRESS(CHUNK))
    loaded = [load(builder, row, 1, builder.add(start, ADDRESS(k)), BYTE, width) for k in range(0, CHUNK, width)]
    return [builder.sext(numbers, ir.VectorType(SHORT, width)) for numbers in loaded]


def in_4_bits(builder: ir.IRBuilder, row: ir.Value, chunk: ir.Value) -> list[ir.Value]:
    """Returns the numbers of a chunk, 0 to 15, in 8 bits: those in the lower halves of bytes, then the upper ones."""
    half, width = CHUNK // 2, 4 * WIDTH
    both = load(builder, row, 1, builder.mul(chunk, ADDRESS(half)), BYTE, half)
    lower, upper = (ir.Constant(both.type, [number] * half) for number in (15, 4))
    halves = builder.and_(both, lower), builder.lshr(both, upper)
    places = [ir.Constant(ir.VectorType(INT, width), list(range(i, i + width))) for i in range(0, CHUNK, width)]
    return [builder.shuffle_vector(*halves, mask) for mask in places]


def by_half(builder: ir.IRBuilder, pairs: ir.Value, num_vectors: int) -> list[ir.Value]:
    """Returns registers with the first of one pair for sums over a chunk's first half, of the other for its second."""
    places = [2 * (i * 2 // (num_vectors * WIDTH)) for i in range(num_vectors * WIDTH)]
    masks = [ir.Constant(ir.VectorType(INT, WIDTH), places[i : i + WIDTH]) for i in range(0, len(places), WIDTH)]
    return [builder.shuffle_vector(pairs, pairs, mask) for mask in masks]


def dot_pairs(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """Returns the sums of the products of two neighbours, in 32 bits, for which processors have one instruction."""
    ints = ir.VectorType(INT, left.type.count)
    products = builder.mul(builder.sext(left, ints), builder.sext(right, ints))
    places = [ir.Constant(ir.VectorType(INT, WIDTH), list(range(i, 2 * WIDTH, 2))) for i in (0, 1)]
    return builder.add(*(builder.shuffle_vector(products, products, half) for half in places))


def dot_fours(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """Returns the sums of the products of four neighbours in 8 bits, those on the left without a sign, in 32 bits."""
    if _HAS_FOURS and WIDTH == 16:
        ints = ir.VectorType(INT, WIDTH)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ints, [ints] * 3), _FOURS)
        return builder.call(
            function, [ir.Constant(ints, [0] * WIDTH), *(builder.bitcast(v, ints) for v in (left, right))]
        )
    shorts = ir.VectorType(SHORT, 2 * WIDTH)
    byte = ir.Constant(shorts, [8] * 2 * WIDTH)
    left, right = (builder.bitcast(vector, shorts) for vector in (left, right))
    even = dot_pairs(
        builder,
        builder.and_(left, ir.Constant(shorts, [255] * 2 * WIDTH)),
        builder.ashr(builder.shl(right, byte), byte),
    )
    return builder.add(even, dot_pairs(builder, builder.lshr(left, byte), builder.ashr(right, byte)))


def zeros(width: int) -> ir.Value:
    return ir.Constant(ir.VectorType(FLOAT, width), [0.0] * width)


def variable(builder: ir.IRBuilder, width: int) -> ir.Value:
    return cgutils.alloca_once_value(builder, zeros(width))


def add(builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    return builder.fadd(total, builder.fmul(left, right, flags=_FAST), flags=_FAST)


def repeated(builder: ir.IRBuilder, vector: ir.Value, place: int = 0) -> ir.Value:
    """Returns a register full of one number of a vector."""
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(INT, WIDTH), [place] * WIDTH))


def extended(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Returns a register of which these are the first numbers, and the others 0."""
    num = vector.type.count
    if num == WIDTH:
        return vector
    places = [min(i, num) for i in range(WIDTH)]
    return builder.shuffle_vector(vector, zeros(num), ir.Constant(ir.VectorType(INT, WIDTH), places))


def totals(builder: ir.IRBuilder, of_all: list[ir.Value]) -> ir.Value:
    """Returns a vector with the sum of each vector's numbers: of 1, 2, 4 or more of them at once. One by one they take
    longer than the products of a row.
    """
    num = len(of_all)
    while len(of_all) > 1:
        of_all = [_neighbours_added(builder, *pair) for pair in zip(of_all[::2], of_all[1::2], strict=True)]
    (vector,) = of_all
    while vector.type.count > num:
        vector = _neighbours_added(builder, vector)
    return vector


def _neighbours_added(builder: ir.IRBuilder, *of_all: ir.Value) -> ir.Value:
    """Returns the sums of neighbours in one vector or two."""
    num = len(of_all) * of_all[0].type.count
    masks = [ir.Constant(ir.VectorType(INT, num // 2), list(range(start, num, 2))) for start in (0, 1)]
    return builder.fadd(*(builder.shuffle_vector(of_all[0], of_all[-1], mask) for mask in masks), flags=_FAST)


def total(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Returns the sum of a vector's numbers."""
    return builder.extract_element(totals(builder, [vector]), INT(0))


def greatest(builder: ir.IRBuilder, of_all: list[ir.Value]) -> ir.Value:
    """Returns the greatest integer in some vectors."""

    def greater(left: ir.Value, right: ir.Value) -> ir.Value:
        return builder.select(builder.icmp_signed(">", left, right), left, right)

    vector = functools.reduce(greater, of_all)
    while (width := vector.type.count) > 1:
        masks = [
            ir.Constant(ir.VectorType(INT, width // 2), list(range(start, start + width // 2)))
            for start in (0, width // 2)
        ]
        vector = greater(*(builder.shuffle_vector(vector, vector, mask) for mask in masks))
    return builder.extract_element(vector, INT(0))


def put_outputs(
    builder: ir.IRBuilder, values: ir.Value, outputs: ir.Value, places: list[ir.Value], narrow: ir.Value
) -> None:
    """Writes numbers to places among the outputs, in float32 or rounded to bfloat16."""

    def put_each(vector: ir.Value, num_bytes: int) -> None:
        for i, place in enumerate(places):
            put(builder, builder.extract_element(vector, INT(i)), outputs, num_bytes, place)

    with builder.if_else(builder.icmp_unsigned("!=", narrow, ADDRESS(0))) as (then, otherwise):
        with then:
            ints = ir.VectorType(INT, len(places))
            half, one, most, quiet = (ir.Constant(ints, [i] * len(places)) for i in (16, 1, 0x7FFF, 0x400000))
            bits = builder.bitcast(values, ints)
            # To the nearest, and to the even one of two; a NaN keeps its upper bits.
            even = builder.and_(builder.lshr(bits, half), one)
            rounded = builder.add(bits, builder.add(even, most))
            is_nan = builder.fcmp_unordered("uno", values, values)
            upper = builder.lshr(builder.select(is_nan, builder.or_(bits, quiet), rounded), half)
            put_each(builder.trunc(upper, ir.VectorType(SHORT, len(places))), 2)
        with otherwise:
            put_each(values, 4)
