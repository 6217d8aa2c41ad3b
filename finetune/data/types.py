"""The types that travel: Clip (audio and words), Sample and Batch (codes and loss weights).

Shape legend: B batch, K streams (row 0 text, rows 1.. audio codebooks), T frames, C channels, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

ABSENT = -1  # nothing is fed and nothing is predicted here; moshi's LMModel.zero_token_id
SAMPLE_RATE_HZ = 24_000


class BadRecording(Exception):
    """A recording that cannot be trained on. The message says what is wrong and what to do."""


@dataclass(frozen=True)
class Word:
    """One spoken word; times count from the start of the clip that holds it."""

    text: str
    start_sec: float
    end_sec: float
    speaker: str


@dataclass(frozen=True)
class Clip:
    """A window of a recording with the words spoken in it. No tokens, no model."""

    wav_CS: np.ndarray
    """float32 at 24 kHz; as long as the recording lasts inside the window, so possibly shorter than it."""
    words: Sequence[Word]
    path: str
    start_sec: float
    """Where the window starts in its file."""
    duration_sec: float
    """Length of the window; the audio may end before it does."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Text conditions of the whole recording, by conditioner name."""

    @property
    def audio_sec(self) -> float:
        return self.wav_CS.shape[-1] / SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Turn:
    """What one speaker says in one go."""

    text: str
    speaker: str
    wav_S: np.ndarray
    """Mono float32 at 24 kHz; empty where there is text alone, which is context."""
    is_trained: bool
    """Whether the model learns to say it; otherwise it is context."""
    is_cut: bool = False
    """Whether the audio was cut off, so that it does not end where the speaker did."""


@dataclass(frozen=True)
class Conversation:
    """Some turns in their order, those before a turn being its context. No tokens, no model."""

    turns: Sequence[Turn]
    path: str
    """The file or the manifest line that it comes from, for messages."""


@dataclass(frozen=True)
class Sample:
    """One clip or conversation as a model sees it."""

    codes_KT: torch.Tensor
    """int64; ABSENT where nothing is fed."""
    loss_weight_KT: torch.Tensor
    """float32; 0 where nothing is to be learned."""
    audio_sec: float
    conditions: dict[str, str] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Batch:
    """Samples side by side, on the CPU. One layout for all families."""

    codes_BKT: torch.Tensor
    loss_weight_BKT: torch.Tensor
    segment_BT: torch.Tensor
    """int64: which clip of its row a frame belongs to; -1 is padding."""
    audio_sec: float
    conditions: tuple[dict[str, str], ...] = ()
    paths: tuple[str, ...] = ()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device. Pinned first, since only then does the copy not wait for the GPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def trim(sample: Sample, num_tail_frames: int) -> Sample:
    """Cut off the empty frames at the end, except for the first `num_tail_frames` of them."""
    present = (sample.codes_KT != ABSENT).any(0).nonzero()
    num_frames = int(present.max()) + 1 + num_tail_frames if len(present) else 0
    return replace(
        sample, codes_KT=sample.codes_KT[:, :num_frames], loss_weight_KT=sample.loss_weight_KT[:, :num_frames]
    )


def collate(rows: Sequence[Sequence[Sample]], num_frames: int | None = None) -> Batch:
    """Rows of samples, one behind the other, padded with ABSENT to `num_frames` or the longest row.

    The frames of a row's only sample that hold nothing count as padding. Behind each other samples keep them:
    they are where delayed streams end.
    """
    longest = max(sum(sample.codes_KT.shape[1] for sample in row) for row in rows)
    num_frames = max(num_frames or 0, longest, 1)
    num_streams = rows[0][0].codes_KT.shape[0]
    codes_BKT = torch.full((len(rows), num_streams, num_frames), ABSENT, dtype=torch.int64)
    loss_weight_BKT = torch.zeros(len(rows), num_streams, num_frames)
    segment_BT = torch.full((len(rows), num_frames), -1, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            stop = start + sample.codes_KT.shape[1]
            codes_BKT[index, :, start:stop] = sample.codes_KT
            loss_weight_BKT[index, :, start:stop] = sample.loss_weight_KT
            segment_BT[index, start:stop] = segment
            start = stop
        if len(row) == 1:
            segment_BT[index].masked_fill_((codes_BKT[index] == ABSENT).all(0), -1)
    samples = [sample for row in rows for sample in row]
    return Batch(
        codes_BKT=codes_BKT,
        loss_weight_BKT=loss_weight_BKT,
        segment_BT=segment_BT,
        audio_sec=sum(sample.audio_sec for sample in samples),
        conditions=tuple(row[0].conditions for row in rows),
        paths=tuple(sample.path for sample in samples),
    )
