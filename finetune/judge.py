"""Figures that tell, without a model, whether a generated clip may be speech.

Shape legend: S samples, N frames.
"""

import numpy as np

from finetune.data.types import SAMPLE_RATE_HZ

# The length of Mimi's frames.
FRAME_SEC = 0.08
# Pauses between words: 7 % of LJ Speech's frames are quieter.
SILENCE_DBFS = -50.0
# The largest value of 16-bit files: what reaches it is cut off where they are written.
FULL_SCALE = 32767 / 32768


def judge(wav_S: np.ndarray, ended: bool) -> dict[str, float]:
    """Length, silence and level of one clip.

    Speech has pauses, so some frames are silent; nearly all or none tell of a voice that is lost. A clip that did
    not end was cut off at the most frames allowed, which untrained models and runaway speech do.

    Args:
        wav_S: mono at 24 kHz, in [-1, 1]; may be empty.
        ended: whether the model ended the clip itself.

    Returns:
        `length_sec`; `silent_share` of the frames; `ended`, 1 or 0; `peak`, the largest absolute sample;
        `clipped_share` of the samples, those that are no numbers included.
    """
    if not len(wav_S):
        return {"length_sec": 0.0, "silent_share": 1.0, "ended": float(ended), "peak": 0.0, "clipped_share": 0.0}
    level_S = np.abs(wav_S.astype(np.float64))
    return {
        "length_sec": len(wav_S) / SAMPLE_RATE_HZ,
        "silent_share": float((_frame_levels_dbfs(level_S) < SILENCE_DBFS).mean()),
        "ended": float(ended),
        "peak": float(level_S.max()),
        "clipped_share": float((~(level_S < FULL_SCALE)).mean()),
    }


def _frame_levels_dbfs(wav_S: np.ndarray) -> np.ndarray:
    """Root-mean-square levels [N] in decibels against full scale; the last frame may be shorter."""
    starts_N = np.arange(0, len(wav_S), round(FRAME_SEC * SAMPLE_RATE_HZ))
    num_samples_N = np.diff(np.append(starts_N, len(wav_S)))
    power_N = np.add.reduceat(wav_S**2, starts_N) / num_samples_N
    return 10 * np.log10(np.maximum(power_N, 1e-20))
