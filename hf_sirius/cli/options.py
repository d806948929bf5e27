"""What the options of the command line say, and what is wrong with it. No import here takes long, so that an error is
told at once.
"""

import copy
import dataclasses
import importlib.util
import sys
from pathlib import Path

from ..settings.fields import CONFIG_NAME, Fields, check_value
from ..settings.methods import METHODS, did_you_mean, owners_of
from ..study.named_models import OWN_NAMES


# Options with several values of a field.
_LISTS = {"methods": "method", "densities": "density", "kernel_sizes": "kernel_size", "thresholds": "threshold",
          "tree_widths": "tree_width"}  # fmt: skip
_CONFIGS = "give the directory of a saved SiriusConfig, or its id on the hub"
_MODELS = f"give the directory of a saved model, an id on the hub such as Qwen/Qwen3-8B, or {' or '.join(OWN_NAMES)}"


def check(args) -> None:
    """Checks all that can be checked before torch is imported, which takes seconds; reads the prompt, if it comes from
    standard input.

    Raises `ValueError`, or `ImportError` for a package that is missing.
    """
    given = vars(args)
    if "config" in given:
        _check_fields(args)
    for names, name in _LISTS.items():
        for value in given.get(names) or ():
            check_value(name, value)
    if "output_dir" in given and args.output_dir and Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir} is a file: name a directory")
    for name in ("output", "json", "plot"):
        _check_place(f"--{name}", given.get(name), is_directory=args.run == "tune" and name == "output")
    if given.get("quantization") and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--quantization {args.quantization} needs bitsandbytes: pip install hf_sirius[bnb], or leave it out"
        )
    if "prompt" in given:
        args.prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        try:
            args.prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("the prompt is not valid UTF-8: save or type it as UTF-8") from error
        if not args.prompt.strip():
            raise ValueError("the prompt is empty: give a text to continue (--prompt - reads standard input)")
    if given.get("config"):
        _check_source("--config", args.config, (CONFIG_NAME,), _CONFIGS)
    if "model" in given and args.model not in OWN_NAMES:
        files = ("config.json", "adapter_config.json")
        _check_source("--model", args.model, files, _MODELS, did_you_mean(args.model, OWN_NAMES))


def _check_fields(args) -> None:
    """Raises `ValueError` unless the fields that are given fit each other. Those of files are checked when read."""
    if args.config or args.calibration:
        return
    args = copy.copy(args)
    if args.run in ("sweep", "tune", "bench"):
        choose_method(args)
    fields = given_fields(args)
    Fields().with_method(fields.pop("method", Fields.method), **fields)


def _check_source(option: str, name: str, files: tuple[str, ...], allowed: str, hint: str = "") -> None:
    """Raises `ValueError`, in a line, unless a name is that of a directory with one of these files, or of a repository
    on the hub with the first of them, or in its cache with any.
    """
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in files):
            raise ValueError(f"{option} {name} is a directory without a {files[0]}: {allowed}")
        return
    if path.exists():
        raise ValueError(f"{option} {name} is a file: {allowed}")
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    told = f"{option} {name}: there is no such directory"
    try:
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            get_hf_file_metadata(hf_hub_url(name, files[0]))
    except errors.HFValidationError as error:
        raise ValueError(f"{told}: {allowed}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{option} {name} is gated: ask for access on its page on the hub, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{told}, and nothing of that name on the hub (or it is private: log in with `hf auth login`).{hint} "
            f"Otherwise {allowed}"
        ) from error
    except errors.EntryNotFoundError as error:
        if files[1:]:  # such as of an adapter, of which transformers knows more
            return
        raise ValueError(f"{option} {name} has no {files[0]} on the hub: {allowed}") from error
    except Exception as error:  # those of the client's HTTP library differ by version
        raise ValueError(
            f"{told}, nothing of that name in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}).{hint} Connect to it, or {allowed}"
        ) from error


def given_fields(args) -> dict:
    """Returns the fields of the config that the options give."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Fields)}
    return {name: value for name, value in fields.items() if value is not None}


def choose_method(args) -> None:
    """Chooses the method where the options name none: the one whose own options are given, else one that saves time."""
    if args.method:
        return
    owners = [names for field in given_fields(args) if (names := owners_of(field))]
    fitting = [name for name in METHODS if all(name in names for names in owners)]
    if not fitting:
        told = ", ".join(name for name in METHODS if any(name in names for names in owners))
        raise ValueError(f"options of several methods ({told}) were given: give those of one")
    if owners:
        args.method = fitting[0]
    elif not args.config:
        args.method = next(name for name, row in METHODS.items() if row.saves_time)


def _check_place(option: str, path: str | None, is_directory: bool = False) -> None:
    """Raises `ValueError` if no file, or no directory, can be written to a path that is given."""
    if not path:
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"the directory of {option} {path} does not exist: make it first")
    if is_directory and Path(path).is_file():
        raise ValueError(f"{option} {path} is a file: name a directory")
    if not is_directory and Path(path).is_dir():
        raise ValueError(f"{option} {path} is a directory: name a file in it")
