"""Makes what the options of the command line name: a config, a model, a prompt."""

import logging

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..decode.attach import KERNEL_SIZE, repeatable
from ..draft.choice import CHOSEN
from ..settings.calibration import Calibration
from ..settings.config import SiriusConfig
from ..study.named_models import model_path
from ..study.problems import tokenize
from ..weights.formats import check_draft_dtype
from .options import given_fields


def twin_options(args) -> dict:
    """Returns what the options give to `make_sparse` beside the model: a config, or where none says what a draft is
    the fields that are given alone, as the rest is then chosen for the model.
    """
    config = sirius_config(args)  # a wrong value is told before anything is loaded
    given = given_fields(args)
    is_seeded = getattr(args, "do_sample", False)
    if args.config or any(name in CHOSEN for name in given):
        return {"config": repeatable(config) if is_seeded else config}
    return {"kernel_size": KERNEL_SIZE, **given} if is_seeded else given


def sirius_config(args) -> SiriusConfig:
    """Returns the config that the options name. Raises `ValueError` or `ImportError` also for a `draft_dtype` that the
    device cannot run.
    """
    fields = given_fields(args)
    if "calibration" in fields:
        fields["calibration"] = Calibration.from_pretrained(fields["calibration"])
    config = SiriusConfig.from_pretrained(args.config) if args.config else SiriusConfig()
    config = config.with_method(fields.pop("method", config.method), **fields)
    if config.draft_dtype is not None:
        check_draft_dtype(config.draft_dtype, torch.device(device_of(args)))
    return config


def load_tokenizer(args):
    """Returns the tokenizer of the model that the options name."""
    return AutoTokenizer.from_pretrained(model_path(args.model))


def load_model(args):
    """Returns the model that the options name."""
    device = device_of(args)
    path = model_path(args.model)
    if args.quantization is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype).to(device)

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # each 8-bit product warns of a cast
    is_4bit = args.quantization == "4bit"
    settings = BitsAndBytesConfig(load_in_4bit=is_4bit, load_in_8bit=not is_4bit, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": settings, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, **options)


def device_of(args) -> str:
    """Returns the device that the options name, by default that of the machine. Raises `ValueError` if it cannot be
    used.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used ({error}): name another one, such as cpu") from error
    return device


def read_prompt(args, tokenizer):
    """Returns what the tokenizer makes of the prompt. Raises `ValueError` where it has no chat template."""
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {args.model} has no chat template: leave --chat out")
    return tokenize(args.prompt, tokenizer, args.chat)
