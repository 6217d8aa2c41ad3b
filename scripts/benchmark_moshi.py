"""Moshi: one LoRA training step of ours against the plain recipe.

The plain recipe (plain_recipe.py) is what the `moshi` package alone gives. Both train adapters with the same initial
values, over the same frozen weights (in the same memory) and on the same random codes. In bfloat16 the plain recipe
keeps its adapters in bfloat16, which costs it less time than the float32 masters of moshi-finetune.

Shape legend: B batch, K streams (row 0 text, then audio), T frames, V vocabulary.
"""

import argparse
import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.utils.compile import no_compile
from safetensors.torch import save_file
from torch import nn

import plain_recipe
from benchmark_tools import Contender, Load, Race
from finetune.args import LoraArgs, OptimArgs
from finetune.data.types import SAMPLE_RATE_HZ, Batch
from finetune.families.moshi import MoshiArgs, MoshiFamily, write_untrained
from finetune.lora import adapted_layers, adapter_parameters, add_adapters, initial_adapter_weight
from finetune.loss import denominators, local_loss
from finetune.optim import BETAS, EPS, build_optimizer, clip_gradients
from finetune.parallel import prepare_blocks, set_param_dtypes
from moshi_overrides.training_lm import TrainingLM

QUICKSTART = Path(__file__).parent.parent / "example" / "quickstart"
OPTIM = OptimArgs()
FIRST_CODEBOOK_WEIGHT, TEXT_PADDING_WEIGHT = 100.0, 0.5
# About what https://arxiv.org/abs/2410.00037 (section 3.4.4) gives for English conversations.
PADDING_SHARE = 0.65
PACKAGE = "moshi"
NEEDS_GPU = {"moshi_7b"}


@dataclass(frozen=True)
class Size(Load):
    """A model and the batch it is measured on. `architecture` is laid over Moshi 7B's."""

    architecture: dict[str, Any]
    rank: int


def layers(*sizes: int) -> dict[str, int]:
    """The part of an architecture that makes it large or small."""
    depth = ("depformer_dim", "depformer_dim_feedforward", "depformer_num_heads", "depformer_num_layers")
    return dict(zip(("dim", "num_heads", "num_layers", "context", *depth), sizes, strict=True))


SIZES = {
    # The model of example/quickstart.yaml.
    "tiny": Size(4, 10.0, 3, layers(192, 4, 4, 250, 96, 384, 4, 2), rank=16),
    "small": Size(4, 20.0, 2, layers(512, 8, 8, 500, 256, 1024, 8, 4), rank=32),
    "moshi_7b": Size(8, 100.0, 3, {}, rank=128),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    recompute_help = "our activation checkpointing; the plain recipe keeps its own"
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help=recompute_help)


def prepare(args: argparse.Namespace, folder: Path) -> Race:
    """The models, written to a folder and opened, and their steps on one batch."""
    device = torch.device(args.device)
    family, lm_kwargs, weights_path = write_model(args.size, folder / "model")
    ours_model, plain_model = build_models(family, lm_kwargs, weights_path, args)
    batch = random_batch(family, lm_kwargs, args.batch_size, args.duration_sec)
    return Race(
        contenders=[build_ours(ours_model, family, batch, device), build_plain(plain_model, batch, device)],
        ratios={"ratio": ("plain", "ours")},
        num_frames=batch.codes_BKT.shape[0] * batch.codes_BKT.shape[2],
        audio_sec=batch.audio_sec,
        facts={"rank": SIZES[args.size].rank},
    )


def compilation(device: torch.device) -> AbstractContextManager[None]:
    """moshi compiles norms and rotations on first use; on a CPU its layers decline that, and here so does the rest."""
    return nullcontext() if device.type == "cuda" else no_compile()


def write_model(size_name: str, folder: Path) -> tuple[MoshiFamily, dict[str, Any], Path | None]:
    """Write a model folder and open it; the family, LMModel's arguments, and the weights' file if there is one."""
    weights_path: Path | None = None
    if size_name == "moshi_7b":
        write_files_of_7b(folder)
    else:
        sources = MoshiArgs(
            mimi_path=str(QUICKSTART / "tiny_mimi.safetensors"),
            mimi_config_path=str(QUICKSTART / "tiny_mimi_config.json"),
            tokenizer_path=str(QUICKSTART / "tokenizer.model"),
        )
        write_untrained(sources, SIZES[size_name].architecture, folder, seed=0)
        weights_path = folder / loaders.MOSHI_NAME
    args = MoshiArgs(
        hf_repo_id=None,
        path=str(folder),
        first_codebook_weight_multiplier=FIRST_CODEBOOK_WEIGHT,
        text_padding_weight=TEXT_PADDING_WEIGHT,
    )
    config = json.loads((folder / "config.json").read_text())
    lm_kwargs = {key: value for key, value in config.items() if not key.endswith("_name")}
    return MoshiFamily(args, torch.device("cpu")), lm_kwargs, weights_path


def write_files_of_7b(folder: Path) -> None:
    """All that opening Moshi 7B asks for but its weights: the codec is a small random one that nothing encodes with."""
    folder.mkdir()
    mimi_config = json.loads((QUICKSTART / "tiny_mimi_config.json").read_text())
    mimi_config["quantizer"]["bins"] = loaders._lm_kwargs["card"]
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config))
    save_file(loaders.get_mimi(None, mimi_config).state_dict(), folder / "mimi.safetensors")
    shutil.copyfile(QUICKSTART / "tokenizer.model", folder / "tokenizer.model")
    (folder / loaders.MOSHI_NAME).touch()
    names = {
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
    }
    (folder / "config.json").write_text(json.dumps({**loaders._lm_kwargs, **names}))


def build_models(
    family: MoshiFamily,
    lm_kwargs: dict[str, Any],
    weights_path: Path | None,
    args: argparse.Namespace,
) -> tuple[TrainingLM, LMModel]:
    """Ours and moshi's, over the same frozen weights, with adapters of the same values."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    plain = plain_recipe.load(weights_path, lm_kwargs, device, dtype)
    ours = family.create(torch.device("meta"))
    ours.load_state_dict(plain.state_dict(), assign=True)
    lora = LoraArgs(rank=SIZES[args.size].rank)
    add_adapters(ours, lora)
    set_param_dtypes(ours, adapter_parameters(ours), family.exact_modules(ours), dtype)
    prepare_blocks(family.blocks(ours), compile=False, recompute=args.recompute)

    plain_recipe.add_adapters(plain, lora.rank, lora.scaling)
    for name, layer in adapted_layers(ours).items():
        twin = plain.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            weight = getattr(layer, half).weight
            value = initial_adapter_weight(f"{name}.{half}.weight", weight.shape, seed=0)
            if half == "lora_B":  # zeros, with which no gradient would reach lora_A
                value.normal_(std=0.02)
            weight.data.copy_(value.to(dtype))
            getattr(twin, half).weight.data.copy_(value)
    return ours.train(), plain.train()


def random_batch(family: MoshiFamily, lm_kwargs: dict[str, Any], batch_size: int, duration_sec: float) -> Batch:
    """Full windows of random codes, with the loss weights that training gives them."""
    num_frames = round(duration_sec * SAMPLE_RATE_HZ / family.frame_size)
    text_B1T = torch.randint(lm_kwargs["text_card"], (batch_size, 1, num_frames))
    text_B1T[torch.rand(text_B1T.shape) < PADDING_SHARE] = lm_kwargs["existing_text_padding_id"]
    audio_BKT = torch.randint(lm_kwargs["card"], (batch_size, lm_kwargs["n_q"], num_frames))
    codes_BKT = torch.cat([text_B1T, audio_BKT], 1)
    weight_BKT = torch.stack([family._loss_weights(codes_KT, evaluation=False) for codes_KT in codes_BKT])
    segment_BT = torch.zeros(batch_size, num_frames, dtype=torch.int64)
    return Batch(codes_BKT, weight_BKT, segment_BT, audio_sec=batch_size * duration_sec)


def build_ours(model: TrainingLM, family: MoshiFamily, batch: Batch, device: torch.device) -> Contender:
    """The step of train.py, for one microbatch on one rank."""
    parameters = adapter_parameters(model)

    def loss() -> torch.Tensor:
        term_denominators = denominators([batch], family.terms)
        loss_weight_BKT = batch.loss_weight_BKT.to(device, non_blocking=True)
        nll_BKT = family.nll(model, batch)
        return local_loss(nll_BKT, loss_weight_BKT, family.terms, term_denominators)

    return Contender(
        name="ours",
        weights={name: p for name, p in model.named_parameters() if p.requires_grad},
        loss=loss,
        clip=lambda: clip_gradients(parameters, max_norm=1.0),
        optimizer=build_optimizer([{"params": parameters}], OPTIM),
    )


def build_plain(model: LMModel, batch: Batch, device: torch.device) -> Contender:
    """The same step, out of moshi's and torch's own parts."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Contender(
        name="plain",
        weights=adapters,
        loss=lambda: plain_recipe.loss(model, batch.codes_BKT.to(device), FIRST_CODEBOOK_WEIGHT, TEXT_PADDING_WEIGHT),
        clip=lambda: nn.utils.clip_grad_norm_(adapters.values(), 1.0),
        optimizer=torch.optim.AdamW(
            adapters.values(), lr=OPTIM.lr, betas=BETAS, eps=EPS, weight_decay=OPTIM.weight_decay
        ),
    )
