"""Figures of clips: made ones with known answers, and real speech."""

import numpy as np
import pytest
import sphn

from conftest import QUICKSTART
from finetune.judge import judge

FRAME = 1920


def tone(num_frames: int, peak: float) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * 200 * np.arange(num_frames * FRAME) / 24_000)).astype(np.float32)


def test_figures_of_a_known_clip():
    wav_S = np.concatenate([tone(6, 0.5), np.zeros(2 * FRAME, np.float32), tone(4, 0.001)])
    figures = judge(wav_S, ended=True)
    assert figures["length_sec"] == pytest.approx(12 * 0.08)
    assert figures["silent_share"] == pytest.approx(6 / 12)  # 0.001 is 63 dB below full scale
    assert figures["peak"] == pytest.approx(0.5, abs=1e-3)
    assert (figures["ended"], figures["clipped_share"]) == (1.0, 0.0)


@pytest.mark.parametrize(("level_dbfs", "share"), [(-49.9, 0.0), (-50.1, 1.0)])
def test_silence_is_below_50_decibels(level_dbfs, share):
    wav_S = np.full(5 * FRAME, 10 ** (level_dbfs / 20), np.float32)
    assert judge(wav_S, ended=True)["silent_share"] == share


def test_a_last_short_frame_counts_by_its_own_length():
    wav_S = np.concatenate([np.zeros(FRAME, np.float32), np.full(100, 0.01, np.float32)])
    figures = judge(wav_S, ended=False)
    assert (figures["silent_share"], figures["ended"]) == (0.5, 0.0)


def test_clipped_samples_and_what_is_no_number():
    wav_S = tone(1, 0.3)
    wav_S[:4] = [1.0, -1.0, 3.0, np.nan]
    assert judge(wav_S, ended=True)["clipped_share"] == pytest.approx(4 / FRAME)
    assert np.isnan(judge(wav_S, ended=True)["peak"])


def test_an_empty_clip():
    assert judge(np.zeros(0, np.float32), ended=True) == {
        "length_sec": 0.0,
        "silent_share": 1.0,
        "ended": 1.0,
        "peak": 0.0,
        "clipped_share": 0.0,
    }


def test_real_speech_is_neither_silent_nor_clipped():
    wav_CS, _ = sphn.read(QUICKSTART / "dialogues" / "audio" / "dialogue_001.flac", sample_rate=24_000)
    both_sides = judge(wav_CS.sum(0), ended=True)
    assert 0.02 < both_sides["silent_share"] < 0.3
    assert both_sides["clipped_share"] == 0.0
    assert 0.3 < judge(wav_CS[0], ended=True)["silent_share"] < 0.8  # the other speaks meanwhile
