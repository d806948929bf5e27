"""Products of a few tokens with a weight on a CPU, as fast as its bytes can be read. numba compiles them, and torch's
own threads run them: threads of another pool would wait for the same cores.
"""

import ctypes
import functools
import logging
import os
import threading
from pathlib import Path
from typing import Any

import torch


logger = logging.getLogger(__name__)

GROUP = 64  # inputs that share a scale
_lock = threading.Lock()


@functools.cache
def is_available() -> bool:
    """Whether numba compiles the kernels, and torch brings the OpenMP library that runs its threads (on Linux)."""
    if _openmp() is None:
        return False
    try:
        _kernel("grouped")
    except ModuleNotFoundError:
        logger.warning("numba is missing, without which drafts on a CPU are slower: pip install hf_sirius[cpu]")
        return False
    except Exception:  # a version that does not go with this Python or numpy
        return False
    return True


def product(inputs: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Returns inputs @ weight.T, of which `rows` alone are read and computed; the other outputs are 0.

    Args:
        inputs: float32 [num_tokens, in_features].
        weight: float32 or bfloat16 [out_features, in_features].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        float32 [num_tokens, out_features].
    """
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[weight.dtype]
    return _run(name, inputs, weight, inputs.new_empty(0), rows)


def grouped_product(
    inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns inputs @ weight.T, where weight[i, j] = values[i, j] * scales[i, j // 64], as [`product`] does.

    Args:
        inputs: float32 [num_tokens, in_features].
        values: int8 [out_features, in_features]; in_features is a multiple of 64.
        scales: float32 [out_features, in_features / 64].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        float32 [num_tokens, out_features].
    """
    return _run("grouped", inputs, values, scales, rows)


def _run(
    name: str, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """Runs a kernel in torch's threads, each of which takes its share of the rows."""
    outputs = (inputs.new_empty if rows is None else inputs.new_zeros)(len(inputs), len(weight))
    tensors = (inputs, weight, scales, inputs.new_empty(0) if rows is None else rows, outputs)
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        raise RuntimeError("a kernel for CPUs wants tensors there, whose memory lies in rows")
    num_rows = _ALL if rows is None else len(rows)
    arguments = _Arguments(*(tensor.data_ptr() for tensor in tensors), len(inputs), *weight.shape, num_rows)
    # As what `#pragma omp parallel` is compiled to; the interpreter runs on meanwhile.
    _openmp().GOMP_parallel(_kernel(name).address, ctypes.addressof(arguments), torch.get_num_threads(), 0)
    return outputs


_ALL = -1  # in place of a number of rows
_Arguments = ctypes.c_int64 * 9


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Returns the OpenMP library that torch has loaded already, or `None` where it is another one."""
    files = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    try:
        # A second one would have threads of its own, which wait for the same cores.
        library = ctypes.CDLL(str(files[0]), mode=os.RTLD_NOLOAD | ctypes.DEFAULT_MODE)
    except (IndexError, OSError, AttributeError):  # there is none, or another one was loaded before torch
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _kernel(name: str) -> Any:
    with _lock:  # the first call compiles
        return _compiled(name)


@functools.cache
def _compiled(name: str) -> Any:
    """Returns a compiled kernel, which has an `address`."""
    import llvmlite.binding
    import numpy as np
    from llvmlite import ir
    from numba import carray, cfunc, njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    for symbol in ("omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(_openmp(), symbol), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"hf_sirius_{symbol}", address)
    thread_num = types.ExternalFunction("hf_sirius_omp_get_thread_num", types.int32())
    num_threads = types.ExternalFunction("hf_sirius_omp_get_num_threads", types.int32())

    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], cgutils.voidptr_t)

        return types.voidptr(types.int64), generate

    @intrinsic
    def float_of_bits(typing_context, bits):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.int32), generate

    compiled = njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

    @compiled
    def as_it_is(weight):
        return weight

    @compiled
    def from_bfloat16(weight):  # whose bits are the upper half of a float32's
        return float_of_bits(np.int32(weight) << np.int32(16))

    def plain_rows(widened):
        @compiled
        def dots(inputs, weight, scales, rows, outputs, start, end):
            for i in range(start, end):
                row = rows[i] if len(rows) else i
                for token in range(inputs.shape[0]):
                    total = np.float32(0)
                    weights, states = weight[row], inputs[token]
                    for j in range(weight.shape[1]):
                        total += widened(weights[j]) * states[j]
                    outputs[token, row] = total

        return dots

    @compiled
    def grouped_rows(inputs, values, scales, rows, outputs, start, end):
        # The constant length of the inner loop is what has it vectorized.
        for i in range(start, end):
            row = rows[i] if len(rows) else i
            for token in range(inputs.shape[0]):
                total = np.float32(0)
                for group in range(scales.shape[1]):
                    first = group * GROUP
                    part = np.float32(0)
                    weights, states = values[row, first : first + GROUP], inputs[token, first : first + GROUP]
                    for j in range(GROUP):
                        part += np.float32(weights[j]) * states[j]
                    total += part * scales[row, group]
                outputs[token, row] = total

    def kernel(dots, dtype):
        @cfunc(types.void(types.CPointer(types.int64)), nopython=True)
        def run(arguments):
            given = carray(arguments, 9)
            num_tokens, out_features, in_features, num_rows = given[5], given[6], given[7], given[8]
            thread, threads = thread_num(), num_threads()
            num_read = out_features if num_rows == _ALL else num_rows
            dots(
                carray(pointer(given[0]), (num_tokens, in_features), np.float32),
                carray(pointer(given[1]), (out_features, in_features), dtype),
                carray(pointer(given[2]), (out_features, in_features // GROUP), np.float32),
                carray(pointer(given[3]), (max(num_rows, 0),), np.int64),
                carray(pointer(given[4]), (num_tokens, out_features), np.float32),
                num_read * thread // threads,
                num_read * (thread + 1) // threads,
            )

        return run

    if name == "grouped":
        return kernel(grouped_rows, np.int8)
    if name == "bfloat16":
        return kernel(plain_rows(from_bfloat16), np.uint16)
    return kernel(plain_rows(as_it_is), np.float32)
