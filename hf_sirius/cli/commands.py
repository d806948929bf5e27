"""Runs the commands of the command line. Imported when the first one runs, as it takes a while."""

import functools
import inspect
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

from ..decode.attach import make_sparse
from ..reasoner import reasoner_path, reasoner_problems
from ..study import benchmark, tuning
from ..study.demo import demo_modes, explain, show_one_answer
from ..study.drafts import compare_drafts
from ..study.evaluation import default_directory, describe_run, process_state, run_task, standard_modes
from ..study.machine import describe_machine
from ..study.named_models import own_prompts
from ..study.problems import read_prompts, tokenize
from ..study.report import write_report
from ..study.sweep import check_plots, plot_sweep, sweep_modes
from ..study.tasks import ProblemTask, TextTask, load_task
from ..study.tracing import trace
from ..study.widening import widen
from .loading import device_of, load_model, load_tokenizer, read_prompt, sirius_config, twin_options
from .options import choose_method
from .tables import bench_lines, make_console, show_drafts, show_results, show_tuning


def demo(args) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    model = AutoModelForCausalLM.from_pretrained(reasoner_path())
    problems = reasoner_problems()[: args.num_problems]
    task = ProblemTask("unseen problems of 6 to 10 steps", problems, tokenizer, max_new_tokens=200)
    name = f"The embedded reasoner, {model.num_parameters() / 1e6:.1f} M parameters"
    with make_sparse(model) as twin:
        modes = demo_modes(twin.sirius_config)
    with tempfile.TemporaryDirectory() as directory:
        results = run_task(model, task, modes, directory, name, show_progress=True)
    show_results(results, task.columns)
    console = make_console()
    console.print(
        "\nAAL: tokens gained per cycle, of 16. Density: parameters that a draft step needs, as a share of all; "
        "effective density: those that a token of the output needs, of which the dense model needs 1. The default is "
        "what make_sparse chooses on this machine without settings; its cycles are as long as pays."
    )
    for line in explain(results, model.get_memory_footprint()):
        console.print(f"\n{line}")
    console.print()
    show_one_answer(console, task, model)


def generate(args) -> None:
    options = twin_options(args)
    tokenizer = load_tokenizer(args)
    inputs = read_prompt(args, tokenizer)
    model = load_model(args)
    torch.manual_seed(args.seed)
    with make_sparse(model, **options) as twin:
        output = model.generate(
            **inputs.to(model.device),
            assistant_model=twin,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if args.stream else None,
        )
        if not args.stream:
            print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        if args.stats:
            print(twin.stats, file=sys.stderr)


def report(args) -> None:
    options = twin_options(args)
    tokenizer = load_tokenizer(args)
    inputs = read_prompt(args, tokenizer)
    model = load_model(args)
    torch.manual_seed(args.seed)
    with make_sparse(model, **options) as twin:
        traced = trace(twin, tokenizer, inputs, max_new_tokens=args.max_new_tokens, do_sample=args.do_sample)
    write_report(traced, args.output)
    if args.json:
        Path(args.json).write_text(json.dumps(traced.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(f"Written: {', '.join(filter(None, (args.output, args.json)))}")


def evaluate(args) -> None:
    modes = standard_modes(sirius_config(args))  # a wrong value is told before anything is loaded
    # Plain text is not corrected: its measures say what the full model would accept.
    _run_task(args, lambda task: modes[: 2 if isinstance(task, TextTask) else 3])


def sweep(args) -> None:
    choose_method(args)
    if args.no_plots and args.plot:
        raise ValueError("--plot names a file to draw to, but --no_plots was given too: leave one out")
    if not args.no_plots:
        check_plots(args.plot)
    grid = {"method": args.methods, "density": args.densities, "kernel_size": args.kernel_sizes}
    swept = sweep_modes(sirius_config(args), {**grid, "threshold": args.thresholds, "tree_width": args.tree_widths})

    def modes(task):
        if isinstance(task, TextTask):
            raise ValueError(f"a sweep wants problems with answers, and {task.name} is plain text: use hf-sirius eval")
        return swept

    results, directory, is_first = _run_task(args, modes)
    if is_first and not args.no_plots:
        path = args.plot or directory / "sweep.png"
        plot_sweep(results, path)
        print(f"Plots: {path}")


def _run_task(args, make_modes) -> tuple[dict, Path, bool]:
    """Runs the task that the options name, in the modes that `make_modes` gives for it; returns its results, their
    directory, and whether this is the first process.
    """
    state = process_state()
    if args.device is None and state.device.type != "cpu":
        args.device = str(state.device)
    if not state.is_main_process:
        transformers_logging.set_verbosity_error()
    options = {name: getattr(args, name) for name in ("few_shot", "num_items", "chat", "max_new_tokens", "window")}
    task = load_task(args.task, load_tokenizer(args), **options)
    model = load_model(args)
    modes = make_modes(task)
    for mode in modes:  # whatever a twin would refuse is refused now
        if mode.config is not None:
            make_sparse(model, mode.config).detach()
    name = args.model.rstrip("/")
    directory = Path(args.output_dir or default_directory(describe_run(model, name, task), modes))
    results = run_task(model, task, modes, directory, name, show_progress=True)
    if state.is_main_process:
        show_results(results, task.columns)
        print(f"Written: {directory / 'results.json'}, results.csv, and every record")
    return results, directory, state.is_main_process


def tune(args) -> None:
    choose_method(args)
    config = sirius_config(args)
    if args.model != "reasoner" and args.widen:
        raise ValueError(f"--widen is for --model reasoner alone, got {args.model}: leave it out")
    if args.quantization and args.widen:
        raise ValueError("--widen repeats weights that are not quantized: leave --quantization or --widen out")
    if args.prompts:
        texts = [(text, args.chat) for text in read_prompts(args.prompts, args.chat)]
    elif not (texts := own_prompts(args.model, args.chat)):
        raise ValueError(f"{args.model} needs --prompts, a file; only reasoner and smollm2 come with their own")
    names = ("methods", "densities", "kernel_sizes", "agreement", "thresholds")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.draft_dtypes:
        given["draft_dtypes"] = [None if name == "none" else name for name in args.draft_dtypes]
    tuning.candidate_grid(config, **given)  # a wrong value is told before anything is loaded
    given |= {name: getattr(args, name) for name in ("max_new_tokens", "num_measured", "num_repeats")}
    tokenizer = load_tokenizer(args)
    model = load_model(args)
    if args.widen:
        model = widen(model, *args.widen)
    prompts = [tokenize(text, tokenizer, chat) for text, chat in texts[: args.num_prompts]]
    tuned = tuning.tune(model, prompts, config, **given, show_progress=True)
    num_parameters = sum(p.numel() for p in model.parameters())
    machine = describe_machine(str(model.device))
    dtype = str(model.dtype).removeprefix("torch.")
    show_tuning(tuned, f"{args.model}, {num_parameters / 1e6:.0f} M parameters in {dtype}, on {machine['device']}")
    if args.output:
        tuned.config.save_pretrained(args.output)
        print(f"Written: {Path(args.output) / 'sirius_config.json'}")
    if args.json:
        figures = {"machine": machine, "num_parameters": num_parameters, "dtype": dtype, **tuned.as_dict()}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(args) -> None:
    device_of(args)
    options = {
        name: getattr(args, name) for name in ("model", "num_prompts", "max_new_tokens", "kernel_size", "device")
    }
    figures: dict = {}

    def record(so_far: dict) -> None:
        figures.update(so_far)
        if args.json:
            _write_json(so_far, args.json)

    try:
        record(compare_drafts(**options, dtype=getattr(torch, args.dtype), record=record))
    finally:
        if figures:  # whatever ends it
            show_drafts(figures)


def _write_json(figures: dict, path: str) -> None:
    """Writes a file in place of what was there, whole or not at all."""
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def bench(args) -> None:
    of_twin = twin_options(args)
    if "config" in of_twin:
        choose_method(args)
        of_twin = {"config": sirius_config(args)}
    device_of(args)
    function = {"decode": benchmark.bench_decode, "offload": benchmark.bench_offload}[args.benchmark]
    names = [name for name in inspect.signature(function).parameters if hasattr(args, name) and name != "config"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.json and args.benchmark == "decode":
        given["record"] = functools.partial(_write_json, path=args.json)
    figures = function(**of_twin, **{**given, "dtype": getattr(torch, args.dtype)})
    if args.json:
        _write_json(figures, args.json)
    else:
        print(json.dumps(figures, indent=2))
    # Where the figures are on standard output, the words are beside it.
    print("\n".join(bench_lines(figures)), file=sys.stdout if args.json else sys.stderr)
