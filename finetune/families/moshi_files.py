"""Where a Moshi checkpoint's files are, and reading weights from them row by row.

Files are found by moshi's own `CheckpointInfo`, from the hub or from a local folder.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from moshi.models import loaders
from moshi.models.loaders import CheckpointInfo
from safetensors import SafetensorError, safe_open

from finetune.errors import UserError
from finetune.families.base import Weights
from finetune.json_files import read_json

# A packed projection holds the weights of all codebook steps one below the other (moshi's attention load hook).
_PACKED = re.compile(r"(?P<attention>.*)\.(?P<which>in|out)_proj(_weight|\.weight)")
# config.json's names of the files, and moshi's defaults for them.
FILE_KEYS = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "mimi_config_name": None,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}


class ModelPaths(Protocol):
    """The part of the `model` section that says where files are."""

    hf_repo_id: str | None
    path: str | None
    moshi_path: str | None
    mimi_path: str | None
    mimi_config_path: str | None
    tokenizer_path: str | None
    config_path: str | None


def find_files(paths: ModelPaths) -> tuple[CheckpointInfo, dict[str, str]]:
    """The checkpoint's files, and where each can be had again, in the spelling of moshi's `config.json`.

    Single paths win over the local folder, which wins over the hub.

    Raises:
        UserError: a file is missing or the hub refuses; names the key and the remedy.
    """
    local = _local_files(paths)
    for key, path in local.items():
        if not path.is_file():
            raise UserError(f"model.{_yaml_key(paths, key)}: {path}: no such file")
        if key in ("config", "mimi_config_name"):
            read_json(path)  # moshi reads it again, without saying which file is broken
    complete = {"moshi_name", "mimi_name", "tokenizer_name"} <= local.keys()
    if paths.hf_repo_id is None and not complete:
        raise UserError("model: no weights; set hf_repo_id, path, or moshi_path, mimi_path and tokenizer_path")
    if paths.hf_repo_id is None and "config" not in local:
        # moshi's first releases had no config.json: the 7B model.
        info = CheckpointInfo(local["moshi_name"], local["mimi_name"], local["tokenizer_name"])
    else:
        info = _ask_moshi(paths.hf_repo_id or "", local)
    raw = info.raw_config or {}
    addresses = {}
    for key, default in FILE_KEYS.items():
        name = raw.get(key, default)
        if key in local:
            addresses[key] = f"file://{local[key].resolve()}"
        elif name is not None:
            addresses[key] = name if "://" in name else f"hf://{paths.hf_repo_id}/{name}"
    return info, addresses


def _local_files(paths: ModelPaths) -> dict[str, Path]:
    """Files that need no hub, by their key in config.json (`config` for that file itself)."""
    found: dict[str, Path] = {}
    if paths.path is not None:
        folder = Path(paths.path)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder}: no config.json in it; give a Moshi model's folder")
        found["config"] = folder / "config.json"
        config = read_json(found["config"])
        if config.get("model_type") == "csm" or "backbone_flavor" in config:
            raise UserError(f"model.path: {folder} holds a CSM; set model.family: csm")
        for key, default in FILE_KEYS.items():
            name = config.get(key, default)
            if name is not None and name.startswith("file://"):
                found[key] = Path(name.removeprefix("file://"))
            elif name is not None and (folder / name).is_file():
                found[key] = folder / name
    own = {
        "config": paths.config_path,
        "moshi_name": paths.moshi_path,
        "mimi_name": paths.mimi_path,
        "mimi_config_name": paths.mimi_config_path,
        "tokenizer_name": paths.tokenizer_path,
    }
    for key, value in own.items():
        if value:
            found[key] = _from_hub(value, value, loaders.hf_get) if value.startswith("hf://") else Path(value)
    return found


def _yaml_key(paths: ModelPaths, key: str) -> str:
    single = {"config": "config_path", "moshi_name": "moshi_path", "tokenizer_name": "tokenizer_path"}
    name = single.get(key, key.replace("_name", "_path"))
    return name if getattr(paths, name) else "path"


def _ask_moshi(repo: str, local: dict[str, Path]) -> CheckpointInfo:
    keys = {
        "moshi_weights": "moshi_name",
        "mimi_weights": "mimi_name",
        "mimi_config_path": "mimi_config_name",
        "tokenizer": "tokenizer_name",
        "config_path": "config",
    }
    given = {argument: local[key] for argument, key in keys.items() if key in local}
    return _from_hub(repo, "model.hf_repo_id", lambda _: CheckpointInfo.from_hf_repo(repo, **given))


def _from_hub(repo: str, key: str, get: Any) -> Any:
    try:
        return get(repo)
    except LocalEntryNotFoundError as error:
        remedy = "check the network, or download the files and set model.path"
        raise UserError(f"{key}: {repo}: the hub cannot be reached and the files are not cached; {remedy}") from error
    except HFValidationError as error:
        raise UserError(
            f"{key}: {repo!r} is neither a hub repo nor a folder; a local folder goes to model.path"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        remedy = "check the name; for a gated repo accept its terms on its page and run `hf auth login`"
        raise UserError(f"{key}: {repo}: the hub refuses ({reason}); {remedy}") from error
    except OSError as error:
        remedy = "check the network, or download the files and set model.path"
        raise UserError(f"{key}: {repo}: cannot be fetched ({error}); {remedy}") from error


def open_weights(path: Path, depformer_steps: int, files: ExitStack) -> Weights:
    """Weights of a Moshi checkpoint in the names of moshi's `LMModel`, whichever spelling the file has.

    Args:
        depformer_steps: how many steps of the Depformer have weights of their own.
        files: keeps the file open.

    Raises:
        UserError: the file is not safetensors.
    """
    try:
        file = files.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.moshi_path: {path}: not a safetensors file ({error}); download it again") from error
    places: dict[str, tuple[str, int]] = {}  # name in the model → name in the file, first row
    for stored in file.keys():  # noqa: SIM118 - not a dict
        packed = _PACKED.fullmatch(stored)
        if packed is None:
            places[stored] = (stored, 0)
            continue
        steps = depformer_steps if stored.startswith("depformer.") else 1
        rows = file.get_slice(stored).get_shape()[0] // steps
        for step in range(steps):
            name = f"{packed['attention']}.{packed['which']}_projs.{step}.weight"
            places[name] = (stored, step * rows)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        stored, first_row = places[name]
        if not file.get_slice(stored).get_shape():
            return file.get_tensor(stored)
        return file.get_slice(stored)[first_row + start : first_row + stop]

    return Weights(frozenset(places), read)
