"""Audio of any rate and format arrives at 24 kHz, on time and undistorted."""

from pathlib import Path

import numpy as np
import pytest
import sphn

from finetune.data.audio import read_window
from finetune.data.types import SAMPLE_RATE_HZ

ASSETS = Path(__file__).parent / "assets"


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("start_sec", [0.0, 1.5])
def test_a_click_stays_where_it_was(rate_hz, start_sec, tmp_path):
    """sphn's resampler alone is up to 64 ms late: nearly a frame, by which words would lead the audio."""
    wav_S = np.zeros(4 * rate_hz, dtype=np.float32)
    clicks = [half_second * rate_hz // 2 for half_second in range(8)]
    wav_S[clicks] = 0.9
    path = tmp_path / "clicks.wav"
    sphn.write_wav(str(path), wav_S, rate_hz)
    window_S = read_window(path, start_sec, 2.0)[0]
    assert len(window_S) == 2 * SAMPLE_RATE_HZ
    for half_second in (1, 2, 3):
        click_sec = clicks[half_second + round(2 * start_sec)] / rate_hz
        around = round((click_sec - start_sec) * SAMPLE_RATE_HZ)
        peak = around - 1200 + int(np.abs(window_S[around - 1200 : around + 1200]).argmax())
        assert abs(peak - around) <= 2


@pytest.mark.parametrize("name", ["tone.mp3", "tone.ogg"])
def test_compressed_formats_keep_channels_and_pitch(name):
    """A second and a half of 440 Hz on the left and 880 Hz on the right, at 44.1 kHz (made with sox)."""
    wav_CS = read_window(ASSETS / name, 0.25, 1.0)
    assert wav_CS.shape == (2, SAMPLE_RATE_HZ)
    assert wav_CS.dtype == np.float32
    for channel, pitch_hz in zip(wav_CS, (440, 880), strict=True):
        spectrum = np.abs(np.fft.rfft(channel * np.hanning(len(channel))))
        assert abs(int(spectrum.argmax()) - pitch_hz) <= 1


def test_the_end_of_a_file_is_kept(tmp_path):
    wav_S = np.full(48_000, 0.5, dtype=np.float32)
    path = tmp_path / "flat.wav"
    sphn.write_wav(str(path), wav_S, 16_000)
    window_S = read_window(path, 1.0, 5.0)[0]
    assert len(window_S) == 2 * SAMPLE_RATE_HZ
    assert abs(window_S[-100:].mean() - 0.5) < 0.3
