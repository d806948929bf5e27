"""What a call's statistics say, in words: whether Sirius helped, and why not, by nothing but what was measured."""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


_CLEARLY = 0.98  # of the time of a dense step, from which time is said to be saved
_WIDTH = 80


def summarize(measures: Mapping[str, Any], seconds: Mapping[str, float | None]) -> tuple[str, list[tuple[str, str]]]:
    """Returns a sentence, and what it rests on, each with a name.

    Args:
        measures: `GenerationStats.as_dict()`.
        seconds: `GenerationStats.seconds()`, or nothing where they are not known.
    """
    num_cycles, num_dense = measures["num_cycles"], measures["num_dense_steps"]
    if not num_cycles:
        is_alone = measures["draft_density"] is not None
        head = "The twin wrote alone, uncorrected." if is_alone else "There was no cycle, and so no draft."
        return head, _rows(measures, seconds, None)
    if num_cycles == num_dense:
        head = f"Nothing was drafted: {_number(num_cycles, 'token')} by dense steps."
        return head, _rows(measures, seconds, None)
    advance = measures["num_accepted"] + num_cycles - num_dense
    spent = sum(seconds.get(name) or 0.0 for name in ("draft", "verification", "state", "selection"))
    per_token = spent / advance if spent else None
    dense = seconds.get("dense_step")
    if per_token is None or not dense:
        head = f"{_number(advance, 'token')} in {_number(num_cycles - num_dense, 'cycle')} with drafts."
        return f"{head} Whether that saved time was not measured.", _rows(measures, seconds, per_token)
    verdict = "Drafting saved time" if per_token < _CLEARLY * dense else "Drafting saved no time"
    told = f"{verdict}: {_ms(per_token)} a token, {per_token / dense:.2f} of the {_ms(dense)} that a dense step took."
    return told, _rows(measures, seconds, per_token)


def _rows(
    measures: Mapping[str, Any], seconds: Mapping[str, float | None], per_token: float | None
) -> list[tuple[str, str]]:
    num_dense, num_drafted = measures["num_dense_steps"], measures["num_drafted"]
    rows = []
    if num_drafted:
        kept = f"{measures['num_accepted']} of {num_drafted} drafted ones were kept ({measures['acceptance_rate']:.0%})"
        rows.append(("tokens", kept))
    if measures["num_lookups"]:
        rows.append(("looked up", f"the drafts of {_number(measures['num_lookups'], 'cycle')}, in the text before"))
    if (num_nodes := measures["num_nodes_drafted"]) != num_drafted:
        gain = "" if measures["aal_gain"] is None else f"; branches made advances {measures['aal_gain']:.0%} longer"
        rows.append(("trees", f"{num_nodes} tokens drafted, {measures['num_nodes_verified']} verified{gain}"))
    if num_reread := measures.get("num_reread"):
        took = f", in {_ms(seconds['state'])}" if seconds.get("state") else ""
        rows.append(("states", f"recurrent layers read {_number(num_reread, 'accepted token')} again{took}"))
    if num_dense:
        took = f", {_ms(seconds['dense_step'])} each (median)" if seconds.get("dense_step") else ""
        rows.append(("dense steps", f"{num_dense} of {_number(measures['num_cycles'], 'cycle')} drafted nothing{took}"))
    if measures["num_cycles"]:
        rows.append(("tokens a cycle", _advance(measures)))
    if measures["draft_density"] is not None and num_drafted:
        rows.append(("parameters", _parameters(measures)))
    if measures["is_masking"]:
        rows.append(("masking", "what drafts dropped was computed all the same, so that dropping it saved no time"))
    if per_token is not None:
        named = {"draft": "drafting", "verification": "verifying", "state": "states", "selection": "choosing neurons"}
        spent = {words: seconds.get(name) or 0.0 for name, words in named.items()}
        shares = {words: round(100 * value / sum(spent.values())) for words, value in spent.items()}
        told = ", ".join(f"{words} {share}%" for words, share in shares.items() if share)
        rows.append(("time", f"{_ms(per_token)} a token where it drafted: {told}"))
        if not seconds.get("dense_step"):
            steps = "too few dense steps (a call needs four, and a total keeps none)" if num_dense else "no dense step"
            is_auto = measures["kernel_size"] == "auto"  # which makes dense steps as far as it has to compare
            how = "hf-sirius bench measures it" if is_auto else "kernel_size='auto' and hf-sirius bench measure it"
            rows.append(("time saved", f"not measured: {steps} to compare with; {how}"))
    num_compiled = measures["num_compiled_steps"], measures["num_compiled_verifications"]
    if any(num_compiled) or measures["not_compiled"]:
        numbers = _number(measures["num_steps"], "draft step"), _number(measures["num_cycles"], "verification")
        ran = f"{num_compiled[0]} of {numbers[0]} and {num_compiled[1]} of {numbers[1]} ran as one graph"
        rows.append(("compiled", f"{ran}: {why}" if (why := measures["not_compiled"]) else ran))
    if measures["reason"]:
        rows.append(("at the end", measures["reason"]))
    return rows


def _advance(measures: Mapping[str, Any]) -> str:
    if measures["aal"] is None:
        return "no average (AAL), as the end of the output cut every draft short: longer outputs have whole ones"
    size = measures["kernel_size"]
    most = f" of {size}" if isinstance(size, int) and size else ""
    num_full = measures["num_cycles"] - measures["num_short_cycles"]
    short = f", {measures['num_short_cycles']} cut short left out" if measures["num_short_cycles"] else ""
    # More of them than were cut short, so that some are among the rest.
    included = ", dense steps included" if measures["num_dense_steps"] > measures["num_short_cycles"] else ""
    return f"{measures['aal']:.2f}{most} (AAL, over {_number(num_full, 'cycle')}{short}{included})"


def _parameters(measures: Mapping[str, Any]) -> str:
    step, effective = measures["draft_density"], measures["effective_density"]
    told = f"a draft step needs {step:.2f} of the model's"
    if effective is None:
        return told
    told += f", a token {effective:.2f} (effective density)"
    if effective < 1:
        return told
    rolled_back = _number(measures["num_rolled_back"], "token")
    return f"{told}: no less than the dense model needs, with {rolled_back} rolled back"


def _number(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def as_text(summary: tuple[str, Sequence[tuple[str, str]]]) -> str:
    """Returns a summary for a terminal."""
    head, rows = summary
    width = max((len(name) for name, _ in rows), default=0) + 4
    lines = [textwrap.fill(head, _WIDTH)]
    for name, told in rows:
        start = f"  {name}".ljust(width)
        lines.append(textwrap.fill(told, _WIDTH, initial_indent=start, subsequent_indent=" " * width))
    return "\n".join(lines)


def as_html(summary: tuple[str, Sequence[tuple[str, str]]]) -> str:
    """Returns a summary for a notebook."""
    head, rows = summary
    style = 'style="text-align: left; vertical-align: top; white-space: {}"'
    name_style, style = style.format("nowrap; padding-right: 1em"), style.format("normal")
    cells = "".join(
        f"<tr><th {name_style}>{escape(name)}</th><td {style}>{escape(told)}</td></tr>" for name, told in rows
    )
    return f"<p><strong>{escape(head)}</strong></p>" + (f"<table>{cells}</table>" if rows else "")
