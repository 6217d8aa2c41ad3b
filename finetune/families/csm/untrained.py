"""A CSM of one's own, made from nothing."""

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError
from finetune.families.csm.config import LLAMA_1B, LLAMA_100M, CsmConfig, TransformerConfig, from_json
from finetune.families.csm.export import write_transformers
from finetune.families.csm.files import ModelPaths, find_companions, load_mimi
from finetune.families.csm.model import CsmModel, RMSNorm
from finetune.families.csm.text import TurnTokenizer
from finetune.json_files import read_json

# transformers' `CsmConfig.initializer_range`, and Llama's.
INITIAL_STD = 0.02
# Entries of the audio vocabulary beyond the codec's, as in CSM-1B (2,051 for 2,048).
NUM_EXTRA_CODES = 3
_BASES = {"backbone": LLAMA_1B, "decoder": LLAMA_100M}


def prepare_untrained(paths: ModelPaths, architecture: dict[str, Any], folder: Path, seed: int) -> Path | None:
    """Write a model folder in transformers' layout with random weights; None if this model is there already.

    Raises:
        UserError: the architecture is none, a file is missing, or the folder holds something else.
    """
    for key in ("mimi_path", "tokenizer_path"):
        if getattr(paths, key) is None:
            raise UserError(f"model.{key}: not set; a new model needs its codec and tokenizer")
    companions = find_companions(paths)
    tokenizer = TurnTokenizer.of(companions.tokenizer_path, companions.settings)
    config = config_of(architecture, companions.mimi_config["quantizer"], tokenizer.vocab_size)
    if (folder / "config.json").exists():
        if from_json(read_json(folder / "config.json")) != config:
            raise UserError(f"model.architecture: {folder} was made otherwise; choose another model.path or delete it")
        return None
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"model.path: {folder} holds other files; give a new folder for the new model")
    model = CsmModel(config)
    initialize(model, torch.Generator().manual_seed(seed))
    mimi = load_mimi(companions, config.num_codebooks, torch.device("cpu"))
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_transformers(temporary, model.state_dict(), config, mimi, companions)
    os.replace(temporary, folder)  # an empty folder of that name may be there
    return folder


def config_of(architecture: dict[str, Any], quantizer: dict[str, Any], text_vocab_size: int) -> CsmConfig:
    """The sizes that a YAML's `architecture` means, over CSM-1B's.

    Args:
        quantizer: of the codec's configuration.

    Raises:
        UserError: an unknown key, or sizes that fit no transformer.
    """
    unknown = architecture.keys() - {"num_codebooks", *_BASES}
    if unknown:
        known = ", ".join(["num_codebooks", *_BASES])
        raise UserError(f"model.architecture.{min(unknown)}: unknown key; known keys: {known}")
    num_codebooks = architecture.get("num_codebooks", min(quantizer["n_q"], CsmConfig.num_codebooks))
    if not isinstance(num_codebooks, int) or not 2 <= num_codebooks <= quantizer["n_q"]:
        said = f"model.architecture.num_codebooks: {num_codebooks!r}"
        raise UserError(f"{said} is not a number from 2 to the codec's {quantizer['n_q']}")
    parts = {name: _transformer(name, architecture.get(name) or {}) for name in _BASES}
    return CsmConfig(text_vocab_size, quantizer["bins"] + NUM_EXTRA_CODES, num_codebooks, **parts)


def _transformer(name: str, sizes: dict[str, Any]) -> TransformerConfig:
    key = f"model.architecture.{name}"
    known = [field.name for field in fields(TransformerConfig) if field.name != "rope_scaling"]
    if not isinstance(sizes, dict) or not sizes.keys() <= set(known):
        raise UserError(f"{key}: {sizes!r:.80} is not a section of {', '.join(known)}")
    for size, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{key}.{size}: {value!r} is not a positive number")
    config = TransformerConfig(**{**vars(_BASES[name]), **sizes})
    if config.hidden_size % (2 * config.num_heads) or config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{key}: hidden_size must be an even multiple of num_heads, and num_heads a multiple of num_kv_heads"
        )
    return config


@torch.no_grad()
def initialize(model: CsmModel, generator: torch.Generator) -> None:
    """Normal weights of small width, norms of one, in float32."""
    ones = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for parameter in model.parameters():
        if id(parameter) in ones:
            nn.init.ones_(parameter)
        else:
            parameter.normal_(std=INITIAL_STD, generator=generator)
