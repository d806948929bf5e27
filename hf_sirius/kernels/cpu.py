"""Products of a few tokens with a weight on a CPU, as fast as its bytes can be read. numba compiles them, and torch's
own threads run them: threads of another pool would wait for the same cores.
"""

import ctypes
import functools
import os
import threading
from pathlib import Path

import torch


GROUP = 64  # inputs that share a scale
_lock = threading.Lock()


@functools.cache
def is_available() -> bool:
    """Whether numba compiles the kernels, and torch brings the OpenMP library that runs its threads (on Linux)."""
    if _openmp() is None:
        return False
    try:
        _kernels()
    except Exception:  # numba is missing, or a version that does not go with this Python or numpy
        return False
    return True


def grouped_product(inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns inputs @ weight.T, where weight[i, j] = values[i, j] * scales[i, j // 64].

    Args:
        inputs: float32 [num_tokens, in_features].
        values: int8 [out_features, in_features]; in_features is a multiple of 64.
        scales: float32 [out_features, in_features / 64].

    Returns:
        float32 [num_tokens, out_features].
    """
    outputs = inputs.new_empty(inputs.shape[0], values.shape[0])
    _run("grouped", inputs, values, scales, outputs)
    return outputs


def _run(name: str, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, outputs: torch.Tensor) -> None:
    """Runs a kernel in torch's threads, each of which takes its share of the outputs."""
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (inputs, values, scales, outputs)):
        raise RuntimeError("a kernel for CPUs wants tensors there, whose memory lies in rows")
    arguments = _Arguments(
        *(tensor.data_ptr() for tensor in (inputs, values, scales, outputs)), len(inputs), *values.shape
    )
    # As what `#pragma omp parallel` is compiled to; the interpreter runs on meanwhile.
    _openmp().GOMP_parallel(_kernels()[name].address, ctypes.addressof(arguments), torch.get_num_threads(), 0)


_Arguments = ctypes.c_int64 * 7


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


def _kernels() -> dict:
    with _lock:  # the first call compiles
        return _compiled()


@functools.cache
def _compiled() -> dict:
    """Returns the compiled kernels by name."""
    import llvmlite.binding
    import numpy as np
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

    compiled = njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

    @compiled
    def rows(inputs, values, scales, outputs, start, end):
        # The constant length of the inner loop is what has it vectorized.
        for row in range(start, end):
            for token in range(inputs.shape[0]):
                total = np.float32(0)
                for group in range(scales.shape[1]):
                    first = group * GROUP
                    part = np.float32(0)
                    weights, states = values[row, first : first + GROUP], inputs[token, first : first + GROUP]
                    for i in range(GROUP):
                        part += np.float32(weights[i]) * states[i]
                    total += part * scales[row, group]
                outputs[token, row] = total

    @cfunc(types.void(types.CPointer(types.int64)), nopython=True)
    def grouped(arguments):
        given = carray(arguments, 7)
        num_tokens, out_features, in_features = given[4], given[5], given[6]
        thread, threads = thread_num(), num_threads()
        rows(
            carray(pointer(given[0]), (num_tokens, in_features), np.float32),
            carray(pointer(given[1]), (out_features, in_features), np.int8),
            carray(pointer(given[2]), (out_features, in_features // GROUP), np.float32),
            carray(pointer(given[3]), (num_tokens, out_features), np.float32),
            out_features * thread // threads,
            out_features * (thread + 1) // threads,
        )

    return {"grouped": grouped}
