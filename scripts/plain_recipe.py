"""LoRA training out of the `moshi` package alone: what benchmark.py compares with. Not a program of its own.

moshi's `LMModel` with its own activation checkpointing and LoRA, float32 logits of every position at once, and
moshi-finetune's loss.

Shape legend: B batch, K streams (row 0 text, then audio), T frames, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch.nn import functional as F


def load(weights_path: Path | None, lm_kwargs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> LMModel:
    """moshi's model from a file, or with random weights."""
    return loaders.get_moshi_lm(
        weights_path,
        lm_kwargs,
        device=device,
        dtype=dtype,
        lm_kwargs_overrides={"gradient_checkpointing": True},
    )


def add_adapters(model: LMModel, rank: int, scaling: float) -> None:
    """Freeze the model and put an adapter on every linear layer, in place."""
    model.requires_grad_(False)
    replace_all_linear_with_lora(model, rank, scaling)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.frozen_W.requires_grad_(False)


def loss(
    model: LMModel, codes_BKT: torch.Tensor, first_codebook_weight: float, text_padding_weight: float
) -> torch.Tensor:
    """moshi-finetune's loss (its finetune/loss.py), rewritten: weighted means of text and audio, summed."""
    output = model(codes_BKT)
    text_B1T, audio_BKT = codes_BKT[:, :1], codes_BKT[:, 1 : 1 + model.dep_q]
    text_weight_B1T = output.text_mask.float()
    padding_ids = (model.text_padding_token_id, model.end_of_text_padding_id)
    text_weight_B1T[torch.isin(text_B1T, torch.tensor(padding_ids, device=text_B1T.device))] *= text_padding_weight
    audio_weight_BKT = output.mask.float()
    audio_weight_BKT[:, 0] *= first_codebook_weight
    text_loss = weighted_cross_entropy(output.text_logits, text_B1T, text_weight_B1T)
    return text_loss + weighted_cross_entropy(output.logits, audio_BKT, audio_weight_BKT)


def weighted_cross_entropy(
    logits_BKTV: torch.Tensor, target_BKT: torch.Tensor, weight_BKT: torch.Tensor
) -> torch.Tensor:
    """Σ(w·nll) / Σw, in float32. moshi fills with NaN what the delays leave open; its weight is 0."""
    nll = F.cross_entropy(logits_BKTV.flatten(0, 2).float(), target_BKT.flatten(), reduction="none")
    weight = weight_BKT.flatten()
    return torch.where(weight > 0, nll * weight, 0.0).sum() / weight.sum()
