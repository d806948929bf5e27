"""The machine on which something is timed, and how fast it reads memory."""

import datetime
import os
import platform
import time
from typing import Any

import torch
import transformers


_READ_BYTES = 2**29  # more than caches hold
_NUM_READS = 7


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Returns what a reader of figures needs to know of the machine."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _of_processor("model name"),
        "instruction_sets": [
            name for name in _of_processor("flags").split() if name.startswith(("avx", "amx", "fma", "f16c"))
        ],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _of_processor(name: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):  # not Linux, or another processor
        return platform.processor() or platform.machine() if name == "model name" else ""


@torch.no_grad()
def memory_bandwidth(device: torch.device, num_bytes: int = _READ_BYTES) -> float:
    """Returns the bytes that a second reads of memory at most: a sum over more than the caches hold, by torch's
    threads, the fastest of a few.
    """
    numbers = torch.ones(num_bytes // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(_NUM_READS):
        start = time.perf_counter()
        numbers.sum().item()  # which waits for the device
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)
