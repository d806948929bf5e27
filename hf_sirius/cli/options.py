"""Makes what the options of the command line name: a config, a model, a prompt; checks places to write to."""

import dataclasses
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..decode.attach import KERNEL_SIZE
from ..draft.choice import CHOSEN
from ..settings.calibration import Calibration
from ..settings.config import SiriusConfig
from ..settings.methods import METHODS, owners_of
from ..study.named_models import model_path
from ..study.problems import tokenize


def twin_options(args) -> dict:
    """Returns what the options give to `make_sparse` beside the model: a config, or where none says what a draft is
    the fields that are given alone, as the rest is then chosen for the model.
    """
    config = sirius_config(args)  # a wrong value is told before anything is loaded
    given = _given_fields(args)
    if args.config or any(name in CHOSEN for name in given):
        return {"config": config}
    # Behind a seed the same text comes again, which "auto", by the clock, does not promise.
    is_seeded = getattr(args, "do_sample", False)
    return {"kernel_size": KERNEL_SIZE, **given} if is_seeded else given


def _given_fields(args) -> dict:
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(SiriusConfig)}
    return {name: value for name, value in fields.items() if value is not None}


def sirius_config(args):
    fields = _given_fields(args)
    if "calibration" in fields:
        fields["calibration"] = Calibration.from_pretrained(fields["calibration"])
    config = SiriusConfig.from_pretrained(args.config) if args.config else SiriusConfig()
    return config.with_method(fields.pop("method", config.method), **fields)


def choose_method(args) -> None:
    """Chooses the method where the options name none: the one whose own options are given, else one that saves time."""
    if args.method:
        return
    owners = [names for field in _given_fields(args) if (names := owners_of(field))]
    fitting = [name for name in METHODS if all(name in names for names in owners)]
    if not fitting:
        told = ", ".join(name for name in METHODS if any(name in names for names in owners))
        raise ValueError(f"options of several methods ({told}) were given: give those of one")
    if owners:
        args.method = fitting[0]
    elif not args.config:
        args.method = next(name for name, row in METHODS.items() if row.saves_time)


def load_tokenizer(args):
    """Returns the tokenizer of the model that the options name."""
    return AutoTokenizer.from_pretrained(model_path(args.model))


def load_model(args):
    """Returns the model that the options name."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = getattr(torch, args.dtype, None)
    if args.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype must be auto, float32, bfloat16, float16 or float64, got {args.dtype}")
    path = model_path(args.model)
    if args.quantization is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype).to(device)

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # each 8-bit product warns of a cast
    is_4bit = args.quantization == "4bit"
    settings = BitsAndBytesConfig(load_in_4bit=is_4bit, load_in_8bit=not is_4bit, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": settings, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, **options)


def check_device(device: str) -> None:
    """Raises `ValueError` if a device cannot be used."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used ({error}): name another one, such as cpu") from error


def read_prompt(args, tokenizer):
    """Returns what the tokenizer makes of the prompt that the options name."""
    return tokenize(sys.stdin.read() if args.prompt == "-" else args.prompt, tokenizer, args.chat)


def check_place(option: str, path: str | None, is_directory: bool = False) -> None:
    """Raises `ValueError` if no file, or no directory, can be written to a path that is given."""
    if not path:
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"the directory of {option} {path} does not exist: make it first")
    if is_directory and Path(path).is_file():
        raise ValueError(f"{option} {path} is a file: name a directory")
    if not is_directory and Path(path).is_dir():
        raise ValueError(f"{option} {path} is a directory: name a file in it")
