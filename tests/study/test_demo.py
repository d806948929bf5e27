"""What the demo makes of tokens and results; tests/cli/test_cli.py runs all of it."""

from rich.console import Console

from hf_sirius.settings.config import SiriusConfig
from hf_sirius.study.demo import STYLES, color_tokens, demo_modes, explain
from hf_sirius.study.tracing import TracedToken


TOKENS = [
    TracedToken(5, " 1", "", "own", 0.9, 0, 0),
    TracedToken(6, "8", "", "kept", 0.9, 1, 1),
    TracedToken(7, " +", "", "rolled_back", 0.0, 1, 2),
    TracedToken(8, " 2", "", "rolled_back", None, 1, 3),
    TracedToken(9, " -", "", "branch", None, 1, 2, branch=1),
    TracedToken(9, " *", "", "branch", None, 1, 2, branch=2),
    TracedToken(2, "", "</s>", "own", 1.0, 1, 2),
]


def test_each_fate_has_a_style_of_its_own_and_branches_are_apart():
    text = color_tokens(TOKENS, has_marks=False)
    assert text.plain == " 18 + 2<~ -~><~ *~></s>" and len(set(STYLES.values())) == 4
    spans = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert spans == {
        " 1": STYLES["own"], "8": STYLES["kept"], " + 2": STYLES["rolled_back"], "<~ -~>": STYLES["branch"],
        "<~ *~>": STYLES["branch"], "</s>": STYLES["own"],
    }  # fmt: skip
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[9;31m + 2\x1b[0m" in capture.get()  # struck out, and red


def test_without_colours_marks_tell_the_same():
    assert color_tokens(TOKENS, has_marks=True).plain == "{+ 1+}8[- + 2-]<~ -~><~ *~>{+</s>+}"


def results(*ms_per_token: float) -> dict:
    rows = [
        {"way": mode.name, "alone": not mode.corrected, "accuracy": 0.25 * i}
        for i, mode in enumerate(demo_modes(SiriusConfig())[:5])
    ]
    return {"rows": [{**row, "ms_per_token": ms} for row, ms in zip(rows, ms_per_token, strict=True)]}


def test_results_are_told_in_words_with_what_the_dense_model_takes():
    solved, took = explain(results(6.0, 5.0, 7.0, 5.5, 8.0), 12_100_000)
    assert solved == (
        "Alone, the sparse drafts solved 0.25 to 0.75 of the problems. Corrected they solved 0.50 to 1.00; the dense "
        "model by itself 0.00."
    )
    assert took.startswith(
        "A token took the dense model 6.0 ms, the drafts alone 5.0 to 5.5 ms, and with Sirius 7.0 to 8.0"
    )
    assert "no time was saved" in took and "all 12 MB of this model fit into a processor's cache" in took


def test_time_is_said_to_be_saved_where_it_was():
    _, took = explain(results(6.0, 5.0, 7.0, 5.0, 5.9), 1)
    assert "griffin 30% + Sirius saved time" in took and "the drafts alone 5.0 ms" in took
