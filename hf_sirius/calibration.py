"""Per-layer thresholds from a corpus: how large |act(gate_proj x)| must be for a share of the neurons to exceed it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from .mlp import MlpSite, find_mlps, neuron_weight
from .observation import evaluating, observing


CALIBRATION_NAME = "sirius_calibration.safetensors"
_DENSITIES = [i / 100 for i in range(1, 101)]
_FORMAT = "hf_sirius.calibration.1"
_NUM_PROBES = 16


class MagnitudeHistogram:
    """Counts of magnitudes in bins as fine as bfloat16 is, so that quantiles of any stream take bounded memory.

    The upper half of a float32's bits (sign, exponent, 7 bits of mantissa) grows with its magnitude: it is the bin's
    number. A quantile is thus right to a relative 2**-7.
    """

    _NUM_BINS = 0x7F80 + 1  # up to the bits of infinity

    def __init__(self):
        self.counts: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        """Counts the magnitudes of a float tensor of any shape."""
        bins = values.float().abs().contiguous().view(torch.int32).flatten() >> 16
        counts = torch.bincount(bins.clamp_(max=self._NUM_BINS - 1), minlength=self._NUM_BINS)
        self.counts = counts if self.counts is None else self.counts + counts

    def quantiles(self, shares: list[float]) -> torch.Tensor:
        """Returns, for each share, a magnitude that about this share of the values does not exceed: float32
        [len(shares)].

        Share 0 gives -1, which every magnitude exceeds.
        """
        if self.counts is None or not self.counts.any():
            raise ValueError("no value was counted: quantiles need at least one token")
        cumulative = self.counts.cumsum(0).double() / self.counts.sum()
        wanted = torch.tensor(shares, dtype=torch.float64, device=cumulative.device)
        bins = torch.searchsorted(cumulative, wanted).clamp_(max=self._NUM_BINS - 2)
        # The bin's upper edge: all that is counted up to this bin lies below it.
        edges = ((bins.to(torch.int32) + 1) << 16).contiguous().view(torch.float32)
        return torch.where(wanted <= 0, torch.full_like(edges, -1.0), edges)

    def quantile(self, share: float) -> torch.Tensor:
        """Returns one quantile, a float32 scalar tensor."""
        return self.quantiles([share])[0]


class Calibration:
    """Thresholds of every MLP for every density from 0.01 to 1.00, and what tells the model that they are of.

    Args:
        table: float32 [num_mlps, 100]; column i holds the thresholds at density (i + 1) / 100.
        probe: float32 [num_mlps, 16]; the first weights of each MLP's gate projection.
        metadata: plain values (model class, number of tokens, ...), for people.
    """

    def __init__(self, table: torch.Tensor, probe: torch.Tensor, metadata: dict):
        if table.ndim != 2 or table.shape[1] != len(_DENSITIES) or probe.shape[:1] != table.shape[:1]:
            raise ValueError(
                f"a calibration has a table [num_mlps, {len(_DENSITIES)}] and a probe [num_mlps, {_NUM_PROBES}], got "
                f"{list(table.shape)} and {list(probe.shape)}"
            )
        self.table = table
        self.probe = probe
        self.metadata = metadata

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
        low = min(int(position), len(_DENSITIES) - 1)
        high = min(low + 1, len(_DENSITIES) - 1)
        return torch.lerp(self.table[:, low], self.table[:, high], position - low).tolist()

    def check_model(self, sites: list[MlpSite]) -> None:
        """Raises `ValueError` unless the thresholds were measured on the model that has these MLPs."""
        probe = _probe(sites)
        remedy = "Calibrate this model with hf_sirius.calibrate(...), or leave the calibration out."
        if probe.shape != self.probe.shape:
            raise ValueError(
                f"this calibration is of another model ({self.metadata}): it has thresholds for {self.probe.shape[0]} "
                "MLPs and this "
                f"model has {probe.shape[0]}. {remedy}"
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


def _probe(sites: list[MlpSite]) -> torch.Tensor:
    """Returns the first weights of each gate projection, float32 [num_mlps, 16], by which to know a model again."""
    return torch.stack([neuron_weight(site.gate)[0].detach().float().cpu()[:_NUM_PROBES] for site in sites])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokenizer,
    texts: Iterable,
    *,
    max_length: int = 512,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measures the magnitudes of |act(gate_proj x)| of a model on a corpus, for `SiriusConfig(method="cats",
    calibration=...)`.

    The texts are read one at a time and only histograms are kept, so the memory needed does not grow with the corpus.

    Args:
        model: the dense model, loaded and on its device.
        tokenizer: the model's tokenizer. It may be `None` if every item of `texts` holds token ids already.
        texts: strings, or items with `input_ids` of shape [length] or [1, length] (such as those of
            `optimum.gptq.data.get_dataset`).
        max_length: longer texts are cut to this many tokens.
        max_tokens: stop after this many tokens; all texts are read without it.
        progress: whether to show a progress bar.

    Raises:
        `TypeError` for a single string or for text without a tokenizer, `ValueError` if the corpus has no token or the
        model no known MLP.
    """
    for name, value in (("max_length", max_length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(texts, Mapping):
        raise TypeError("texts must be an iterable of texts, got a single encoding: pass [encoding]")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of texts, got a single string: pass [text], or its lines")
    from .twin import SparseTwin  # which imports the config, and that this module

    if isinstance(model, SparseTwin):
        raise ValueError("calibrate measures the dense model, got its sparse twin: pass twin.dense_model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has weights that are not loaded, or offloaded by accelerate, for which cats "
            "cannot draft: calibrate the model where it is loaded, or use griffin, which needs no calibration"
        )
    sites = find_mlps(model)
    histograms = [MagnitudeHistogram() for _ in sites]
    num_texts = num_tokens = 0
    with evaluating(model), tqdm(total=max_tokens, unit="token", disable=not progress, desc="calibrating") as bar:
        for text in texts:
            input_ids = _input_ids(text, tokenizer)[:, :max_length]
            if max_tokens is not None:
                input_ids = input_ids[:, : max_tokens - num_tokens]
            if input_ids.shape[1]:
                with observing(sites, "activation", lambda site, values: histograms[site.idx].add(values)):
                    model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
                num_texts += 1
                num_tokens += input_ids.shape[1]
                bar.update(input_ids.shape[1])
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    if not num_tokens:
        raise ValueError("the corpus holds no token: pass at least one text that is not empty")
    table = torch.stack([h.quantiles([1 - d for d in _DENSITIES]) for h in histograms]).cpu()
    metadata = {
        "model_class": type(model).__name__,
        "name_or_path": getattr(model.config, "_name_or_path", ""),
        "num_mlps": len(sites),
        "num_neurons": sites[0].num_neurons,
        "num_texts": num_texts,
        "num_tokens": num_tokens,
    }
    return Calibration(table, _probe(sites), metadata)


def _input_ids(text, tokenizer) -> torch.Tensor:
    """Returns the token ids of one item of a corpus, long [1, length]."""
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("texts holds strings, so a tokenizer is needed; without one, pass items with input_ids")
        return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()
    try:
        input_ids = torch.as_tensor(text["input_ids"] if isinstance(text, Mapping) else text)
        if input_ids.ndim == 0:
            raise TypeError("a single number")
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"an item of texts must be a string, token ids, or a mapping with input_ids, got {type(text).__name__}"
        ) from error
    return input_ids.long().reshape(1, -1)
