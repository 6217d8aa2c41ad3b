"""What other programs load: CSM in transformers' layout, Sesame's and csm-hf's, and adapters in PEFT's.

Weights come under our names, on the CPU.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.models import MimiModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.families.base import Adapter
from finetune.families.csm import codec_names
from finetune.families.csm.config import CsmConfig, to_csm_hf, to_sesame, to_transformers
from finetune.families.csm.files import Companions, CsmFiles, copy_tokenizer
from finetune.families.csm.layouts import AUDIO_TABLE, CODEC_PREFIX, TIED_COPY, Layout, to_layout
from finetune.families.csm.places import Settings, write_notes
from finetune.families.csm.processor import write_processor
from finetune.json_files import read_json

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# peft puts this before every name.
_PEFT_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")
# SesameAILabs/csm `generator.py`: 90 s at 12.5 frames a second, temperature 0.9 and the 50 most probable codes.
_MAX_FRAMES, _TEMPERATURE, _TOP_K = 1125, 0.9, 50


def write_transformers(
    folder: Path, state: Mapping[str, torch.Tensor], config: CsmConfig, mimi: MimiModel, companions: Companions
) -> None:
    """A folder from which transformers' `CsmForConditionalGeneration` and `AutoProcessor` load with nothing else.

    The codec goes in with as many codebooks as the model has, since transformers encodes with all that are there.

    Args:
        mimi: the codec that `companions` describes.

    Raises:
        UserError: transformers' Mimi has no such architecture.
    """
    mimi_config = companions.mimi_config
    codec_config = codec_names.to_codec_config(mimi_config, config.num_codebooks)
    moshi_state = {name: tensor.detach().cpu() for name, tensor in mimi.state_dict().items()}
    codec = codec_names.to_transformers(moshi_state, mimi_config["transformer"]["num_heads"], config.num_codebooks)
    tensors = dict(state) | {f"{CODEC_PREFIX}{name}": tensor for name, tensor in codec.items()}
    # Twice, as in sesame/csm-1b: transformers 4 ties the backbone's table to the decoder's, so that it must find the
    # latter, and other programs read the former.
    tensors[TIED_COPY] = tensors[AUDIO_TABLE].clone()
    _save(tensors, folder / WEIGHTS_FILE)
    ids = write_processor(folder, companions, config.text_vocab_size)
    written = to_transformers(config) | ids | {"codec_config": codec_config, "dtype": _dtype_name(state)}
    _write_json(folder / "config.json", written)
    generation = companions.generation_config or _generation_config(config, codec_config["codebook_size"])
    # A tokenizer of one's own has other ids than the one that the settings came with.
    generation = generation | {key: ids[key] for key in ("bos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation)
    write_notes(folder, companions.settings, without=("mimi_path", "mimi_config_path", "tokenizer_path"))


def write_sesame(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: CsmConfig,
    tokenizer_path: Path | None = None,
    settings: Settings | None = None,
) -> None:
    """Sesame's layout, for SesameAILabs/csm and what reads its files; tokenizer and settings beside it, if given.

    Sizes other than those of its two flavours stand in `config.json` as mappings, which only this project reads.
    """
    _write_plain(folder, state, config, "sesame", to_sesame(config), tokenizer_path, settings)


def write_csm_hf(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: CsmConfig,
    tokenizer_path: Path | None = None,
    settings: Settings | None = None,
) -> None:
    """thomasgauthier/csm-hf's layout, for its `CSMModel.from_pretrained`."""
    dtype = {"torch_dtype": _dtype_name(state)}
    _write_plain(folder, state, config, "csm_hf", to_csm_hf(config) | dtype, tokenizer_path, settings)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], adapter: Adapter, files: CsmFiles) -> None:
    """PEFT's layout, for `peft.PeftModel.from_pretrained(model, folder)` on transformers' model.

    Embedding tables that were trained in full go in whole. The audio table goes in twice: peft would replace the
    backbone's alone, and the depth decoder would keep the old one.

    Args:
        tensors: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, and what else was trained.
        files: the base.
    """
    targets = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    whole = {
        name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    if AUDIO_TABLE in whole:
        whole[TIED_COPY] = whole[AUDIO_TABLE].clone()
    saved = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in (dict(tensors) | whole).items()}
    _save(saved, folder / ADAPTER_FILE)
    alpha = adapter.scaling * (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    base = Path(files.place.address)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base.resolve()) if base.exists() else files.place.address,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "use_rslora": adapter.rslora,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": sorted(name.removesuffix(".weight") for name in whole) or None,
    }
    _write_json(folder / ADAPTER_CONFIG, config)
    write_processor(folder, files, files.config.text_vocab_size)
    write_notes(folder, files.settings)


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """A LoRA adapter in PEFT's layout, under our names.

    Raises:
        UserError: there is none, or it is of a kind that this project does not have.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; give the folder of an adapter in PEFT's layout")
    config = read_json(folder / ADAPTER_CONFIG)
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for key, value in plain.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{folder}: {key}: {config[key]} of {ADAPTER_CONFIG} is not plain LoRA; merge it with peft")
    try:
        saved = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_FILE}: not a safetensors file ({error}); save it again") from error
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in saved.items()}
    tensors.pop(TIED_COPY, None)
    rank, rslora = config.get("r"), bool(config.get("use_rslora"))
    alpha, dropout = config.get("lora_alpha", math.nan), config.get("lora_dropout") or 0.0
    if type(rank) is not int or rank < 1:
        raise UserError(f"{folder}: r: {rank!r} of {ADAPTER_CONFIG} is not a rank of 1 or more; save it again")
    for key, number in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise UserError(f"{folder}: {key}: {number!r} of {ADAPTER_CONFIG} is not a number; save it again")
    return Adapter(rank, alpha / (math.sqrt(rank) if rslora else rank), dropout, rslora), tensors


def _write_plain(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    config: CsmConfig,
    layout: Layout,
    written: Mapping[str, Any],
    tokenizer_path: Path | None,
    settings: Settings | None,
) -> None:
    """A layout without a codec."""
    _save(to_layout(state, layout, config), folder / WEIGHTS_FILE)
    _write_json(folder / "config.json", written)
    if tokenizer_path is not None:
        copy_tokenizer(tokenizer_path, folder)
    if settings is not None:
        write_notes(folder, settings, without=("tokenizer_path",))


def _generation_config(config: CsmConfig, num_entries: int) -> dict[str, Any]:
    """Sesame's way of sampling, for the first codebook and, as `depth_decoder_…`, for the others.

    Codes that the codec does not have are never drawn; CSM-1B's vocabulary holds three more than Mimi's 2,048.
    """
    sampling: dict[str, Any] = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": _TOP_K}
    if num_entries < config.audio_vocab_size:
        sampling["suppress_tokens"] = list(range(num_entries, config.audio_vocab_size))
    num_acoustic = config.num_codebooks - 1
    depth = sampling | {"min_new_tokens": num_acoustic, "max_new_tokens": num_acoustic}
    return {
        **sampling,
        "max_new_tokens": _MAX_FRAMES,
        **{f"depth_decoder_{key}": value for key, value in depth.items()},
    }


def _dtype_name(state: Mapping[str, torch.Tensor]) -> str:
    return str(next(iter(state.values())).dtype).removeprefix("torch.")


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # transformers refuses files that do not say which library they are for.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
