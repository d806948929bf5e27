"""Per-layer thresholds of |act(gate_proj x)|, which `sparsity/calibrate.py` measures on a corpus, and their file."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..model.projections import is_opaque, products_of_columns
from ..model.sites import MlpSite, neuron_weight


CALIBRATION_NAME = "sirius_calibration.safetensors"
CALIBRATED_DENSITIES = [i / 100 for i in range(1, 101)]
_FORMAT = "hf_sirius.calibration.1"
_NUM_PROBES = 16


class Calibration:
    """Thresholds of every MLP for every density from 0.01 to 1.00, and what tells the model that they are of.

    Args:
        table: float32 [num_mlps, 100]; column i holds the thresholds at density (i + 1) / 100.
        probe: float32 [num_mlps, 16]; the first weights of each MLP's gate projection.
        metadata: plain values (model class, number of tokens, ...), for people.
    """

    def __init__(self, table: torch.Tensor, probe: torch.Tensor, metadata: dict):
        if table.ndim != 2 or table.shape[1] != len(CALIBRATED_DENSITIES) or probe.shape[:1] != table.shape[:1]:
            raise ValueError(
                f"a calibration has a table [num_mlps, {len(CALIBRATED_DENSITIES)}] and a probe [num_mlps, "
                f"{_NUM_PROBES}], got {list(table.shape)} and {list(probe.shape)}"
            )
        self.table, self.probe, self.metadata = table, probe, metadata

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Calibration)
            and torch.equal(self.table, other.table)
            and torch.equal(self.probe, other.probe)
            and self.metadata == other.metadata
        )

    def __hash__(self) -> int:
        return hash((self.table.shape, self.table.sum().item()))

    def __repr__(self) -> str:
        return f"Calibration({self.metadata})"

    def thresholds(self, density: float) -> list[float]:
        """Returns the thresholds of all MLPs at a density in (0, 1], interpolated between hundredths."""
        position = max(density * 100 - 1, 0.0)
        low = min(int(position), len(CALIBRATED_DENSITIES) - 1)
        high = min(low + 1, len(CALIBRATED_DENSITIES) - 1)
        return torch.lerp(self.table[:, low], self.table[:, high], position - low).tolist()

    def check_model(self, sites: list[MlpSite]) -> None:
        """Raises `ValueError` unless the thresholds were measured on the model that has these MLPs."""
        probe = probe_weights(sites)
        remedy = "Calibrate this model with hf_sirius.calibrate(...), or leave the calibration out."
        if probe.shape != self.probe.shape:
            raise ValueError(
                f"this calibration is of another model ({self.metadata}): it has thresholds for {self.probe.shape[0]} "
                f"MLPs and this model has {probe.shape[0]}. {remedy}"
            )
        # A cast model still has nearly the same weights; another one has a cosine near 0.
        similarity = nn.functional.cosine_similarity(probe.flatten(), self.probe.flatten(), dim=0).item()
        if similarity < 0.9:
            raise ValueError(
                f"this calibration is of another model ({self.metadata}): its gate projections hold other weights "
                f"(cosine {similarity:.2f}). " + remedy
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `sirius_calibration.safetensors` to a directory, created if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / CALIBRATION_NAME
        partial = file.with_suffix(".partial")
        metadata = {"format": _FORMAT, "metadata": json.dumps(self.metadata)}
        save_file({"table": self.table.contiguous(), "probe": self.probe.contiguous()}, partial, metadata=metadata)
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
                return cls(stored.get_tensor("table"), stored.get_tensor("probe"), json.loads(metadata["metadata"]))
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is not a whole safetensors file ({error}): calibrate again") from error


def probe_weights(sites: list[MlpSite]) -> torch.Tensor:
    """Returns the first weights of each gate projection, float32 [num_mlps, 16], by which to know a model again."""
    return torch.stack([_first_weights(site.gate) for site in sites])


def _first_weights(gate: nn.Module) -> torch.Tensor:
    weights = products_of_columns(gate, 0, _NUM_PROBES)[:, 0] if is_opaque(gate) else neuron_weight(gate)[0]
    return weights.detach().float().cpu()[:_NUM_PROBES]
