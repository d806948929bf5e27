"""Many settings over one task: the modes that a grid of settings makes, and plots of their results."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decode.attach import repeatable
from ..settings.config import SiriusConfig
from .evaluation import Mode


_SHORT = {"kernel_size": "n", "tree_width": "width"}


def sweep_modes(config: SiriusConfig, grid: Mapping[str, Sequence[Any]]) -> list[Mode]:
    """Returns the dense model, each sparse draft alone, and every combination of a grid corrected.

    Args:
        config: the settings that do not vary.
        grid: values by the name of a `SiriusConfig` field; an empty list leaves the config's own.

    Raises:
        `ValueError` for a combination that is no valid config.
    """
    config = repeatable(config)
    grid = {name: list(dict.fromkeys(values)) for name, values in grid.items() if values}
    varied = [name for name in ("kernel_size", "threshold", "tree_width") if len(grid.get(name, ())) > 1]
    modes = {}
    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        corrected = config.with_method(fields.pop("method", config.method), **fields)
        # A draft alone has no cycles, so these settings make no difference to it.
        alone = corrected.replace(threshold=config.threshold, kernel_size=config.kernel_size, tree_width=1)
        for mode in (
            Mode(f"{_name(alone.to_dict())} alone", alone, corrected=False),
            Mode(_name(corrected.to_dict(), varied), corrected),
        ):
            modes.setdefault(mode.key, mode)
    # Drafts alone come first.
    return [Mode("dense"), *sorted(modes.values(), key=lambda mode: mode.corrected)]


def _name(config: dict[str, Any], varied: Sequence[str] = ()) -> str:
    parts = [f"{_SHORT.get(name, name)} {config[name]}" for name in varied]
    return ", ".join([f"{config['method']} {config['density']}", *parts])


def check_plots(path: str | os.PathLike | None = None) -> None:
    """Raises `ImportError` if matplotlib is missing, `ValueError` for an ending that it does not write."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install hf_sirius[plot], or leave them out with --no_plots"
        ) from error
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if path is not None and Path(path).suffix.lstrip(".").lower() not in endings:
        raise ValueError(f"a plot must end in one of {sorted(endings)}, got {str(path)!r}")


def plot_sweep(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws accuracy against threshold, AAL against threshold, accuracy against effective density and accuracy against
    AAL (figure 1 and table 8 of the paper, for this model), in one image.

    Args:
        results: what [`run_task`] returned for `sweep_modes`.
        path: of the image; its ending chooses the format.
    """
    check_plots()
    from matplotlib.figure import Figure  # not pyplot, which wants a display

    rows = [{**row, **(row["config"] or {})} for row in results["rows"]]
    dense = next(row for row in rows if row["config"] is None)
    alone = {(row["method"], row["density"]): row for row in rows if row["alone"]}
    corrected = [row for row in rows if row["config"] is not None and not row["alone"]]
    varied = [name for name in ("kernel_size", "tree_width") if len({row[name] for row in corrected}) > 1]
    series: dict[str, list[dict]] = {}  # the points of one differ in the threshold only
    for row in sorted(corrected, key=lambda row: row["threshold"]):
        series.setdefault(_name(row, varied), []).append(row)

    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_threshold, aal), (by_density, by_aal) = figure.subplots(2, 2)
    panels = (
        (by_threshold, "threshold", "accuracy", "Accuracy that sparsity loses and Sirius wins back"),
        (aal, "threshold", "aal", "Average advance length"),
        (by_density, "effective_density", "accuracy", "Accuracy for parameters read per token"),
        (by_aal, "aal", "accuracy", "Accuracy for advance"),
    )
    names = {"aal": "AAL (tokens per cycle)", "effective_density": "effective density (★ dense, × sparse alone)"}
    colors = {pair: f"C{i}" for i, pair in enumerate(alone)}
    markers = itertools.cycle("osD^vPX*")
    for label, points in series.items():
        color = colors[points[0]["method"], points[0]["density"]]
        style = {"color": color, "marker": next(markers), "markersize": 5, "label": label}
        for axes, x, y, _ in panels:
            known = [row for row in points if None not in (row[x], row[y])]
            axes.plot([row[x] for row in known], [row[y] for row in known], **style)
    for pair, row in alone.items():
        label = f"{pair[0]} {pair[1]}, alone"
        by_threshold.axhline(row["accuracy"], color=colors[pair], linestyle=":", linewidth=1, label=label)
        if row["draft_density"] is not None:
            by_density.plot(row["draft_density"], row["accuracy"], "x", color=colors[pair], markersize=8)
    by_threshold.axhline(dense["accuracy"], color="black", linestyle="--", linewidth=1, label="dense")
    by_aal.axhline(dense["accuracy"], color="black", linestyle="--", linewidth=1)
    by_density.plot(1.0, dense["accuracy"], "*", color="black", markersize=11)
    by_density.axvline(1.0, color="black", linewidth=0.5)
    for axes, x, y, title in panels:
        axes.set(xlabel=names.get(x, x), ylabel=names.get(y, y))
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        if y == "accuracy":
            axes.set_ylim(-0.03, 1.03)
    by_threshold.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{results['model']}, {results['num_items']} items of {results['task']}", fontsize=12)
    figure.savefig(Path(path), dpi=110)
