"""A trace as one HTML page that needs nothing else: no network, no further file."""

import base64
import hashlib
import itertools
import os
from html import escape
from pathlib import Path
from string import Template

from .. import __version__
from ..settings.config import SiriusConfig
from .tracing import FATES, Trace, TracedToken


_SETTINGS = ("method", "density", "kernel_size", "threshold", "temperature")


def write_report(trace: Trace, path: str | os.PathLike) -> None:
    """Writes a trace as an HTML page.

    Raises:
        `OSError` if the file cannot be written.
    """
    Path(path).write_text(report(trace), encoding="utf-8")


def report(trace: Trace) -> str:
    """Returns a trace as an HTML page: the measures of the call, its prompt and each of its tokens, coloured by what
    became of it, with the full model's likelihood of it at the pointer, the focus or a touch.
    """
    cycles = [list(tokens) for _, tokens in itertools.groupby(trace.tokens, lambda token: token.cycle)]
    fates = [fate for fate in FATES if fate != "branch" or trace.config["tree_width"] > 1]
    return _PAGE.substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(_STYLE)}'; script-src '{_hash(_SCRIPT)}'",
        version=__version__,
        style=_STYLE,
        script=_SCRIPT,
        model=escape(trace.model_name),
        measures="\n".join(_measures(trace)),
        settings="\n".join(_settings(trace)),
        prompt=escape(trace.prompt),
        answer=escape(trace.text),
        legend="\n".join(f"<li>{_marked(fate, FATES[fate])}</li>" for fate in fates),
        cycles="\n".join(map(_cycle, cycles)),
    )


def _hash(text: str) -> str:
    """Returns what a content security policy calls a style or script, so that the page runs no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _measures(trace: Trace):
    measures = trace.measures
    num_tokens = sum(token.is_output for token in trace.tokens)

    def shown(value, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        ("AAL", shown(measures["aal"], ".2f"), f"tokens a cycle, of {measures['kernel_size']}"),
        ("acceptance rate", shown(measures["acceptance_rate"], ".1%"), f"of {measures['num_drafted']} drafted tokens"),
        ("rolled back", str(measures["num_rolled_back"]), "drafted tokens"),
        ("draft density", shown(measures["draft_density"], ".3f"), "of all weights, a draft step"),
        ("effective density", shown(measures["effective_density"], ".3f"), "of all weights, a token"),
        ("output", str(num_tokens), f"tokens in {measures['num_cycles']} cycles"),
    ]
    if trace.config["tree_width"] > 1:
        rows.append(("gain by branches", shown(measures["aal_gain"], "+.1%"), "of advance length"))
    for name, value, unit in rows:
        yield f"<div><dt>{name}</dt><dd><strong>{value}</strong> {unit}</dd></div>"


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


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="hf_sirius $version">
<link rel="icon" href="data:,">
<title>$model with its sparse twin</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$model <small>with its sparse twin</small></h1>
<dl class="measures">
$measures
</dl>
<ul class="settings">
$settings
</ul>
<h2>Prompt</h2>
<div class="text" id="prompt">$prompt</div>
<h2>Output</h2>
<div class="text" id="output">$answer</div>
<h2>Token by token</h2>
<ul class="legend">
$legend
</ul>
<p class="hint">Point at a token, touch it, or go to it with Tab and the arrow keys for the full model's likelihood
of it.</p>
<ol class="cycles">
$cycles
</ol>
</main>
<div id="tip" role="tooltip" hidden><b></b> <span></span></div>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #fff; --line: #e3e0da; --text: #1f2328; --dim: #62676e;
  --kept: #d8f0de; --kept-text: #10421f; --own: #d6e4ff; --own-text: #0b3a8c;
  --lost: #fde4e1; --lost-text: #a3241b; --branch: #f1e6fb; --branch-text: #693399; --focus: #0b57d0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --line: #333942; --text: #e6e8eb; --dim: #a0a7b0;
    --kept: #173a24; --kept-text: #b5e8c4; --own: #1b3566; --own-text: #c3d8ff;
    --lost: #431d1b; --lost-text: #ffb4ab; --branch: #35234a; --branch-text: #dcc2f7; --focus: #8ab4f8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 16px 96px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 16px; }
h1 small { font-weight: 400; color: var(--dim); font-size: 1rem; }
h2 { font-size: 1.1rem; margin: 28px 0 8px; }
ul, ol, dl { margin: 0; padding: 0; list-style: none; }
.measures { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px; }
dt, dd { font-size: .85rem; color: var(--dim); margin: 0; }
dd strong { display: block; font-size: 1.4rem; line-height: 1.3; color: var(--text); }
.settings, .legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 12px; font-size: .9rem; }
.settings b { font-weight: 400; color: var(--dim); }
.measures div, .text { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.text { white-space: pre-wrap; }
.hint { color: var(--dim); font-size: .9rem; margin: 8px 0; }
.cycle { display: flex; gap: 4px 16px; padding: 8px 0; border-top: 1px solid var(--line); }
.head { flex: 0 0 8.5rem; font-size: .85rem; color: var(--dim); padding-top: 3px; }
.head b { color: var(--text); }
.head span { display: block; }
.lines { flex: 1; min-width: 0; }
.line { white-space: pre-wrap; line-height: 1.8; }
.lost { padding-left: 1.2em; font-size: .9rem; }
.lost::before { content: "↳ "; margin-left: -1.2em; color: var(--dim); }
.after { color: var(--dim); }
.kept, .own, .rolled_back, .branch { padding: 2px 0; border-radius: 3px; }
.legend .kept, .legend .own, .legend .rolled_back, .legend .branch { padding: 2px 6px; }
.token { box-shadow: inset -1px 0 var(--page); cursor: help; }
.kept { background: var(--kept); color: var(--kept-text); }
.own { background: var(--own); color: var(--own-text); font-weight: 600; margin-left: 2px; }
.rolled_back { background: var(--lost); color: var(--lost-text); }
.branch { background: var(--branch); color: var(--branch-text); text-decoration: underline dotted; font-style: italic; }
.token i { font: .8em ui-monospace, monospace; opacity: .85; }
.newline::before { content: "↵"; }
.token:hover, .token:focus { outline: 2px solid var(--focus); outline-offset: 1px; }
#tip {
  position: fixed; max-width: min(20rem, calc(100vw - 16px)); padding: 6px 10px; border-radius: 6px; font-size: .85rem;
  background: var(--text); color: var(--page); pointer-events: none; box-shadow: 0 2px 10px #0006;
}
#tip span { display: block; }
@media (max-width: 600px) {
  .cycle { flex-direction: column; }
  .head { flex: none; }
  .head span { display: inline; }
  .measures { grid-template-columns: 1fr 1fr; }
  .measures div:last-child:nth-child(odd) { grid-column: span 2; }
}
"""

_SCRIPT = """
const tip = document.getElementById("tip");
const tokens = [...document.querySelectorAll(".token")];
let shown = null;
function show(token) {
  shown = token;
  tip.hidden = !token;
  if (!token) return;
  tip.children[0].textContent = token.dataset.likelihood;
  tip.children[1].textContent = token.dataset.tip;
  const box = token.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
}
// One stop of the Tab key for all tokens; the arrow keys go on from there.
function choose(token) {
  for (const other of tokens) other.tabIndex = other === token ? 0 : -1;
}
for (const token of tokens) token.setAttribute("aria-describedby", "tip");
if (tokens.length) choose(tokens[0]);
const focused = () => document.activeElement.closest(".token");
document.addEventListener("pointerover", event => show(event.target.closest(".token") || focused()));
document.addEventListener("focusin", event => {
  const token = event.target.closest(".token");
  if (token) choose(token);
  show(token);
});
document.addEventListener("focusout", () => show(null));
document.addEventListener("scroll", () => shown && show(shown), {passive: true});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") show(null);
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  const next = step && focused() && tokens[tokens.indexOf(focused()) + step];
  if (next) {
    event.preventDefault();
    next.focus();
  }
});
"""
