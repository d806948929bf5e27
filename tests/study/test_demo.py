"""What the demo makes of tokens; tests/test_cli.py runs all of it."""

from rich.console import Console

from hf_sirius.study.demo import STYLES, color_tokens
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
