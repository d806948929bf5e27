"""A trace as one HTML page that needs nothing else: no network, no further file."""

import base64
import hashlib
import itertools
import os
import re
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from .. import __version__
from ..settings.config import SiriusConfig
from .tracing import FATES, Trace, TracedToken


_SETTINGS = ("method", "density", "kernel_size", "threshold", "temperature")


def write_report(trace: Trace, path: str | os.PathLike) -> None:
    """Writes a trace as an HTML page; raises `OSError` if the file cannot be written."""
    Path(path).write_text(report(trace), encoding="utf-8")


def report(trace: Trace) -> str:
    """Returns a trace as an HTML page: the measures of the call, its prompt and each of its tokens, coloured by what
    became of it, with the full model's likelihood of it at the pointer, the focus or a touch.
    """
    page = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    # The policy lets the page run nothing but this style and script.
    style, script = (_hash(text) for text in re.findall(r"<(?:style|script)>(.*?)</", page, flags=re.DOTALL))
    cycles = [list(tokens) for _, tokens in itertools.groupby(trace.tokens, lambda token: token.cycle)]
    fates = [fate for fate in FATES if fate != "branch" or trace.config["tree_width"] > 1]
    return Template(page).substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'",
        version=__version__,
        model=escape(trace.model_name),
        measures="\n".join(_measures(trace)),
        settings="\n".join(_settings(trace)),
        prompt=escape(trace.prompt),
        answer=escape(trace.text),
        legend="\n".join(f"<li>{_marked(fate, FATES[fate])}</li>" for fate in fates),
        cycles="\n".join(map(_cycle, cycles)),
    )


def _hash(text: str) -> str:
    """Returns the name of a style or script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _measures(trace: Trace):
    measures = trace.measures
    num_tokens = sum(token.is_output for token in trace.tokens)

    def shown(value, form: str) -> str:
        return "–" if value is None else format(value, form)

    size = f", of {measures['kernel_size']}" if isinstance(measures["kernel_size"], int) else ""
    rows = [
        ("AAL", shown(measures["aal"], ".2f"), "tokens a cycle" + size),
        ("acceptance rate", shown(measures["acceptance_rate"], ".1%"), f"of {measures['num_drafted']} drafted tokens"),
        ("rolled back", str(measures["num_rolled_back"]), "drafted tokens"),
        ("draft density", shown(measures["draft_density"], ".3f"), "of all weights, a draft step"),
        ("effective density", shown(measures["effective_density"], ".3f"), "of all weights, a token"),
        ("output", str(num_tokens), f"tokens in {measures['num_cycles']} cycles"),
    ]
    if trace.config["tree_width"] > 1:
        rows.append(("gain by branches", shown(measures["aal_gain"], "+.1%"), "of advance length"))
    if measures["reason"] is not None:
        rows.append(("at the end", "", measures["reason"]))
    for name, value, unit in rows:
        yield f"<div><dt>{name}</dt><dd><strong>{value}</strong> {escape(unit)}</dd></div>"


def _settings(trace: Trace):
    """Yields the settings that each call has, and others where they were chosen."""
    defaults = {**SiriusConfig().to_dict(), **dict.fromkeys(_SETTINGS)}
    for name, value in trace.config.items():
        if value != defaults[name]:
            yield f"<li><b>{escape(name)}</b> {escape(str(value))}</li>"


def _cycle(tokens: list[TracedToken]) -> str:
    number = tokens[0].cycle
    main = [token for token in tokens if token.fate != "branch"]
    if number:
        num_kept = sum(token.fate == "kept" for token in main)
        num_drafted = num_kept + sum(token.fate == "rolled_back" for token in main)
        head = f"<b>cycle {number}</b> <span>{num_kept} of {num_drafted} kept</span>"
    else:
        head = "<b>prefill</b> <span>first token</span>"
    lines = [f'<div class="line">{"".join(map(_token, main))}</div>']
    branches = (token for token in tokens if token.fate == "branch")
    for _, branch in itertools.groupby(branches, lambda token: token.branch):
        branch = list(branch)
        after = f'<span class="after">{escape(_end(branch[0].after))}</span>'
        lines.append(f'<div class="line lost">{after}{"".join(map(_token, branch))}</div>')
    return f'<li class="cycle"><div class="head">{head}</div><div class="lines">{"".join(lines)}</div></li>'


def _end(text: str, length: int = 16) -> str:
    text = text.replace("\n", "↵")
    return text if len(text) <= length else "…" + text[-length:]


def _token(token: TracedToken) -> str:
    likelihood = "the full model was not asked" if token.likelihood is None else _percent(token.likelihood)
    tip = f"{FATES[token.fate]}, token {token.position + 1}, id {token.token_id}"
    # What adds no text must be seen all the same.
    text = escape(token.text) or f"<i>{escape(token.name) or '·'}</i>"
    text = text.replace("\n", '<i class="newline"></i>\n')
    return _marked(token.fate, text, f' data-likelihood="{likelihood}" data-tip="{escape(tip)}"')


def _percent(likelihood: float) -> str:
    return f"likelihood {likelihood:.2%}" if likelihood >= 0.0001 or not likelihood else "likelihood below 0.01%"


def _marked(fate: str, content: str, attributes: str = "") -> str:
    tag = "del" if fate == "rolled_back" else "span"
    token = " token" if attributes else ""
    return f'<{tag} class="{fate}{token}"{attributes}>{content}</{tag}>'
