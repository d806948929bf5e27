"""`hf-sirius demo`: a trained model loses its reasoning to contextual sparsity, and gets it back."""

import itertools
from collections.abc import Iterable

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..decode.attach import make_sparse
from ..decode.sparse_twin import SparseTwin
from ..decode.stats import GenerationStats
from ..reasoner import reasoner_path, reasoner_problems
from .problems import final_answer, problem_prompt
from .tasks import ProblemTask
from .timing import generator
from .tracing import FATES, TracedToken, tokens_of_call


STYLES = {"kept": "green", "own": "bold blue", "rolled_back": "red strike", "branch": "dim italic magenta"}
# Where there are no colours, after `wdiff`.
MARKS = {"kept": ("", ""), "own": ("{+", "+}"), "rolled_back": ("[-", "-]"), "branch": ("<~", "~>")}
SETTINGS = (("griffin", 0.5), ("griffin", 0.3), ("cats", 0.1))


def run_demo(console: Console, num_problems: int) -> None:
    """Evaluates the embedded reasoner and shows one of its answers, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    model = AutoModelForCausalLM.from_pretrained(reasoner_path()).eval()
    problems = reasoner_problems()[:num_problems]
    task = ProblemTask("reasoner", problems, tokenizer, max_new_tokens=200)
    num_parameters = f"{model.num_parameters() / 1e6:.1f} M parameters"
    console.print(
        f"The embedded reasoner ({num_parameters}) on {len(problems)} unseen problems of 6 to 10 steps, greedy, one "
        "at a time.\n"
    )
    table = Table(
        "", "accuracy", "AAL of 16", "draft density", "effective density", "ms per token", box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        def add_row(label: str, style: str = "", twin: SparseTwin | None = None, corrected: bool = True) -> None:
            bar = progress.add_task(label, total=len(task))
            records = [task.run(i, model, twin, corrected) for i in progress.track(range(len(task)), task_id=bar)]
            progress.remove_task(bar)
            measures = task.measures(records)
            shown = (measures[name] for name in ("aal", "draft_density", "effective_density"))
            table.add_row(
                label,
                Text(f"{measures['accuracy']:.1%}", style),
                *("" if measure is None else f"{measure:.2f}" for measure in shown),
                f"{measures['ms_per_token']:.1f}",
            )

        add_row("dense")
        for method, density in SETTINGS:
            with make_sparse(model, method=method, density=density) as twin:
                add_row(f"{method} {density:.0%}, sparse alone", "red", twin, corrected=False)
                add_row(f"{method} {density:.0%} + Sirius", "green", twin)
    console.print(table)
    console.print()
    _show_one_answer(console, tokenizer, model, problems)


def _show_one_answer(console: Console, tokenizer, model, problems) -> None:
    """Shows the first problem that a twin gets wrong by itself and Sirius gets right, without and with trees."""
    with (
        make_sparse(model, method="griffin", density=0.3) as twin,
        make_sparse(model, twin.sirius_config, tree_width=3) as tree_twin,
    ):
        for problem in problems:
            alone = _answer(tokenizer, generator(model, twin, corrected=False), problem)
            if _is_right(alone, problem):
                continue
            if _is_right(_answer(tokenizer, generator(model, twin), problem), problem):
                break
        else:
            console.print("Sparse alone solved every problem, so there is no correction to show: try more problems.")
            return
        console.print(Text("One of them, griffin 30%", "bold"))
        console.print(Text(problem["question"]))
        console.print(Text.assemble(("\nsparse alone: ", "bold"), alone.strip()))
        _show_tokens(console, "with Sirius:", tokenizer, twin.stats)
        _answer(tokenizer, generator(model, tree_twin), problem)
        _show_tokens(console, "with trees of 3 continuations:", tokenizer, tree_twin.stats)


def _answer(tokenizer: PreTrainedTokenizerBase, generate, problem: dict) -> str:
    inputs = tokenizer(problem_prompt(problem["question"]), return_tensors="pt")
    output_ids = generate(**inputs, max_new_tokens=200, do_sample=False)
    return tokenizer.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _is_right(answer: str, problem: dict) -> bool:
    return final_answer(answer) == final_answer(problem["answer"])


def _show_tokens(console: Console, title: str, tokenizer: PreTrainedTokenizerBase, stats: GenerationStats) -> None:
    has_marks = console.color_system is None or console.no_color
    tokens = list(tokens_of_call(stats, tokenizer))
    console.print(Text.assemble(("\n" + title, "bold")), color_tokens(tokens, has_marks))
    shown = [fate for fate in STYLES if any(token.fate == fate for token in tokens)]
    console.print(Text("\n(").append_text(Text(", ").join(_marked(FATES[f], f, has_marks) for f in shown)).append(")"))
    console.print(Text(str(stats), "dim"))


def color_tokens(tokens: Iterable[TracedToken], has_marks: bool) -> Text:
    """Returns tokens in the colours of what became of them.

    Args:
        tokens: of [`tokens_of_call`].
        has_marks: whether signs tell it as well, for where there are no colours.
    """
    text = Text()
    for (_, _, fate), run in itertools.groupby(tokens, lambda token: (token.cycle, token.branch, token.fate)):
        text.append_text(_marked("".join(token.text or token.name for token in run), fate, has_marks))
    return text


def _marked(text: str, fate: str, has_marks: bool) -> Text:
    # Branches follow each other, so theirs are always set.
    start, end = MARKS[fate] if has_marks or fate == "branch" else ("", "")
    return Text(f"{start}{text}{end}", STYLES[fate])
