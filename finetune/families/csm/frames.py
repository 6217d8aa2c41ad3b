"""Turns as CSM's frames, and what of them is learned. Pure functions.

Shape legend: K codebooks, T positions; codes of a turn are [1 + K, T], row 0 text.
"""

from collections.abc import Sequence

import numpy as np
import torch

from finetune.data.types import ABSENT
from finetune.families.base import LossTerm


def turn_codes(text_ids: Sequence[int], audio_KT: torch.Tensor, *, is_cut: bool = False) -> torch.Tensor:
    """A turn's text, its audio frames, and a frame of zeros where the speaker ends (SesameAILabs/csm).

    Args:
        audio_KT: int64; no frames where there is text alone, which then has no end either.
        is_cut: whether the audio breaks off, so that no end may be learned.
    """
    num_codebooks, num_frames = audio_KT.shape
    num_ends = int(num_frames > 0 and not is_cut)
    text_KT = torch.full((1 + num_codebooks, len(text_ids)), ABSENT)
    text_KT[0] = torch.tensor(text_ids, dtype=torch.int64)
    frames_KT = torch.cat([audio_KT, torch.zeros(num_codebooks, num_ends, dtype=torch.int64)], 1)
    no_text_KT = torch.full((1, num_frames + num_ends), ABSENT)
    return torch.cat([text_KT, torch.cat([no_text_KT, frames_KT])], 1)


def loss_weights(
    codes_KT: torch.Tensor, is_trained_T: torch.Tensor, amortization: int, rng: np.random.Generator
) -> torch.Tensor:
    """Weights [1 + K, T]: codebook 0 of every trained frame, the others of a random one in `amortization`.

    At least one frame is drawn where any is trained, and each drawn one weighs as many as it stands for. So the
    sum of weights is the same for every draw, and the weighted sum of losses has all frames' sum as its mean.
    """
    is_target_T = is_trained_T & (codes_KT[1] != ABSENT)
    is_target_T[:1] = False  # nothing stands before it that could predict it
    weight_KT = torch.zeros(codes_KT.shape)
    weight_KT[1] = is_target_T.float()
    targets = is_target_T.nonzero().flatten().numpy()
    if amortization == 1 or not len(targets):
        weight_KT[2:] = weight_KT[1]
        return weight_KT
    drawn = rng.choice(targets, max(1, round(len(targets) / amortization)), replace=False)
    weight_KT[2:, drawn] = len(targets) / len(drawn)
    return weight_KT


def loss_terms(num_codebooks: int, multiplier: float | None, decoder_weight: float | None) -> list[LossTerm]:
    """(m·c0 + n·depth)/(m + n) with n = num_codebooks - 1, or (1 - w)·c0 + w·depth; both halves alike by default."""
    num_acoustic = num_codebooks - 1
    if decoder_weight is None:
        decoder_weight = num_acoustic / ((num_acoustic if multiplier is None else multiplier) + num_acoustic)
    return [
        LossTerm("semantic", slice(1, 2), 1 - decoder_weight),
        LossTerm("acoustic", slice(2, 1 + num_codebooks), decoder_weight),
    ]
