"""Where a CSM's files are, on the hub or in a folder, and reading weights from them row by row.

A checkpoint is in Sesame's layout, transformers' or csm-hf's, told apart by the names in its weights.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from moshi.models import MimiModel, loaders
from safetensors import SafetensorError, safe_open

from finetune.errors import UserError
from finetune.families.base import Weights
from finetune.families.csm.codec_names import MIMI_CONFIG, from_codec_config, from_transformers
from finetune.families.csm.config import CsmConfig, from_json
from finetune.families.csm.layouts import AUDIO_TABLE, CODEC_PREFIX, TIED_COPY, Layout, name_in, recognize, rows_in
from finetune.families.csm.model import CsmModel
from finetune.families.csm.places import (
    Place,
    Settings,
    folder_place,
    from_hub,
    hub_place,
    read_notes,
    single_file,
)
from finetune.families.csm.text import BOS_TOKEN, EOS_TOKEN, TEXT_TEMPLATE, check_template
from finetune.json_files import read_json

# Sesame takes its text tokenizer from here (SesameAILabs/csm `generator.py`).
TOKENIZER_REPO = "meta-llama/Llama-3.2-1B"
TOKENIZER_FILE = "tokenizer.json"
# What may lie beside a tokenizer and belongs to transformers' processor.
PROCESSOR_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


class ModelPaths(Protocol):
    """The part of the `model` section that says where files are and how turns are written; None is not set."""

    hf_repo_id: str | None
    path: str | None
    mimi_path: str | None
    mimi_config_path: str | None
    tokenizer_path: str | None
    text_template: str | None
    bos_token: str | None
    eos_token: str | None


@dataclass(frozen=True)
class Companions:
    """What a CSM needs beside its weights."""

    tokenizer_path: Path
    """A `tokenizer.json`; the processor's files may lie beside it."""
    mimi_weights: tuple[Path, ...]
    """One file in moshi's layout, or transformers' files that hold `codec_model.*`."""
    mimi_config: dict[str, Any]
    """In moshi's spelling."""
    settings: Settings
    """How turns are written, and the single paths that led here."""
    generation_config: dict[str, Any]
    """transformers', where the checkpoint has one; else empty."""


@dataclass(frozen=True)
class Checkpoint:
    """A CSM's weights and sizes."""

    place: Place
    config: CsmConfig
    layout: Layout
    weights: tuple[Path, ...]
    codec_config: dict[str, Any] | None
    """transformers', of the codec that is among the weights; None where there is none."""


@dataclass(frozen=True)
class CsmFiles(Checkpoint, Companions):
    """A checkpoint and its companions."""


def find_files(paths: ModelPaths) -> CsmFiles:
    """The checkpoint and its companions. `path` wins over `hf_repo_id`; it may also be a weights file.

    Raises:
        UserError: a file is missing or broken, or the hub refuses; names the key and the remedy.
    """
    checkpoint = find_checkpoint(paths)
    companions = find_companions(paths, checkpoint)
    entries, fits = companions.mimi_config["quantizer"]["bins"], checkpoint.config.audio_vocab_size
    if entries > fits:
        raise UserError(f"model: the codec has {entries} entries a codebook, the model {fits}; use the model's own")
    return CsmFiles(**vars(checkpoint), **vars(companions))


def find_checkpoint(paths: ModelPaths) -> Checkpoint:
    """The checkpoint alone; see `find_files`."""
    place, chosen = _place_of(paths)
    config_path = place.look("config.json")
    raw = read_json(config_path) if config_path else None
    weights = (chosen,) if chosen else _find_weights(place, raw or {})
    with ExitStack() as opened:
        names = set(_open_all(weights, place.key, opened))
    layout = recognize(names)
    if raw is None and weights[0].suffix == ".safetensors":
        raise UserError(f"{place.key}: {place.address}: no config.json in it; give a CSM's folder")
    has_codec = any(name.startswith(CODEC_PREFIX) for name in names)
    return Checkpoint(
        place=place,
        config=CsmConfig() if raw is None else from_json(raw),  # Sesame's first release had no config.json
        layout=layout,
        weights=weights,
        codec_config=(raw or {}).get("codec_config", {}) if has_codec else None,
    )


def find_companions(paths: ModelPaths, checkpoint: Checkpoint | None = None) -> Companions:
    """Tokenizer and codec: those of single paths, else the checkpoint's own, else Llama 3's and Kyutai's of the hub.

    Args:
        checkpoint: None for a model that is yet to be made.
    """
    place = checkpoint.place if checkpoint else None
    settings = settle(paths, place)
    if settings.mimi_path is None and checkpoint is not None and checkpoint.codec_config is not None:
        mimi_weights, mimi_config = checkpoint.weights, from_codec_config(checkpoint.codec_config)
    else:
        default = f"hf://{loaders.DEFAULT_REPO}/{loaders.MIMI_NAME}"
        mimi_weights = (single_file(settings.mimi_path or default, "model.mimi_path"),)
        mimi_config = MIMI_CONFIG
        if settings.mimi_config_path is not None:
            mimi_config = read_json(single_file(settings.mimi_config_path, "model.mimi_config_path"))
            _check_mimi_config(mimi_config, settings.mimi_config_path)
    generation = place.look("generation_config.json") if place else None
    return Companions(
        tokenizer_path=find_tokenizer(paths, place) or from_hub(TOKENIZER_REPO, TOKENIZER_FILE, "model.tokenizer_path"),
        mimi_weights=mimi_weights,
        mimi_config=mimi_config,
        settings=settings,
        generation_config=read_json(generation) if generation else {},
    )


def settle(paths: ModelPaths, place: Place | None) -> Settings:
    """What is set, else what the checkpoint's `parley.json` says, else Sesame's way of writing turns.

    Raises:
        UserError: that file is broken.
    """
    notes = read_notes(place) if place else {}
    if paths.mimi_path is not None:
        notes.pop("mimi_config_path", None)  # of another codec
    try:
        check_template(notes.get("text_template", TEXT_TEMPLATE))
    except ValueError as error:
        raise UserError(f"model: {place.address if place else ''}: {error}; mend its parley.json") from error
    return Settings(
        text_template=_first(paths.text_template, notes.get("text_template"), TEXT_TEMPLATE),
        bos_token=_first(paths.bos_token, notes.get("bos_token"), BOS_TOKEN),
        eos_token=_first(paths.eos_token, notes.get("eos_token"), EOS_TOKEN),
        mimi_path=paths.mimi_path or notes.get("mimi_path"),
        mimi_config_path=paths.mimi_config_path or notes.get("mimi_config_path"),
        tokenizer_path=paths.tokenizer_path,  # a folder's own lies in it
    )


def _first(*values: str | None) -> str:
    return next(value for value in values if value is not None)


def _place_of(paths: ModelPaths) -> tuple[Place, Path | None]:
    """Where the checkpoint is, and its weights where `path` names the file."""
    if paths.path is None:
        if paths.hf_repo_id is None:
            raise UserError("model: no weights; set path to a CSM's folder, or hf_repo_id")
        return hub_place(paths.hf_repo_id, "model.hf_repo_id"), None
    path = Path(paths.path)
    if not path.exists():
        raise UserError(f"model.path: {path}: no such folder; give a CSM's folder")
    if path.is_file():
        return folder_place(path.parent, "model.path"), path
    if (path / "adapter_config.json").exists():
        raise UserError(f"model.path: {path} holds an adapter; merge it first with scripts/merge_adapter.py")
    return folder_place(path, "model.path"), None


def _find_weights(place: Place, raw_config: Mapping[str, Any]) -> tuple[Path, ...]:
    """The weights of a checkpoint: one file, or the shards that an index names."""
    # `transformers_weights` is transformers' key for repositories that hold other weights too, as sesame/csm-1b does.
    named = raw_config.get("transformers_weights")
    if named is not None and not isinstance(named, str):
        raise UserError(f"{place.key}: {place.address}: transformers_weights: {named!r} of config.json names no file")
    for name in (*([named] if named else []), "model.safetensors.index.json", "model.safetensors", "ckpt.pt"):
        path = place.look(name)
        if path is None:
            continue
        if path.suffix != ".json":
            return (path,)
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{place.key}: {path}: its weight_map names no files; download it again")
        return tuple(place.fetch(shard) for shard in sorted(set(shards.values())))
    # Asked for again, so that the message says why it is not there.
    return (place.fetch("model.safetensors"),)


def find_tokenizer(paths: ModelPaths, place: Place | None) -> Path | None:
    """The tokenizer that is named, or that lies beside the weights."""
    if paths.tokenizer_path is not None:
        path = Path(paths.tokenizer_path)
        name = str(path / TOKENIZER_FILE) if path.is_dir() else paths.tokenizer_path
        return single_file(name, "model.tokenizer_path")
    own = place.look(TOKENIZER_FILE) if place else None
    if place is not None and own is not None:
        for name in PROCESSOR_FILES:
            place.look(name)  # from the hub they come into the same folder
    return own


def copy_tokenizer(tokenizer_path: Path, folder: Path) -> None:
    """Put a tokenizer, and what of the processor lies beside it, into another folder."""
    shutil.copyfile(tokenizer_path, folder / TOKENIZER_FILE)
    for name in PROCESSOR_FILES:
        if (tokenizer_path.parent / name).is_file():
            shutil.copyfile(tokenizer_path.parent / name, folder / name)


def _check_mimi_config(config: Mapping[str, Any], path: str) -> None:
    missing = MIMI_CONFIG.keys() - config.keys()
    if missing:
        raise UserError(f"model.mimi_config_path: {path}: lacks {min(missing)}; give a Mimi's, in moshi's spelling")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    """Some of its rows."""


def _open_all(paths: tuple[Path, ...], key: str, opened: ExitStack) -> dict[str, _Stored]:
    """All tensors of some files, which stay open; nothing is read yet."""
    found: dict[str, _Stored] = {}
    for path in paths:
        found |= _open_safetensors(path, key, opened) if path.suffix == ".safetensors" else _open_pickle(path, key)
    return found


def _open_safetensors(path: Path, key: str, opened: ExitStack) -> dict[str, _Stored]:
    try:
        file = opened.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {path}: not a safetensors file ({error}); download it again") from error

    def stored(name: str) -> _Stored:
        rows = file.get_slice(name)
        return _Stored(tuple(rows.get_shape()), lambda start, stop: rows[start:stop])

    return {name: stored(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def _open_pickle(path: Path, key: str) -> dict[str, _Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the file makes it
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: {path}: not a file of plain tensors ({reason}); download it again") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    return {
        name: _Stored(tuple(tensor.shape), partial(_rows, tensor))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]


def open_weights(files: Checkpoint, opened: ExitStack) -> Weights:
    """The checkpoint under our names, whichever layout it has.

    Args:
        opened: keeps the files open.

    Raises:
        UserError: a parameter is missing, has another shape than `config.json` says, or is not in it at all.
    """
    key = f"model: {files.place.address}"
    stored = _open_all(files.weights, "model", opened)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CsmModel(files.config).state_dict().items()}
    places = {}
    unknown = {name for name in stored if not name.startswith(CODEC_PREFIX)} - {AUDIO_TABLE, TIED_COPY}
    for name, shape in expected.items():
        source = name_in(files.layout, name, stored)
        if source not in stored:
            raise UserError(f"{key}: the weights lack {source}; is this the model of its config.json?")
        if stored[source].shape != shape:
            has, wants = list(stored[source].shape), list(shape)
            raise UserError(f"{key}: {source} is {has}, by config.json {wants}; take the config.json of the weights")
        places[name] = stored[source]
        unknown.discard(source)
    if unknown:
        said = f"{min(unknown)} is of no model that its config.json describes ({len(unknown)} such tensors)"
        raise UserError(f"{key}: {said}; take the config.json of the weights")

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return rows_in(files.layout, name, places[name].read, start, stop, files.config)

    return Weights(frozenset(places), read)


def read_state(files: Checkpoint) -> dict[str, torch.Tensor]:
    """The whole checkpoint under our names, on the CPU."""
    with ExitStack() as opened:
        weights = open_weights(files, opened)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in CsmModel(files.config).state_dict().items()}
        return {name: weights.read(name, 0, shape[0]) for name, shape in shapes.items()}


def load_mimi(companions: Companions, num_codebooks: int, device: torch.device) -> MimiModel:
    """The codec, encoding into the model's number of codebooks.

    Raises:
        UserError: the file is not the codec that its configuration describes, or it has too few codebooks.
    """
    paths, config = companions.mimi_weights, companions.mimi_config
    has = config["quantizer"]["n_q"]
    if has < num_codebooks:
        raise UserError(f"model.mimi_path: {paths[0]}: {has} codebooks, the model has {num_codebooks}; use its own")
    try:
        mimi = loaders.get_mimi(None, config, device, num_codebooks)
        with ExitStack() as opened:
            stored = _open_all(paths, "model.mimi_path", opened)
            codec = {name: stored[name] for name in stored if name.startswith(CODEC_PREFIX)}
            state = {
                name.removeprefix(CODEC_PREFIX): one.read(0, one.shape[0]) for name, one in (codec or stored).items()
            }
        if codec:
            state = from_transformers(state, mimi.state_dict(), config["transformer"]["num_heads"])
        mimi.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # whatever a wrong file or architecture makes moshi say
        reason = " ".join(str(error).split())
        remedy = "check mimi_path and mimi_config_path"
        raise UserError(
            f"model.mimi_path: {paths[0]}: not the codec its config describes ({reason}); {remedy}"
        ) from error
    return mimi
