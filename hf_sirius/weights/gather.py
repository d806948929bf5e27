"""Taking some rows or columns of a weight, in new memory or in memory that is there already."""

import dataclasses
import mmap
from collections.abc import Iterator

import torch


_CHUNK = 2**20  # elements that are gathered at a time
OWN_MEMORY = 2**20  # bytes from which a tensor is worth a mapping of its own


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some rows and columns of a weight [out_features, in_features], `None` for all."""

    weight: torch.Tensor
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        chosen = zip(self.weight.shape, (self.rows, self.columns), strict=True)
        return tuple(size if indices is None else len(indices) for size, indices in chosen)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields a few rows at a time, and where they go: each is converted while it is in the cache, with no large
        temporary (those of bitsandbytes' CPU code are several times as large as what it quantizes).
        """
        device, columns = self.weight.device, self.columns
        if columns is not None:
            columns = columns.to(device)
        size = max(1, _CHUNK // self.shape[1])
        start = 0
        for source in self.weight.split(size) if self.rows is None else self.rows.to(device).split(size):
            piece = source if self.rows is None else self.weight.index_select(0, source)
            if columns is not None:  # by gather, as index_select along rows took twice as long on a CPU
                piece = piece.gather(1, columns.expand(len(piece), -1))
            yield slice(start, start := start + len(piece)), piece

    def copy(self, dtype: torch.dtype, memory: torch.Tensor | None = None) -> torch.Tensor:
        selected = empty(*self.shape, dtype, self.weight.device, memory)
        for place, piece in self.pieces():
            selected[place].copy_(piece)
        return selected


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def empty(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns `torch.empty`, in `memory` if it fits, or in memory of its own."""
    num_bytes = num_rows * num_columns * dtype.itemsize
    if memory is None or memory.nbytes < num_bytes or memory.device != device:
        if device.type != "cpu" or num_bytes < OWN_MEMORY:
            return torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        memory = own_memory(num_bytes)
    return memory[:num_bytes].view(dtype).view(num_rows, num_columns)


def own_memory(num_bytes: int) -> torch.Tensor:
    """Returns memory of a CPU, uint8 [num_bytes], which goes back to the system with the tensor; malloc kept most."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=torch.uint8)
