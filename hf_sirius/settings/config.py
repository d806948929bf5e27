"""`SiriusConfig`: the fields of a user's settings, saved and loaded. It knows no model and changes none."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import PushToHubMixin, cached_file
from transformers.utils.hub import hf_api

from . import fields
from .calibration import CALIBRATION_NAME, Calibration
from .fields import CONFIG_NAME, Fields, check_field_names


# For `typing.get_type_hints`, as that file imports neither.
fields.Calibration, fields.torch = Calibration, torch

_DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "subfolder", "token",
    "user_agent",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SiriusConfig(Fields, PushToHubMixin):
    __doc__ = Fields.__doc__

    @classmethod
    def from_dict(cls, values: dict[str, Any], calibration: Calibration | None = None) -> "SiriusConfig":
        """Builds a config from `to_dict`'s result. Raises `ValueError` for a name that is not a field."""
        if not isinstance(values, dict):
            raise ValueError(f"a config is a mapping of fields, got {values!r}")
        values = {name: value for name, value in values.items() if name != "hf_sirius_version"}
        if "calibration" in values:
            raise ValueError("a calibration is no plain value: pass it as calibration=..., or save it with the config")
        check_field_names(values)
        return cls(**values, calibration=calibration)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `sirius_config.json` (and the thresholds, if calibrated) to a directory, created if need be.

        With `push_to_hub=True` the files go to the hub as well; `kwargs` are `repo_id`, `commit_message`, and what
        `huggingface_hub.create_repo` takes (`private`, `token`, ...).
        """
        from .. import __version__

        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory must be a directory, but {str(directory)!r} is a file")
        directory.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            commit_message = kwargs.pop("commit_message", None)
            repo_id = kwargs.pop("repo_id", directory.name)
            repo_id = hf_api().create_repo(repo_id, exist_ok=True, **kwargs).repo_id
            timestamps = self._get_files_timestamps(directory)
        stored = {"hf_sirius_version": __version__, **self.to_dict()}
        if self.calibration is None:
            (directory / CALIBRATION_NAME).unlink(missing_ok=True)  # of an earlier save
        else:
            self.calibration.save_pretrained(directory)
            stored["calibration"] = CALIBRATION_NAME
        (directory / CONFIG_NAME).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self._upload_modified_files(
                directory, repo_id, timestamps, commit_message=commit_message, token=kwargs.get("token")
            )

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | os.PathLike, **kwargs) -> "SiriusConfig":
        """Loads a config (and its thresholds, if saved with it) from a directory or a hub repository.

        Args:
            pretrained_name_or_path: a directory that `save_pretrained` wrote, or a repository id on the hub.
            kwargs: config fields override what was saved; everything else (`revision`, `token`, `cache_dir`,
                `local_files_only`, ...) is handed to the download.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not a valid config.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        unknown = sorted(set(kwargs) - set(_DOWNLOAD_OPTIONS))
        if unknown:
            raise ValueError(
                f"unknown keyword {', '.join(map(repr, unknown))}: neither a field {sorted(names)} nor an option of "
                f"the download {list(_DOWNLOAD_OPTIONS)}"
            )
        file = cached_file(pretrained_name_or_path, CONFIG_NAME, **kwargs)
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON ({error}): write it anew with save_pretrained") from error
        calibration = None
        if isinstance(values, dict) and values.get("calibration") == CALIBRATION_NAME:
            del values["calibration"]
            calibration = Calibration.from_file(cached_file(pretrained_name_or_path, CALIBRATION_NAME, **kwargs))
        try:
            config = cls.from_dict(values, calibration=calibration)
        except TypeError as error:
            raise ValueError(f"{file} is not a valid config: {error}") from error
        return config.replace(**overrides)
