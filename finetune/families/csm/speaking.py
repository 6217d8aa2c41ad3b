"""Speech from CSM: prompts, the loop over frames, and audio while it is made.

Shape legend: B batch, K codebooks (rows of codes [1 + K, T] are text, then codebooks), T positions, S samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from moshi.models import MimiModel

from finetune.data.types import ABSENT, send
from finetune.errors import UserError
from finetune.families.base import SpeechChunk
from finetune.families.csm.config import MAX_POSITIONS
from finetune.families.csm.frames import turn_codes
from finetune.families.csm.model import CsmModel
from finetune.families.csm.streaming import BackboneStream, DepthStream
from finetune.sampling import Sampling, draw_uniform, row_generators, sample

# Frames between two looks at whether all rows have ended. A look waits for the GPU.
FRAMES_PER_CHECK = {"cuda": 8}


def prompt_codes(
    turns: Sequence[tuple[Sequence[int], torch.Tensor | None]], text_ids: Sequence[int], num_codebooks: int
) -> torch.Tensor:
    """Codes [1 + K, T] after which the model speaks a text.

    Args:
        turns: what was said before: token ids, and codes [K, T] of the audio or None for a turn that is text alone.
        text_ids: token ids of the text to speak.
    """
    nothing_KT = torch.zeros(num_codebooks, 0, dtype=torch.int64)
    said = [turn_codes(ids, nothing_KT if codes_KT is None else codes_KT) for ids, codes_KT in turns]
    return torch.cat([*said, turn_codes(text_ids, nothing_KT)], 1)


def generate_codes(
    model: CsmModel,
    prompts: Sequence[torch.Tensor],
    *,
    max_frames: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    num_entries: int | None = None,
    max_positions: int = MAX_POSITIONS,
    frames_per_check: int | None = None,
) -> Iterator[torch.Tensor]:
    """Frames [B, K] on the model's device, as they are made.

    A row ends with a frame of zeros, which is given as it is, or without one where it was cut off: after `max_frames`
    frames or at the model's last position. After its end it holds ABSENT. The iterator ends when all rows have, or at
    most `frames_per_check` - 1 frames later.

    Each row draws from its own random numbers, so that a text sounds the same alone and among others. (But for
    rounding: kernels sum in another order for another batch size, which can turn a draw that is almost a tie.)

    Args:
        prompts: codes [1 + K, T] on the CPU, of any lengths.
        seeds: one a row; default: `sampling.seed` for all.
        num_entries: codes from here on are never drawn; for codecs with fewer entries than the model's vocabulary,
            2,048 against 2,051 in CSM-1B.
        frames_per_check: frames between two looks at whether all rows have ended; default: 8 on a GPU, where
            a look waits for it, and 1 elsewhere.

    Raises:
        UserError: a prompt leaves no room for speech.
    """
    room = _frames_of_rows([codes_KT.shape[1] for codes_KT in prompts], max_frames, max_positions)
    generators = row_generators(seeds if seeds is not None else [sampling.seed] * len(prompts))
    num_positions = max(codes_KT.shape[1] + frames for codes_KT, frames in zip(prompts, room, strict=True))
    frames_per_check = frames_per_check or FRAMES_PER_CHECK.get(model.lm_head.weight.device.type, 1)
    backbone = BackboneStream(model, prompts, num_positions)
    return _frames(model, backbone, room, sampling, generators, num_entries, frames_per_check)


# Not in inference mode, though it is 15 % faster on a CPU: sharded models keep buffers from call to call, and those
# made in it cannot be trained through later. Programs that only speak may turn it on around the iteration.
@torch.no_grad()
def _frames(
    model: CsmModel,
    backbone: BackboneStream,
    room: Sequence[int],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    num_entries: int | None,
    frames_per_check: int,
) -> Iterator[torch.Tensor]:
    was_training = model.training
    model.eval()
    try:
        depth = DepthStream(model)
        hidden_BD = backbone.start()
        room_B = send(torch.tensor(room), hidden_BD.device)
        is_active_B = room_B > 0
        for number in range(1, max(room) + 1):
            uniform_BK = send(draw_uniform(generators, model.config.num_codebooks), hidden_BD.device)
            frame_BK = _next_frame(model, depth, hidden_BD, sampling, uniform_BK, num_entries)
            yield frame_BK.masked_fill(~is_active_B[:, None], ABSENT)
            # All codebooks are zero, as in SesameAILabs/csm; transformers does not look at the last one.
            is_active_B = is_active_B & (frame_BK != 0).any(1) & (room_B > number)
            if number == max(room) or (number % frames_per_check == 0 and not is_active_B.any()):
                return
            hidden_BD = backbone.step(frame_BK)
    finally:
        model.train(was_training)


def _frames_of_rows(lengths: Sequence[int], max_frames: int, max_positions: int) -> list[int]:
    """How many frames each row may have."""
    for index, length in enumerate(lengths):
        if length >= max_positions:
            said = f"text {index + 1} of {len(lengths)} and what was said before it fill {length:,} positions"
            raise UserError(f"generate: {said}, the model has {max_positions:,}; give fewer or shorter context turns")
    return [min(max_frames, max_positions - length) for length in lengths]


def _next_frame(
    model: CsmModel,
    depth: DepthStream,
    hidden_BD: torch.Tensor,
    sampling: Sampling,
    uniform_BK: torch.Tensor,
    num_entries: int | None,
) -> torch.Tensor:
    """The frame [B, K] that follows the backbone's output, codebook by codebook."""
    codes = [sample(model.lm_head(hidden_BD)[:, :num_entries], sampling, uniform_BK[:, 0])]
    for index in range(1, model.config.num_codebooks):
        logits_BV = depth.start(hidden_BD, codes[0]) if index == 1 else depth.step(codes[-1])
        codes.append(sample(logits_BV[:, :num_entries], sampling, uniform_BK[:, index]))
    return torch.stack(codes, 1)


@torch.no_grad()
def stream_audio(mimi: MimiModel, frames: Iterable[torch.Tensor]) -> Iterator[SpeechChunk]:
    """What each frame of `generate_codes` sounds like, one frame's length for each row that is not over.

    Equal to `mimi.decode` of all frames for as long as everything said fits into the attention of Mimi's decoder
    (250 positions at 25 Hz: 10 s). Later a frame writes its two positions over the two oldest ones before the first
    of them has looked (moshi's `RingKVCache` holds no more than the attention reaches), so that this one lacks the
    oldest of its 250 keys. Larger blocks would lose more, hence frame by frame.

    Args:
        mimi: not streaming yet; it streams while this is iterated over, so nothing else may use it then.
    """
    ended: list[bool] = []
    with ExitStack() as streaming:
        for frame_BK in frames:
            is_end_B = (frame_BK == 0).all(1).tolist()
            is_over_B = [is_end or row[0] == ABSENT for is_end, row in zip(is_end_B, frame_BK.tolist(), strict=True)]
            if not ended:
                streaming.enter_context(mimi.streaming(len(frame_BK)))
                ended = [False] * len(frame_BK)
            if all(is_over_B) and not any(is_end_B):
                continue  # the loop over frames looks only now and then whether all rows are over
            wav_BS = _decode_frame(mimi, frame_BK)
            ended = [was_end or is_end for was_end, is_end in zip(ended, is_end_B, strict=True)]
            wavs = [wav_S[:0] if is_over else wav_S for is_over, wav_S in zip(is_over_B, wav_BS, strict=True)]
            yield SpeechChunk(wavs, ended)


def _decode_frame(mimi: MimiModel, frame_BK: torch.Tensor) -> np.ndarray:
    """Waveforms [B, S]; those of rows that are over have no meaning."""
    codes_BK1 = frame_BK.clamp(min=0)[..., None].to(next(mimi.parameters()).device)
    return mimi.decode(codes_BK1)[:, 0].float().cpu().numpy()
