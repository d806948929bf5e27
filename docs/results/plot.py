"""Draws what `hf-sirius bench decode --json FILE` wrote: python plot.py FILE IMAGE."""

import json
import sys

from matplotlib.figure import Figure  # not pyplot, which wants a display


def ways_of(part):
    """Returns the ways of a context by name, each with milliseconds per token and the bound that memory sets."""
    ways = {"dense": part["dense"], "sirius": part["sirius"], **part["others"]}
    return {
        name: (1000 * way["decode_seconds_per_token"], 1000 * way["bound_seconds_per_token"])
        for name, way in ways.items()
    }


def draw(figures, path):
    """Draws a panel of bars for what was measured, and one for each shape that was predicted."""
    parts = figures.get("contexts") or {"": figures}
    measured = {length: ways_of(part) for length, part in parts.items()}
    predicted = figures.get("predicted", {"shapes": []})
    shapes = [shape for shape in predicted["shapes"] if "rows" in shape]
    image = Figure(figsize=(7 + 3 * len(shapes), 4.8), layout="constrained")
    first, *others = image.subplots(1, 1 + len(shapes), width_ratios=[7, *[3] * len(shapes)], squeeze=False)[0]

    names = list(dict.fromkeys(name for ways in measured.values() for name in ways))
    width, seen = 0.8 / len(names), set()
    for i, name in enumerate(names):
        places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(measured))]
        for place, ways in zip(places, measured.values(), strict=True):
            taken, bound = ways.get(name, (0.0, 0.0))  # where it was left out
            first.bar(place, taken, 0.9 * width, label=None if name in seen else name, color=f"C{i}")
            first.hlines(bound, place - width / 2, place + width / 2, "k")
            seen.add(name)
    labels = [f"{length} tokens before" if length else "prompts as they are" for length in measured]
    first.set_xticks(range(len(measured)), labels)
    model, machine = figures["model"], figures["machine"]
    dtype = model["dtype"].removeprefix("torch.")
    first.set_title(f"{model['name']}, {model['num_parameters'] / 1e6:.0f} M parameters in {dtype}", fontsize=11)
    first.set_ylabel("ms per token (line: what memory takes)")
    first.legend(fontsize=8, ncols=2)
    first.set_ylim(0, 1.35 * max(taken for ways in measured.values() for taken, _ in ways.values()))

    for axes, shape in zip(others, shapes, strict=True):
        rows = shape["rows"]
        for place, row in enumerate(rows):
            taken, bound = (1000 * row[name] for name in ("seconds_per_token", "bound_seconds_per_token"))
            axes.bar(place, taken, 0.7, hatch="//", color="lightgrey")
            axes.hlines(bound, place - 0.4, place + 0.4, "k")
            axes.text(place, max(taken, bound), f"{row['ratio']:.2f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(rows)), [row["way"].replace(", ", "\n") for row in rows], fontsize=8)
        told = f"acceptance of {predicted['acceptance_of']}; share of dense"
        axes.set_title(f"PREDICTED, shape of {shape['shape'].upper()}\n{told}", fontsize=9)
    processor = f"{machine['device']}, {machine['num_threads']} of {machine['num_cores']} cores"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    memory = f"memory {figures['bandwidth'] / 1e9:.1f} GB a second"
    image.suptitle(f"{processor}; {memory}\n{versions}; {machine['date']}", fontsize=9)
    image.savefig(path, dpi=110)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        draw(json.load(file), sys.argv[2])
