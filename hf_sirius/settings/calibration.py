"""Thresholds of each MLP or projection, which `sparsity/calibrate.py` measures on a corpus, and their file."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..model.accelerate_hooks import streamed_weight
from ..model.projections import is_quantized, products_of_columns, projection_shape
from ..model.sites import MlpSite, ProjectionSite, neuron_weight


CALIBRATION_NAME = "sirius_calibration.safetensors"
CALIBRATED_DENSITIES = [i / 100 for i in range(1, 101)]
_FORMAT = "hf_sirius.calibration.1"
_NUM_PROBES = 16


class Calibration:
    """Thresholds of every site for every density from 0.01 to 1.00, and what tells the model that they are of.

    A site is an MLP for cats, a projection for teal.

    Args:
        table: float32 [num_sites, 100]; column i holds the thresholds at density (i + 1) / 100.
        probe: float32 [num_sites, 16]; the first weights of each projection, of an MLP those of its gate projection.
        metadata: plain values: what they are for (`method` and `weighting`, without which it is cats), and for people
            the model's class, the number of tokens, and so on.
        budgets: float32 [num_sites, 100]; column i holds the density of each projection where that of its block is
            (i + 1) / 100. `None` without `budget="greedy"`.
    """

    def __init__(self, table: torch.Tensor, probe: torch.Tensor, metadata: dict, budgets: torch.Tensor | None = None):
        is_table = table.ndim == 2 and table.shape[1] == len(CALIBRATED_DENSITIES)
        has_budgets = budgets is None or budgets.shape == table.shape
        if not is_table or not has_budgets or probe.shape[:1] != table.shape[:1]:
            shapes = [list(tensor.shape) for tensor in (table, probe, budgets) if tensor is not None]
            raise ValueError(
                f"a calibration has a table [num_sites, {len(CALIBRATED_DENSITIES)}], a probe [num_sites, "
                f"{_NUM_PROBES}], and budgets of the table's shape or none, got {', '.join(map(str, shapes))}"
            )
        self.table, self.probe, self.metadata, self.budgets = table, probe, metadata, budgets

    @property
    def method(self) -> str:
        """The method that these thresholds are for."""
        return self.metadata.get("method", "cats")

    @property
    def weighting(self) -> str:
        """The `weighting` that these thresholds are for."""
        return self.metadata.get("weighting", "magnitude")

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Calibration)
            and torch.equal(self.table, other.table)
            and torch.equal(self.probe, other.probe)
            and self.metadata == other.metadata
            and (self.budgets is None) == (other.budgets is None)
            and (self.budgets is None or torch.equal(self.budgets, other.budgets))
        )

    def __hash__(self) -> int:
        return hash((self.table.shape, self.table.sum().item()))

    def __repr__(self) -> str:
        return f"Calibration({self.metadata})"

    def densities(self, density: float, budget: str = "uniform") -> torch.Tensor:
        """Returns the density of each site, float64 [num_sites], where that of the model is `density`, in (0, 1].

        Raises `ValueError` for `budget="greedy"` where no budgets were measured.
        """
        self.check_budget(budget)
        uniform = torch.full((len(self.table),), density, dtype=torch.float64)
        return uniform if budget == "uniform" else interpolate(self.budgets, uniform)

    def thresholds(self, density: float, budget: str = "uniform") -> list[float]:
        """Returns the thresholds of all sites at these densities, interpolated between hundredths."""
        return interpolate(self.table, self.densities(density, budget)).tolist()

    def check_budget(self, budget: str) -> None:
        """Raises `ValueError` for `budget="greedy"` where no budgets were measured."""
        if budget != "uniform" and self.budgets is None:
            raise ValueError(
                f"this calibration was measured without budget={budget!r} ({self.metadata}): calibrate with "
                f"hf_sirius.calibrate(..., method={self.method!r}, budget={budget!r}), or use budget='uniform'"
            )

    def check_model(self, sites: list[MlpSite] | list[ProjectionSite]) -> None:
        """Raises `ValueError` unless the thresholds were measured on the model that has these MLPs, or projections."""
        probe = probe_weights(sites)
        remedy = "Calibrate this model with hf_sirius.calibrate(...), or leave the calibration out."
        if probe.shape != self.probe.shape:
            raise ValueError(
                f"this calibration is of another model ({self.metadata}): it has thresholds for {self.probe.shape[0]} "
                f"{'MLPs' if self.method == 'cats' else 'projections'} and this model has {probe.shape[0]}. {remedy}"
            )
        # A model that is cast or quantized still has nearly the same weights; another one has a cosine near 0.
        similarity = nn.functional.cosine_similarity(probe.flatten(), self.probe.flatten(), dim=0).item()
        if similarity < 0.9:
            raise ValueError(
                f"this calibration is of another model ({self.metadata}): its projections hold other weights "
                f"(cosine {similarity:.2f}). " + remedy
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `sirius_calibration.safetensors` to a directory, created if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / CALIBRATION_NAME
        partial = file.with_suffix(".partial")
        metadata = {"format": _FORMAT, "metadata": json.dumps(self.metadata)}
        tensors = {"table": self.table, "probe": self.probe, "budgets": self.budgets}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, file)

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "Calibration":
        """Loads what `save_pretrained` wrote to this directory."""
        return cls.from_file(Path(save_directory) / CALIBRATION_NAME)

    @classmethod
    def from_file(cls, file: str | os.PathLike) -> "Calibration":
        """Loads one file. Raises `FileNotFoundError`, or `ValueError` if it is not a calibration."""
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no calibration at {str(file)!r}: make one with hf_sirius.calibrate(...).save_pretrained(...)"
            )
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"{str(file)!r} is not a calibration of hf_sirius (format {metadata.get('format')!r})"
                    )
                names = list(stored.keys())
                budgets = stored.get_tensor("budgets") if "budgets" in names else None
                table, probe = stored.get_tensor("table"), stored.get_tensor("probe")
                return cls(table, probe, json.loads(metadata["metadata"]), budgets)
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is not a whole safetensors file ({error}): calibrate again") from error


def probe_weights(sites: list[MlpSite] | list[ProjectionSite]) -> torch.Tensor:
    """Returns the first weights of each projection, of an MLP those of its gate projection, float32 [num_sites, 16], by
    which to know a model again. Rows of fewer weights end in zeros.
    """
    probes = [_first_weights(site.gate if isinstance(site, MlpSite) else site.module) for site in sites]
    return nn.utils.rnn.pad_sequence(probes, batch_first=True)


def _first_weights(projection: nn.Module) -> torch.Tensor:
    if is_quantized(projection):
        num_columns = min(_NUM_PROBES, projection_shape(projection)[1])
        weights = products_of_columns(projection, 0, num_columns)[:, 0]
    else:
        weights = (streamed_weight(projection) if projection.weight.is_meta else neuron_weight(projection))[0]
    return weights.detach().float().cpu()[:_NUM_PROBES]


def interpolate(table: torch.Tensor, densities: torch.Tensor) -> torch.Tensor:
    """Returns the value of each row of a table at a density of its own, [num_rows]."""
    positions = (densities * 100 - 1).clamp(min=0)
    low = positions.long().clamp(max=len(CALIBRATED_DENSITIES) - 2)
    rows = torch.arange(len(table))
    return torch.lerp(table[rows, low].double(), table[rows, low + 1].double(), positions - low)
