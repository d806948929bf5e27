"""The parser's errors: a line that names what was meant."""

import pytest

from hf_sirius.cli.arguments import make_parser
from hf_sirius.cli.parser import Parser


GENERATE = ["generate", "--model", "reasoner", "--prompt", "a"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["generat"], "hf-sirius: error: there is no command 'generat'. Did you mean 'generate'? Choose from demo, "),
        (["bench", "decod"], "hf-sirius bench: error: there is no command 'decod'. Did you mean 'decode'? Choose from"),
        (["--vers"], "hf-sirius: error: there is no option --vers. Did you mean '--version'?"),
        ([*GENERATE, "--methd", "griffin"], "generate: error: there is no option --methd. Did you mean '--method'?"),
        ([*GENERATE, "--methd=griffin"], "there is no option --methd. Did you mean '--method'?"),
        ([*GENERATE, "-method", "griffin"], "there is no option -method. Did you mean '--method'?"),
        ([*GENERATE, "--temp", "0.5"], "there is no option --temp. Did you mean '--temperature'?"),
        ([*GENERATE, "--kernel-siz", "5"], "there is no option --kernel-siz. Did you mean '--kernel_size'?"),
        (["generate", "--model", "reasoner", "--promt", "a"], "there is no option --promt. Did you mean '--prompt'?"),
        (["bench", "decode", "--with_rival"], "bench decode: error: there is no option --with_rival. Did you mean"),
        ([*GENERATE, "--xyzzy", "1"], "hf-sirius generate: error: there is no option --xyzzy\n"),
        ([*GENERATE, "--dtype", "float23"], "cannot be 'float23'. Did you mean 'float32'? Choose from auto, float32"),
        ([*GENERATE, "--quantization", "9bit"], "cannot be '9bit'. Did you mean '8bit'? Choose from 8bit, 4bit"),
        (["generate", "--model", "reasoner"], "the following arguments are required: --prompt"),
    ],
)  # fmt: skip
def test_what_was_meant_is_told(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error
    assert len(error.splitlines()) == 2 and error.endswith(" --help tells what it takes.\n")


def test_abbreviations_are_no_options(capsys):
    for part in ("--thresh", "--num"):
        with pytest.raises(SystemExit):
            make_parser().parse_args([*GENERATE, part, "1"])
        assert f"there is no option {part}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-", "-5", "- a list", "-.5 of it", "a --methd b", "--methd b"])
def test_a_text_is_no_option(text):
    assert make_parser().parse_args([*GENERATE[:3], "--prompt", text]).prompt == text


def test_what_follows_two_hyphens_is_no_option():
    parser = Parser(prog="p")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--methd"]).words == ["--methd"]
