"""From the configuration to the objects of a run: family, data, model, checkpoints."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import distributed
from finetune.args import TrainArgs
from finetune.checkpoint import Checkpointer
from finetune.data.conversations import ConversationDataset
from finetune.data.dataset import WindowDataset
from finetune.data.loader import Dataset, Loader
from finetune.data.types import SAMPLE_RATE_HZ
from finetune.errors import UserError
from finetune.families import family_class
from finetune.families.base import Family
from finetune.lora import adapter_parameters, add_adapters
from finetune.parallel import (
    build_mesh,
    choose_strategy,
    materialize,
    prepare_blocks,
    set_param_dtypes,
    shard,
)
from finetune.samples import VoiceSamples

logger = logging.getLogger("parley")


def build_family(args: TrainArgs, device: torch.device) -> Family:
    """The family, whose untrained model is made first if the configuration describes one."""
    cls = family_class(args.model.family)
    made = distributed.on_main_rank(cls.prepare, args.model, args.seed)
    if made is not None:
        logger.info("made an untrained model in %s", made)
    return cls(args.model, device)


def build_dataset(args: TrainArgs, family: Family, spec: str, key: str) -> Dataset:
    """What is drawn from: windows of recordings, or of conversations."""
    data, frame_sec = args.data, family.frame_size / SAMPLE_RATE_HZ
    if family.unit == "window":
        return WindowDataset.open(
            spec,
            key,
            duration_sec=args.duration_sec,
            min_channels=family.min_channels,
            frame_sec=frame_sec,
            on_error=data.on_error,
            main_speaker_only=family.main_speaker_only,
            num_workers=data.num_workers,
            num_tail_frames=family.num_tail_frames,
        )
    return ConversationDataset.open(
        spec,
        key,
        max_frames=data.max_frames,
        context_turns=data.context_turns,
        mask_speaker_ids=data.mask_speaker_ids,
        max_audio_sec=None if data.max_audio_length_ms is None else data.max_audio_length_ms / 1000,
        count_text=family.count_text,
        frame_sec=frame_sec,
        on_error=data.on_error,
        num_workers=data.num_workers,
    )


def build_loader(args: TrainArgs, family: Family, *, evaluation: bool) -> Loader:
    """Batches for training, without end, or one pass over the evaluation data."""
    key, spec = ("eval_data", args.data.eval_data) if evaluation else ("train_data", args.data.train_data)
    assert spec is not None
    in_windows = family.unit == "window"
    packing = args.data.packing or ("none" if in_windows else "pack")
    if packing == "pack" and not family.can_pack:
        raise UserError("data.packing: pack: this model's text conditions hold for a whole row; use bucket or none")
    limit = family.max_positions
    if not in_windows and limit is not None and args.data.max_frames > limit:
        raise UserError(f"data.max_frames: {args.data.max_frames} is more than the model's {limit} positions")
    dataset = build_dataset(args, family, spec, f"data.{key}")
    extent = f"{args.duration_sec:g} s" if in_windows else f"up to {args.data.max_frames} positions"
    logger.info("data.%s: %d windows of %s", key, dataset.num_windows, extent)
    return Loader(
        dataset,
        partial(family.tokenize, evaluation=evaluation),
        batch_size=args.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=args.seed,
        shuffle=args.data.shuffle,
        once=evaluation,
        num_workers=args.data.num_workers,
        prefetch_batches=args.data.prefetch_batches,
        packing=packing,
        row_frames=frames_of(args.duration_sec, family) if in_windows else args.data.max_frames,
        num_tail_frames=family.num_tail_frames,
    )


def frames_of(duration_sec: float, family: Family) -> int:
    """Frames that a duration takes, the last one perhaps in part."""
    return -(-round(duration_sec * SAMPLE_RATE_HZ) // family.frame_size)


def build_model(
    args: TrainArgs, family: Family, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, spread over the ranks and loaded, and AdamW's parameter groups."""
    model = family.create(torch.device("meta"))
    chosen = choose_parts(family.parts(model), args.train_only)
    if args.finetuning == "lora":
        add_adapters(model, args.lora, chosen)
    trained = [parameter for group in trained_groups(args, family, model, chosen) for parameter in group["params"]]
    if not trained:
        raise UserError(f"train_only: {args.train_only}: nothing to train there; choose other parts")
    set_param_dtypes(model, trained, family.exact_modules(model), dtype)
    blocks = family.blocks(model)
    prepare_blocks(blocks, compile=args.compile, recompute=args.gradient_checkpointing)
    strategy = choose_strategy(args.parallel, model, dtype, device)
    if strategy != "ddp":
        shard(model, blocks, build_mesh(strategy, args.parallel, device), dtype)
    materialize(model, family.weights(), device, args.seed)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_total = sum(p.numel() for p in model.parameters())
    logger.info(
        "training %.2f of %.2f million parameters, computing in %s, spread by %s",
        num_trained / 1e6, num_total / 1e6, str(dtype).removeprefix("torch."), strategy,
    )  # fmt: skip
    return model, trained_groups(args, family, model, chosen)


def choose_parts(parts: dict[str, list[nn.Module]], names: list[str] | None) -> list[nn.Module] | None:
    """The modules of the parts that `train_only` names; None is all of the model."""
    if names is None:
        return None
    for name in names:
        if not parts.get(name):
            has = ", ".join(name for name, modules in parts.items() if modules)
            raise UserError(f"train_only: {name!r} is not a part of this model; it has {has}")
    return [module for name in names for module in parts[name]]


def trained_groups(
    args: TrainArgs, family: Family, model: nn.Module, chosen: list[nn.Module] | None
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: adapters, or all weights of the chosen parts."""
    if args.finetuning == "lora":
        tables = family.embeddings(model) if args.lora.ft_embed else []
        return [{"params": adapter_parameters(model) + [table.weight for table in tables]}]
    groups = family.param_groups(model)
    if chosen is None:
        return groups
    kept = {id(parameter) for module in chosen for parameter in module.parameters()}
    return [{**group, "params": [p for p in group["params"] if id(p) in kept]} for group in groups]


def build_checkpointer(args: TrainArgs, family: Family, dtype: torch.dtype) -> Checkpointer | None:
    """The writer of checkpoints, unless the run saves none."""
    if not args.do_ckpt:
        return None
    return Checkpointer(
        Path(args.run_dir),
        family,
        lora=args.lora if args.finetuning == "lora" else None,
        adapters_only=args.save_adapters,
        dtype=dtype,
        num_keep=args.num_ckpt_keep,
    )


def build_samples(args: TrainArgs, family: Family, dtype: torch.dtype, device: torch.device) -> VoiceSamples | None:
    """The speaker of samples, unless the run makes none."""
    if args.generate.freq < 1:
        return None
    return VoiceSamples(args.generate, Path(args.run_dir), family, dtype, device)
