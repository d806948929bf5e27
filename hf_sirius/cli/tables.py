"""What the command line shows: tables of results, and benchmarks in a line each."""

import sys

from rich.console import Console
from rich.table import Table

from ..study.tuning_result import draft_name


_NUM_SHOWN = 20  # candidates of hf-sirius tune, at most
_WHOLE = 10_000  # columns, into which any table fits


def make_console() -> Console:
    """Returns what the command line prints to: in a terminal as wide as that, elsewhere nothing is cut or wrapped."""
    width = None if sys.stdout.isatty() else _WHOLE
    return Console(markup=False, emoji=False, highlight=False, width=width)  # names and reasons may hold brackets


def show_results(results: dict, columns: tuple[str, ...]) -> None:
    heads = {"aal": "AAL", "acceptance_rate": "accepted", "num_rolled_back": "rolled\nback", "draft_density": "density",
             "effective_density": "effective\ndensity", "nodes_per_cycle": "nodes per\ncycle",
             "ms_per_token": "ms per\ntoken"}  # fmt: skip
    if not any((row["config"] or {}).get("tree_width", 1) > 1 for row in results["rows"]):
        del heads["nodes_per_cycle"]  # without a tree it says nothing
    digits = {"num_rolled_back": 0, "ms_per_token": 1, "nodes_per_cycle": 1, "aal": 2}
    names = [name for name in (*columns, *heads) if any(row.get(name) is not None for row in results["rows"])]
    table = Table("", box=None, pad_edge=False, padding=(0, 1, 0, 0))  # in 80 columns
    for name in names:
        table.add_column(heads.get(name, name), justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(row["way"], *(_shown(row.get(name), digits.get(name, 3)) for name in names))
    console = make_console()
    dtype = results["dtype"].removeprefix("torch.")
    told = f"{results['model']} ({dtype}), {results['num_items']} items of {results['task']}"
    drafts = [row["config"] for row in results["rows"] if row["config"]]
    if drafts and all(draft == drafts[0] for draft in drafts):  # not of a sweep, whose rows name them
        names = ("method", "density", "draft_dtype", "kernel_size", "threshold")
        told += "; drafts: " + ", ".join(f"{name} {drafts[0][name]}" for name in names if drafts[0].get(name))
    console.print(f"{told}:\n")
    console.print(table)


def _shown(value: float | None, digits: int) -> str:
    # There may be none, such as the AAL of outputs that end within their first draft.
    return "" if value is None else f"{value:.{digits}f}"


def show_tuning(tuning, title: str) -> None:
    def table(caption: str, *heads: str) -> Table:
        made = Table(title=caption, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, head in enumerate(heads):
            made.add_column(head, justify="right" if i else "left", no_wrap=True)
        return made

    console = make_console()
    console.print(title)
    costs = tuning.costs
    sizes = sorted({candidate.config.kernel_size for candidate in tuning.candidates})
    parts = {"a dense step": costs.dense_step}
    parts |= {f"a draft step, {draft_name(*key)}": seconds for key, seconds in costs.draft_steps.items()}
    parts |= {f"a verification of {n} tokens": costs.verification(n) for n in sizes}
    parts |= {f"choosing neurons, {draft_name(*key)}": seconds for key, seconds in costs.selections.items()}
    shown = table("\nCosts (medians)", "", "ms", "dense steps")
    for name, seconds in parts.items():
        shown.add_row(name, f"{1000 * seconds:.2f}", f"{seconds / costs.dense_step:.2f}")
    console.print(shown)

    depths = sorted({1, *(n - 1 for n in sizes)})
    shown = table("\nDrafts accepted as far as token", "", *map(str, depths))
    for (*draft, threshold), shares in tuning.survivals.items():
        # Behind a token that no draft got past, none is accepted; else nothing is known.
        rest = "0.00" if shares and shares[-1] == 0 else ""
        known = [f"{shares[depth - 1]:.2f}" if depth <= len(shares) else rest for depth in depths]
        shown.add_row(f"{draft_name(*draft)}, threshold {threshold}", *known)
    console.print(shown)

    lossless = all(candidate.config.threshold == 1.0 for candidate in tuning.candidates)
    heads = ("draft", "kernel\nsize", *(() if lossless else ("thres-\nhold", "agree-\nment")), "tokens\na cycle")
    heads += ("predicted\ndecode", "\nwhole", "measured\ndecode", "\nwhole")
    shown = table("\nTime per token, Sirius / dense", *heads)
    shown.padding = (0, 1, 0, 0)  # in 80 columns
    for candidate in tuning.candidates[:_NUM_SHOWN]:
        config, measured = candidate.config, candidate.measured
        ratios = [candidate.predicted_decode, candidate.predicted_whole]
        if measured is not None:
            ratios += [measured.ratio_decode, measured.ratio_whole]
        row = [draft_name(config.method, config.density, config.draft_dtype), str(config.kernel_size)]
        row += [] if lossless else [str(config.threshold), f"{candidate.agreement:.3f}"]
        shown.add_row(*row, f"{candidate.advance_length:.2f}", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(shown)
    console.print("decode: behind the first token, choosing neurons included; whole: with the prefill")
    if len(tuning.candidates) > _NUM_SHOWN:
        console.print(f"and {len(tuning.candidates) - _NUM_SHOWN} more, which --json writes as well")
    for name, reason in tuning.left_out.items():
        console.print(f"Left out: {name}: {reason}")
    console.print(f"\n{tuning.verdict}")


def show_drafts(figures: dict) -> None:
    heads = ("draft", "draft_dtype", "agreement", "AAL", "bytes", "time")
    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i > 1 else "left", no_wrap=True)
    for row in figures["rows"]:
        name = draft_name(row.get("method", ""), row["density"], None)
        told = {"weighting": ", by column", "reselect_every": ", refreshed", "draft_head": ", shortlist"}
        name += "".join(words for field, words in told.items() if field in row)
        digits = {"agreement": 3, "aal": 2, "bytes": 2, "ratio": 3}
        table.add_row(name, row.get("draft_dtype"), *(_shown(row[key], n) for key, n in digits.items()))
    console = make_console()
    for row in figures["left_out"]:
        console.print(
            f"Left out: {draft_name(row.get('method', ''), row['density'], row['draft_dtype'])}: {row['reason']}"
        )
    console.print(
        f"{figures['model']} ({figures['dtype'].removeprefix('torch.')}), kernel_size {figures['kernel_size']}, "
        f"threshold 1.0, {figures['num_prompts']} prompts; bytes of a draft step / of the model in bfloat16, time of "
        "Sirius / dense"
    )
    console.print(table)


def bench_lines(figures: dict) -> list[str]:
    if "lengths" not in figures:
        return _decode_lines(figures)
    total = figures["model"]["num_bytes"]
    lines = []
    for length, run in figures["lengths"].items():
        peaks = [run[name]["peak_memory_growth"] for name in ("sirius", "dense")]
        shares = "unknown" if None in peaks else f"{peaks[0] / total:.0%} of the weights (dense {peaks[1] / total:.0%})"
        streamed = [run[name]["bytes_streamed_per_token"] / 2**20 for name in ("sirius", "dense")]
        lines.append(
            f"{length} tokens: {_ratios(run)}; peak memory {shares}; streamed per token {streamed[0]:.0f} MiB "
            f"(dense {streamed[1]:.0f} MiB)"
        )
    return lines


def _decode_lines(figures: dict) -> list[str]:
    lines = []
    for context, part in figures.get("contexts", {None: figures}).items():
        lines.append(_ratios(part) if context is None else f"{context} tokens before: {_ratios(part)}")
        same = {"ratio_decode": 1.0, "ratio_whole": 1.0, "num_identical": part["num_problems"]}
        beside = {name: part[name] for name in ("ratio_decode", "ratio_whole", "num_identical")}
        ways = {"dense": {**part["dense"], **same}, "sirius": {**part["sirius"], **beside}, **part["others"]}
        for name, run in ways.items():
            told = _costs(run, run["decode_seconds_per_token"], run["ratio_decode"])
            told += f"; whole generation {run['ratio_whole']:.3f} of dense; "
            lines.append(f"{name}: {told}{run['num_identical']} of {part['num_problems']} answers identical")
    lines += [f"Left out: {name}: {reason}" for name, reason in figures["left_out"].items()]
    lines.append(f"Memory gives {figures['bandwidth'] / 1e9:.1f} GB a second")
    if overhead := figures.get("overhead"):
        told = f"{1000 * overhead['draft_step']:.2f} ms, a bare forward {1000 * overhead['bare_forward']:.2f} ms"
        lines.append(f"A draft step of the model's own weights takes {told}: overhead {overhead['overhead']:+.1%}")
    predicted = figures.get("predicted", {"shapes": []})
    for shape in predicted["shapes"]:
        name = f"Predicted, a model of the shape of {shape['shape'].upper()}"
        if "reason" in shape:
            lines.append(f"{name}: left out: {shape['reason']}")
        for row in shape.get("rows", ()):
            told = _costs(row, row["seconds_per_token"], row["ratio"])
            lines.append(f"{name} with the acceptance of {predicted['acceptance_of']}, {row['way']}: {told}")
    return lines


def _costs(run: dict, seconds: float, ratio: float) -> str:
    told = f"{1000 * seconds:.2f} ms a token ({ratio:.3f} of dense), of which memory takes "
    told += f"{1000 * run['bound_seconds_per_token']:.2f} for {run['bytes_per_token'] / 1e6:.0f} MB"
    if None not in (run["acceptance_rate"], run["aal"]):
        told += f"; {run['acceptance_rate']:.0%} of drafted tokens kept, {run['aal']:.2f} tokens a forward"
    return told


def _ratios(figures: dict) -> str:
    return (
        f"{figures['num_identical']} of {figures['num_problems']} answers identical, agreement "
        f"{figures['agreement']:.3f}; time of Sirius / dense: "
        f"decode {figures['ratio_decode']:.3f} ({figures['ratio_steps']:.3f} without choosing the neurons), "
        f"whole generation {figures['ratio_whole']:.3f}"
    )
