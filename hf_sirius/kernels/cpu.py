"""Products of a few tokens with a weight on a CPU, as fast as its bytes can be read. numba compiles them, and torch's
own threads run them: threads of another pool would wait for the same cores.
"""

import ctypes
import functools
import logging
import math
import os
import statistics
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)

GROUP = 64  # inputs that share a scale; `vectors.CHUNK`
DTYPES = (torch.float32, torch.bfloat16)  # of inputs, and of weights that are not grouped
_MAX_TOKENS = 64  # at a time
_MOST_MEASURED = 128  # tokens; of more, what is measured of so many holds
_NUM_ROUNDS = 7
_CLEARLY = 0.9  # of the time of another, as other work on a machine comes in bursts
_lock = threading.Lock()


@functools.cache
def is_available() -> bool:
    """Whether numba compiles the kernels, and torch brings the OpenMP library that runs its threads (on Linux)."""
    if _openmp() is None:
        return False
    try:
        _kernel("grouped")
    except Exception as error:  # such as a version that does not go with this Python or numpy
        told = f"numba does not work here ({error}): drafts on a CPU are slower without it"
        if isinstance(error, ModuleNotFoundError) and error.name in ("numba", "llvmlite"):
            told = "numba is missing, without which drafts on a CPU are slower: pip install hf_sirius[cpu]"
        logger.warning(told)
        return False
    return True


def is_faster(dtype: torch.dtype, num_tokens: int) -> bool:
    """Whether [`product`] takes less time than torch's, of inputs and a weight of this dtype. Processors and libraries
    differ by factors, so it is measured, once for a range of tokens: in 10 to 500 ms.
    """
    if not num_tokens or dtype not in DTYPES or not is_available():
        return False
    measured = min(1 << (num_tokens - 1).bit_length(), _MOST_MEASURED)
    return _is_faster(dtype, measured, torch.get_num_threads(), torch.backends.mkldnn.enabled)


@functools.cache
def _is_faster(dtype: torch.dtype, num_tokens: int, num_threads: int, with_onednn: bool) -> bool:
    shapes = (num_tokens, 1024), (4, 1024, 1024)
    inputs, weights = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)

    def all_by(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for weight in weights:
            compute(inputs, weight)

    return takes_less(lambda: all_by(product), lambda: all_by(nn.functional.linear))


def takes_less(ours: Callable[[], Any], theirs: Callable[[], Any]) -> bool:
    """Whether one computation clearly takes less time than another, as medians of some rounds."""
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    with torch.inference_mode():
        for _ in range(_NUM_ROUNDS):
            for compute, times in seconds.items():
                start = time.perf_counter()
                compute()
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[ours]) < _CLEARLY * statistics.median(seconds[theirs])


def product(inputs: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Returns inputs @ weight.T, summed in float32. Only `rows` are read and computed; the other outputs are 0.

    Args:
        inputs: float32 or bfloat16 [..., in_features].
        weight: float32 or bfloat16 [out_features, in_features].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        [..., out_features], of the inputs' dtype.
    """
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[weight.dtype]
    return _run(name, inputs, weight, None, rows)


def grouped_product(
    inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns inputs @ weight.T, where weight[i, j] = values[i, j] * scales[i, j // 64], as [`product`] does, of inputs
    that are rounded: to 1/32767 of the greatest of each 64. Where one is not finite, no output is.

    Args:
        inputs: float32 or bfloat16 [..., in_features].
        values: int8 [out_features, in_features]; in_features is a multiple of 64.
        scales: float32 [out_features, in_features / 64].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        [..., out_features], of the inputs' dtype.
    """
    return _run("grouped", inputs, values, scales, rows)


def int4_product(
    inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns inputs @ weight.T, where weight[i, j] = q[i, j] * scales[i, j // 32, 0] + scales[i, j // 32, 1], as
    [`grouped_product`] does.

    Args:
        inputs: float32 or bfloat16 [..., in_features]; in_features is a multiple of 64.
        values: uint8 [out_features, in_features / 2]: of each 64 inputs the byte j has q of input j in its lower 4
            bits, and of input j + 32 in its upper ones.
        scales: bfloat16 [out_features, in_features / 32, 2].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        [..., out_features], of the inputs' dtype.
    """
    return _run("int4", inputs, values, scales, rows)


def _run(
    name: str, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """Runs a kernel in torch's threads, each of which takes its share of the rows."""
    *places, in_features = inputs.shape
    num_tokens, (out_features, stored_features) = math.prod(places), weight.shape
    if num_tokens > _MAX_TOKENS:  # so that little memory is taken
        parts = inputs.reshape(-1, in_features).split(_MAX_TOKENS)
        return torch.cat([_run(name, part, weight, scales, rows) for part in parts]).view(*places, out_features)
    if in_features != stored_features * (2 if name == "int4" else 1) or (scales is not None and in_features % GROUP):
        raise RuntimeError(f"{in_features} inputs do not go with a weight of {stored_features} columns, {name}")
    is_narrow, num_threads = inputs.dtype == torch.bfloat16, torch.get_num_threads()
    outputs = (inputs.new_empty if rows is None else inputs.new_zeros)(*places, out_features)
    for tensor in (inputs, weight, scales, rows):
        if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
            raise RuntimeError("a kernel for CPUs wants tensors there, whose memory lies in rows")
    memory = None  # in which each thread widens or rounds the inputs
    if is_narrow or scales is not None:  # whatever the default dtype and device are
        memory = inputs.new_empty(num_threads, num_tokens, in_features, dtype=torch.float32)
    arguments = _packed(
        inputs.data_ptr(),
        weight.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        outputs.data_ptr(),
        num_tokens,
        out_features,
        in_features,
        _ALL if rows is None else len(rows),
        is_narrow,
        0 if memory is None else memory.data_ptr(),
    )
    # As what `#pragma omp parallel` is compiled to; the interpreter runs on meanwhile.
    _openmp().GOMP_parallel(_kernel(name).address, arguments, num_threads, 0)
    return outputs


_ALL = -1  # in place of a number of rows
_packed = struct.Struct("11q").pack  # in a fraction of the time of an array of ctypes


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Returns the OpenMP library that torch has loaded already, or `None` where it is another one."""
    files = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    try:
        # A second one would have threads of its own, which wait for the same cores.
        library = ctypes.CDLL(str(files[0]), mode=os.RTLD_NOLOAD | ctypes.DEFAULT_MODE)
    except (IndexError, OSError, AttributeError):  # there is none, or another one was loaded before torch
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def _kernel(name: str) -> Any:
    with _lock:  # the first call compiles
        return _compiled(name)


@functools.cache
def _compiled(name: str) -> Any:
    """Returns a compiled kernel, which has an `address`."""
    from . import dots

    symbols = {
        symbol: ctypes.cast(getattr(_openmp(), symbol), ctypes.c_void_p).value
        for symbol in ("omp_get_thread_num", "omp_get_num_threads")
    }
    return dots.compiled(name, symbols)
