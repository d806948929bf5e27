"""The cutoffs of cats and teal: from which magnitude on a value is kept, at each site of one call."""

import torch

from ..settings.calibration import CALIBRATED_DENSITIES, Calibration, interpolate
from ..settings.config import SiriusConfig


class Cutoffs:
    """Keeps of each site's values, in one call, those whose magnitude reaches its cutoff, or with `selection="topk"` of
    each token the largest, and counts them.

    A cutoff is the (1 - density) quantile of the magnitudes of the dense model: on the calibration corpus, or else over
    the prompt. A draft's own states drift from the dense model's, and the share that is kept with them (of SmolLM2 with
    teal at density 0.2 it was 0.13): from draft to draft the cutoffs follow what was kept, at densities from 0.01 to
    0.99.

    Args:
        config: the settings of the twin.
        num_sites: how many there are.
        calibration: the cutoffs of a corpus, where these sites have them; by default they are those of the prompt.

    Counts are tensors, as a graph can add to them; numbers would be constants of it.

    Attributes:
        values: the cutoff of each site, a float, or a scalar tensor of its own.
    """

    _LEAST, _MOST = CALIBRATED_DENSITIES[0], CALIBRATED_DENSITIES[-2]  # at the last one zeros are kept as well

    def __init__(self, config: SiriusConfig, num_sites: int, calibration: Calibration | None = None):
        self.config = config
        self.values: list[float | torch.Tensor] = [0.0] * num_sites
        self._asked = torch.full((num_sites,), config.density, dtype=torch.float64)
        # Of each site its cutoffs at CALIBRATED_DENSITIES, as soon as they are known.
        self._table: list[torch.Tensor | None] = [None] * num_sites
        self._histograms: list[MagnitudeHistogram] = []
        if calibration is not None:
            self.values = calibration.thresholds(config.density, config.budget)
            self._asked = calibration.densities(config.density, config.budget)
            self._table = list(calibration.table)
        else:
            self._histograms = [MagnitudeHistogram() for _ in range(num_sites)]
        self._wanted = self._asked.clone()  # the densities whose cutoffs keep what is asked for
        # Of each site how many values were kept and seen since the latest draft began, long [].
        self._num_kept: list[torch.Tensor | None] = [None] * num_sites
        self._num_values: list[torch.Tensor | None] = [None] * num_sites
        self._num_topk = [0] * num_sites  # of a token's values
        self._num_kept_before = torch.zeros(num_sites, dtype=torch.float64)
        self._num_values_before = torch.zeros(num_sites, dtype=torch.float64)

    def observe(self, site_idx: int, magnitudes: torch.Tensor) -> None:
        """Takes in magnitudes of the prefill, of any shape."""
        self._histograms[site_idx].add(magnitudes)

    def choose(self, site_idx: int) -> None:
        """Chooses a site's cutoff by what was observed so far, if anything is observed."""
        if self._histograms:
            shares = [1 - float(self._asked[site_idx]), *(1 - density for density in CALIBRATED_DENSITIES)]
            quantiles = self._histograms[site_idx].quantiles(shares)
            self.values[site_idx], self._table[site_idx] = quantiles[0].clone(), quantiles[1:].cpu()
            self._wanted[site_idx] = self._asked[site_idx]

    def prepare(self, site_idx: int, num_values: int, device: torch.device) -> None:
        """Has on a device what `keep` needs of a site, whose tokens have so many values. A graph is to find it so."""
        for counts in (self._num_kept, self._num_values):
            count = counts[site_idx]
            counts[site_idx] = torch.zeros((), dtype=torch.long, device=device) if count is None else count.to(device)
        self.values[site_idx] = torch.as_tensor(self.values[site_idx], dtype=torch.float32, device=device)
        self._num_topk[site_idx] = max(1, round(self.config.density * num_values))

    def keep(self, site_idx: int, magnitudes: torch.Tensor) -> torch.Tensor:
        """Returns which magnitudes are kept, bool of their shape, and counts them."""
        count = self._num_kept[site_idx]
        if count is None or count.device != magnitudes.device:
            self.prepare(site_idx, magnitudes.shape[-1], magnitudes.device)
        if self.config.selection == "topk":
            is_kept = torch.zeros_like(magnitudes, dtype=torch.bool)
            is_kept.scatter_(-1, magnitudes.topk(self._num_topk[site_idx], dim=-1, sorted=False).indices, True)
        else:
            # A cutoff among the zeros is the least float32 above them, which float16 does not have.
            wide = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
            is_kept = wide >= self.values[site_idx]
        self._num_kept[site_idx].add_(is_kept.sum())
        self._num_values[site_idx].add_(is_kept.numel())
        return is_kept

    def share(self, site_idx: int) -> float | None:
        """Returns the share of a site's values that was kept; `None` before any was seen."""
        num_values, num_kept = float(self._num_values_before[site_idx]), float(self._num_kept_before[site_idx])
        if self._num_kept[site_idx] is not None:
            num_values += float(self._num_values[site_idx])
            num_kept += float(self._num_kept[site_idx])
        return num_kept / num_values if num_values else None

    def follow(self) -> None:
        """Moves the cutoffs towards those with which the latest draft had kept the share that is asked for."""
        seen = [
            idx
            for idx, (num_values, table, asked) in enumerate(
                zip(self._num_values, self._table, self._asked, strict=True)
            )
            if table is not None and self._LEAST <= asked <= self._MOST and num_values is not None and num_values > 0
        ]
        if not seen:
            return
        latest = [self._num_kept[idx] for idx in seen]
        device = latest[0].device
        num_kept = torch.stack([count.to(device) for count in latest]).cpu().double()
        num_values = torch.stack([self._num_values[idx].to(device) for idx in seen]).cpu().double()
        ratio = (self._asked[seen] * num_values / num_kept.clamp(min=1)).clamp(0.5, 2.0)
        # Half of the way, in logarithms: the few tokens of one draft tell it with noise.
        self._wanted[seen] = wanted = (self._wanted[seen] * ratio.sqrt()).clamp(self._LEAST, self._MOST)
        values = interpolate(torch.stack([self._table[idx] for idx in seen]), wanted).float().to(device)
        for idx, value, count in zip(seen, values.unbind(), latest, strict=True):
            self.values[idx].copy_(value)  # which stays the tensor that a graph knows
            count.zero_()
            self._num_values[idx].zero_()
        self._num_kept_before[seen] += num_kept
        self._num_values_before[seen] += num_values


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
        """Returns for each share, float32 [len(shares)], a magnitude that about this share of the values does not
        exceed; for 0 it is -1, which every magnitude exceeds.
        """
        if self.counts is None or not self.counts.any():
            raise ValueError("no value was counted: quantiles need at least one token")
        cumulative = self.counts.cumsum(0).double() / self.counts.sum()
        wanted = torch.tensor(shares, dtype=torch.float64, device=cumulative.device)
        bins = torch.searchsorted(cumulative, wanted).clamp_(max=self._NUM_BINS - 2)
        # The bin's upper edge: all that is counted up to this bin lies below it.
        edges = ((bins.to(torch.int32) + 1) << 16).contiguous().view(torch.float32)
        return torch.where(wanted <= 0, torch.full_like(edges, -1.0), edges)
