"""Products of a few tokens with a weight on a CPU, as fast as its bytes can be read. numba compiles them, and torch's
own threads run them: threads of another pool would wait for the same cores.
"""

import ctypes
import functools
import itertools
import logging
import math
import os
import statistics
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)

PACKED = ("grouped", "int4")  # kernels for weights that only they read
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
        _address("grouped")
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


def takes_less(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether one computation clearly takes less time than another, as medians of some rounds."""
    seconds: dict[Callable, list[float]] = {one: [], other: []}
    with torch.inference_mode():
        for _ in range(_NUM_ROUNDS):
            for compute, times in seconds.items():
                start = time.perf_counter()
                compute()
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[one]) < _CLEARLY * statistics.median(seconds[other])


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
    return Products(name, [(weight,)])(inputs, rows)[0]


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
    return Products("grouped", [(values, scales)])(inputs, rows)[0]


def int4_product(
    inputs: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns (inputs * columns) @ weight.T, where weight[i, j] = q[i, j] * scales[i, j // 32, 0] +
    scales[i, j // 32, 1], as [`product`] does. inputs * columns are rounded, to 1/127 of the greatest of each 64. Where
    one is not finite, no output is.

    Args:
        inputs: float32 or bfloat16 [..., in_features]; in_features is a multiple of 64.
        values: uint8 [out_features, in_features / 2]: of each 64 inputs the byte j has q of input j in its lower 4
            bits, and of input j + 32 in its upper ones.
        scales: bfloat16 [out_features, in_features / 32, 2].
        columns: bfloat16 [in_features].
        rows: long [num_rows], the outputs that are needed, all by default.

    Returns:
        [..., out_features], of the inputs' dtype.
    """
    return Products("int4", [(values, scales, columns)])(inputs, rows)[0]


class Products:
    """The products of the same inputs with some weights, in one call of a kernel, which takes longer than a small one
    does.

    Args:
        name: of the kernel: `"float32"` or `"bfloat16"` for [`product`], `"grouped"` for [`grouped_product`], `"int4"`
            for [`int4_product`].
        weights: of each product what that takes behind the inputs, [out_features, in_features] and so on.
    """

    def __init__(self, name: str, weights: Sequence[Sequence[torch.Tensor]]):
        self._name, self._is_packed = name, name in PACKED
        for tensor in itertools.chain(*weights):
            _check(tensor)
        self._weights = weights  # so that their memory stays theirs
        shapes = [tensors[0].shape for tensors in weights]
        self._in_features = shapes[0][1] * (2 if name == "int4" else 1)
        self._places = [
            ([*(tensor.data_ptr() for tensor in tensors), 0, 0][:3], shape[0])
            for tensors, shape in zip(weights, shapes, strict=True)
        ]
        is_alike = {shape[1] for shape in shapes} == {shapes[0][1]}
        self._fits = is_alike and not (self._is_packed and self._in_features % GROUP)
        self._pack = struct.Struct(f"{1 + 12 * len(weights)}q").pack

    def __call__(self, inputs: torch.Tensor, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Returns each product, [..., out_features]. torch's threads run them, each its share of the rows.

        Args:
            inputs: float32 or bfloat16 [..., in_features].
            rows: long [num_rows], as for [`product`].
        """
        *places, in_features = inputs.shape
        if in_features != self._in_features or not self._fits:
            shapes = [list(tensors[0].shape) for tensors in self._weights]
            raise RuntimeError(f"{in_features} inputs do not go with weights of the shapes {shapes}, {self._name}")
        num_tokens = math.prod(places)
        if num_tokens > _MAX_TOKENS:  # so that little memory is taken
            of_parts = [self(part, rows) for part in inputs.reshape(-1, in_features).split(_MAX_TOKENS)]
            joined = map(torch.cat, zip(*of_parts, strict=True))
            return [outputs.view(*places, outputs.shape[-1]) for outputs in joined]
        _check(inputs)
        if inputs.dtype not in DTYPES or (rows is not None and rows.dtype != torch.long):
            raise RuntimeError(
                f"a kernel for CPUs wants inputs in one of {DTYPES}, got {inputs.dtype}, and rows in torch.long"
            )
        is_narrow, num_threads = inputs.dtype == torch.bfloat16, torch.get_num_threads()
        memory, address = None, 0  # in which each thread widens or rounds the inputs
        size = num_threads * num_tokens * in_features if is_narrow or self._is_packed else 0
        if size > _LITTLE:
            memory = inputs.new_empty(size, dtype=torch.float32)
            address = memory.data_ptr()
        elif size:  # in a fraction of the time of a tensor; it is filled with zeros
            memory = (ctypes.c_float * size)()
            address = ctypes.addressof(memory)
        new, num_rows, rows_address = inputs.new_empty, _ALL, 0
        if rows is not None:
            _check(rows)
            new, num_rows, rows_address = inputs.new_zeros, len(rows), rows.data_ptr()
        all_outputs, arguments, inputs_address = [], [len(self._places)], inputs.data_ptr()
        for addresses, out_features in self._places:
            outputs = new((*places, out_features))
            all_outputs.append(outputs)
            arguments += (
                inputs_address, *addresses, rows_address, outputs.data_ptr(),
                num_tokens, out_features, in_features, num_rows, is_narrow, address,
            )  # fmt: skip
        # As what `#pragma omp parallel` is compiled to; the interpreter runs on meanwhile.
        _openmp().GOMP_parallel(_address(self._name), self._pack(*arguments), num_threads, 0)
        return all_outputs


def _check(tensor: torch.Tensor) -> None:
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise RuntimeError("a kernel for CPUs wants tensors there, whose memory lies in rows")


_LITTLE = 2**14  # numbers
_ALL = -1  # in place of a number of rows


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


_kernels: dict[str, Any] = {}  # that are compiled, each of which has an `address`


def _address(name: str) -> int:
    kernel = _kernels.get(name)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(name) or _kernels.setdefault(name, _compiled(name))
    return kernel.address


def _compiled(name: str) -> Any:
    from . import dots

    symbols = {
        symbol: ctypes.cast(getattr(_openmp(), symbol), ctypes.c_void_p).value
        for symbol in ("omp_get_thread_num", "omp_get_num_threads")
    }
    return dots.compiled(name, symbols)
