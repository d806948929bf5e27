"""`hf-sirius demo`: a trained model loses its reasoning to contextual sparsity, and gets it back."""

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .assistant import make_sparse
from .evaluation import Evaluation, evaluate, final_answer, generator, problem_prompt
from .reasoner import reasoner_path, reasoner_problems
from .stats import Cycle, GenerationStats


KEPT, OWN, ROLLED_BACK = "green", "bold blue", "red strike"
SETTINGS = (("griffin", 0.5), ("griffin", 0.3), ("cats", 0.1))


def run_demo(console: Console, num_problems: int) -> None:
    """Evaluates the embedded reasoner and shows one of its answers, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    model = AutoModelForCausalLM.from_pretrained(reasoner_path()).eval()
    problems = reasoner_problems()[:num_problems]
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

        def measure(label: str, generate) -> Evaluation:
            task = progress.add_task(label, total=len(problems))
            result = evaluate(generate, tokenizer, progress.track(problems, task_id=task), max_new_tokens=200)
            progress.remove_task(task)
            return result

        table.add_row(*_row("dense", measure("dense", generator(model)), None))
        for method, density in SETTINGS:
            with make_sparse(model, method=method, density=density) as twin:
                name = f"{method} {density:.0%}"
                alone = measure(f"{name}, sparse alone", generator(model, twin, alone=True))
                table.add_row(*_row(f"{name}, sparse alone", alone, twin.stats.total, style="red"))
                twin.stats.reset()
                table.add_row(
                    *_row(
                        f"{name} + Sirius",
                        measure(f"{name} + Sirius", generator(model, twin)),
                        twin.stats.total,
                        "green",
                    )
                )
    console.print(table)
    console.print()
    with make_sparse(model, method="griffin", density=0.3) as twin:
        _show_one_answer(console, tokenizer, model, twin, problems)


def _row(label: str, result: Evaluation, stats: GenerationStats | None, style: str = "") -> list[Text | str]:
    measures = (stats.aal, stats.draft_density, stats.effective_density) if stats else (None, None, None)
    shown = ["" if measure is None else f"{measure:.2f}" for measure in measures]
    return [label, Text(f"{result.accuracy:.1%}", style), *shown, f"{result.ms_per_token:.1f}"]


def _show_one_answer(console, tokenizer, model, twin, problems) -> None:
    """Shows the first problem that the sparse twin gets wrong by itself and Sirius gets right."""
    for problem in problems:
        inputs = tokenizer(problem_prompt(problem["question"]), return_tensors="pt")
        prompt_length = inputs["input_ids"].shape[1]
        alone = _decode(tokenizer, twin.generate(**inputs, max_new_tokens=200, do_sample=False)[0, prompt_length:])
        if final_answer(alone) == final_answer(problem["answer"]):
            continue
        output_ids = model.generate(**inputs, max_new_tokens=200, do_sample=False, assistant_model=twin)[
            0, prompt_length:
        ]
        if final_answer(_decode(tokenizer, output_ids)) == final_answer(problem["answer"]):
            break
    else:
        console.print("Sparse alone solved every problem, so there is no correction to show: try more problems.")
        return
    console.print(Text("One of them, griffin 30%", "bold"))
    console.print(Text(problem["question"]))
    console.print(Text.assemble(("\nsparse alone: ", "bold"), alone.strip()))
    console.print(
        Text.assemble(("\nwith Sirius: ", "bold")), color_cycles(tokenizer, output_ids[0].item(), twin.stats.cycles)
    )
    legend = (("drafted and kept", KEPT), ", ", ("rolled back", ROLLED_BACK), ", ", ("the full model's own", OWN))
    console.print(Text.assemble("\n(", *legend, ")"))
    console.print(Text(str(twin.stats), "dim"))


def _decode(tokenizer: PreTrainedTokenizerBase, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def color_cycles(tokenizer: PreTrainedTokenizerBase, first_id: int, cycles: list[Cycle]) -> Text:
    """Returns the tokens of a call, coloured by what became of them.

    Args:
        first_id: the token that the full model picked after the prefill.
        cycles: the cycles that followed.
    """
    text = Text()

    def append(ids, style: str) -> None:
        text.append(_decode(tokenizer, list(ids)), style)

    append([first_id], OWN)
    for cycle in cycles:
        append(cycle.drafted_ids[: cycle.num_accepted], KEPT)
        append(cycle.drafted_ids[cycle.num_accepted :], ROLLED_BACK)
        append([cycle.bonus_id], OWN)
    return text
