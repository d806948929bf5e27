"""Memory: by how much a process or a device grew, and what is streamed from a folder."""

import ctypes
import gc
import sys
from collections.abc import Mapping

import torch
from accelerate.utils.offload import PrefixedDataset
from transformers import PreTrainedModel

from ..model.accelerate_hooks import streaming_hooks


def trim_heap() -> None:
    """Has glibc, where that is what gives memory, return what is free to the system.

    Of what a layer's activations took, the KV-cache takes small parts, so the next layer's find no room there and take
    more: free memory grows with every layer, and glibc by itself keeps it.
    """
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


class PeakMemory:
    """Measures by how much memory grew since this was made: a GPU's (CUDA), or this process' on a CPU (Linux, where it
    may reset its peak); else it is not known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_known = device.type in ("cpu", "cuda")
        try:
            self.restart()
        except OSError:  # no such file, or no right to write it
            self.is_known = False
        if device.type == "cuda":
            self._before = torch.cuda.memory_allocated(device)
        elif self.is_known:
            trim_heap()  # memory that is free already would hide growth
            self._before = process_memory("VmRSS")

    def restart(self) -> None:
        """Has the peak count from here on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.is_known:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def growth(self) -> int | None:
        """Returns the peak less what was there at first, in bytes, or `None` where that is not known."""
        if self.device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self.device) - self._before)
        return max(0, process_memory("VmHWM") - self._before) if self.is_known else None


def process_memory(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class StreamedBytes:
    """Counts the bytes that accelerate takes from CPU memory or the offload folder (whose pages may be cached)."""

    def __init__(self, model: PreTrainedModel):
        self.num_bytes = 0
        for _, hook in streaming_hooks(model):
            hook.weights_map = _CountedWeights(hook.weights_map, self)


class _CountedWeights(PrefixedDataset):
    def __init__(self, weights: Mapping, counter: StreamedBytes):
        super().__init__(weights, prefix="")
        self.counter = counter

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name)
        self.counter.num_bytes += weight.nbytes
        return weight
