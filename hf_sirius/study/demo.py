"""What `hf-sirius demo` runs and shows: a trained model loses its reasoning to sparsity, and gets it back."""

import itertools
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.attach import make_sparse
from ..decode.stats import GenerationStats
from ..settings.config import SiriusConfig
from .evaluation import Mode
from .tasks import ProblemTask
from .tracing import FATES, TokenTracer, TracedToken


STYLES = {"kept": "green", "own": "bold blue", "rolled_back": "red strike", "branch": "dim italic magenta"}
# Where there are no colours, after `wdiff`.
MARKS = {"kept": ("", ""), "own": ("{+", "+}"), "rolled_back": ("[-", "-]"), "branch": ("<~", "~>")}


def demo_modes(default: SiriusConfig) -> list[Mode]:
    """Returns the dense model, several drafts alone and corrected, and what `make_sparse` chose without settings,
    `default`, corrected.
    """
    modes = [Mode("dense")]
    for method, density in (("griffin", 0.5), ("griffin", 0.3), ("cats", 0.1)):
        config, name = SiriusConfig(method=method, density=density), f"{method} {density:.0%}"
        modes += [Mode(f"{name} alone", config, corrected=False), Mode(f"{name} + Sirius", config)]
    return [*modes, Mode("default + Sirius", default)]


def explain(results: dict[str, Any], num_bytes: int) -> list[str]:
    """Returns what the results of `demo_modes` show and why, in sentences, one string for each line of thought.

    Args:
        results: what `run_task` returned.
        num_bytes: of the model's weights.
    """
    dense, *others = results["rows"]
    alone = [row for row in others if row["alone"]]
    corrected = [row for row in others if not row["alone"]]
    fastest = min(corrected, key=lambda row: row["ms_per_token"])
    is_faster = fastest["ms_per_token"] < dense["ms_per_token"]
    saved = f"{fastest['way']} saved time" if is_faster else "no time was saved"
    return [
        f"Alone, the sparse drafts solved {_range(alone, 'accuracy', '.2f')} of the problems. Corrected they solved "
        f"{_range(corrected, 'accuracy', '.2f')}; the dense model by itself {dense['accuracy']:.2f}.",
        f"A token took the dense model {dense['ms_per_token']:.1f} ms, the drafts alone "
        f"{_range(alone, 'ms_per_token', '.1f')} ms, and with Sirius {_range(corrected, 'ms_per_token', '.1f')} ms: "
        f"here {saved}. Sparsity saves the reading of weights, and all {num_bytes / 1e6:.0f} MB of this model fit into "
        "a processor's cache, where reading costs next to nothing. Larger models do not fit: what decides there is the "
        "bytes that are read for each token. hf-sirius bench decode times this model, widened, on this machine.",
    ]


def _range(rows: list[dict[str, Any]], name: str, form: str) -> str:
    values = sorted(row[name] for row in rows)
    return " to ".join(dict.fromkeys(format(value, form) for value in (values[0], values[-1])))


def show_one_answer(console: Console, task: ProblemTask, model: PreTrainedModel) -> None:
    """Shows the first problem that a twin gets wrong alone and Sirius gets right, without and with trees."""
    with (
        make_sparse(model, method="griffin", density=0.3) as twin,
        make_sparse(model, twin.sirius_config, tree_width=3) as tree_twin,
    ):
        for idx in range(len(task)):
            alone = task.run(idx, model, twin, corrected=False)
            if not alone["is_correct"] and task.run(idx, model, twin)["is_correct"]:
                break
        else:
            console.print("Sparse alone solved every problem, so there is no correction to show: try more problems.")
            return
        console.print(Text("One of them, griffin 30%", "bold"))
        console.print(Text(task.problems[idx]["question"]))
        console.print(Text.assemble(("\nsparse alone: ", "bold"), alone["text"].strip()))
        _show_tokens(console, "with Sirius:", task.tokenizer, twin.stats)
        task.run(idx, model, tree_twin)
        _show_tokens(console, "with trees of 3 continuations:", task.tokenizer, tree_twin.stats)


def _show_tokens(console: Console, title: str, tokenizer: PreTrainedTokenizerBase, stats: GenerationStats) -> None:
    has_marks = console.color_system is None or console.no_color
    tokens = list(TokenTracer(tokenizer).tokens(stats))
    console.print(Text.assemble(("\n" + title, "bold")), color_tokens(tokens, has_marks))
    shown = [fate for fate in STYLES if any(token.fate == fate for token in tokens)]
    console.print(Text("\n(").append_text(Text(", ").join(_marked(FATES[f], f, has_marks) for f in shown)).append(")"))
    console.print(Text(str(stats), "dim"))


def color_tokens(tokens: Iterable[TracedToken], has_marks: bool) -> Text:
    """Returns tokens in the colours of what became of them; with `has_marks` signs tell it as well."""
    text = Text()
    for (_, _, fate), run in itertools.groupby(tokens, lambda token: (token.cycle, token.branch, token.fate)):
        text.append_text(_marked("".join(token.text or token.name for token in run), fate, has_marks))
    return text


def _marked(text: str, fate: str, has_marks: bool) -> Text:
    # Branches follow each other, so theirs are always set.
    start, end = MARKS[fate] if has_marks or fate == "branch" else ("", "")
    return Text(f"{start}{text}{end}", STYLES[fate])
