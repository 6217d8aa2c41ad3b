"""Reading windows of audio files at 24 kHz."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sphn

from finetune.data.types import SAMPLE_RATE_HZ, BadRecording

# -80 dB of full scale: below the noise of any microphone, above dither.
SILENCE_PEAK = 1e-4
# Headers of compressed files count whole packets; the longest packets of MP3 and Vorbis last less than this.
_MISSING_SLACK_SEC = 0.05


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    num_channels: int
    num_samples: int
    """Counted at 24 kHz."""


def read_header(path: Path) -> Header:
    """Length and channels of an audio file, without decoding it where its header tells.

    Raises:
        BadRecording: the file is missing or of a kind that cannot be decoded.
    """
    if not path.is_file():
        raise BadRecording("no such file; mend the path or remove the entry")
    try:
        reader = sphn.FileReader(str(path))
        length_sec = reader.duration_sec or reader.decode_all().shape[-1] / reader.sample_rate
    except Exception as error:  # sphn raises bare exceptions of several kinds
        raise BadRecording(_undecodable(path, error)) from error
    return Header(reader.channels, round(length_sec * SAMPLE_RATE_HZ))


def read_span(path: Path, start: int, num_samples: int) -> np.ndarray:
    """Exactly `num_samples` float32 samples [C, S] from sample `start` on, both counted at 24 kHz.

    Raises:
        BadRecording: the file cannot be decoded or ends earlier than that.
    """
    # Half a sample later and a little longer, so that no rounding down to the file's own rate takes a sample away.
    wav_CS = _decode(path, (start + 0.5) / SAMPLE_RATE_HZ, (num_samples + 4) / SAMPLE_RATE_HZ)[:, :num_samples]
    missing = num_samples - wav_CS.shape[-1]
    if missing > _MISSING_SLACK_SEC * SAMPLE_RATE_HZ:
        ends_sec = (start + wav_CS.shape[-1]) / SAMPLE_RATE_HZ
        raise BadRecording(f"ends at {ends_sec:.2f} s, before its header says; convert it to WAV or FLAC anew")
    return np.pad(wav_CS, ((0, 0), (0, missing)))


def is_silent(wav_S: np.ndarray) -> bool:
    return bool(np.abs(wav_S).max(initial=0.0) < SILENCE_PEAK)


def read_window(path: Path, start_sec: float, duration_sec: float) -> np.ndarray:
    """Float32 samples [C, S] at 24 kHz; shorter than asked for where the file ends.

    Raises:
        BadRecording: the file is missing or cannot be decoded, or its main (left) channel is silent throughout.
    """
    wav_CS = _decode(path, start_sec, duration_sec)
    if wav_CS.shape[-1] == 0:
        raise BadRecording(f"has no audio at {start_sec} s; make the manifest anew with scripts/make_manifest.py")
    if is_silent(wav_CS[0]) and is_silent_throughout(path):
        raise BadRecording("the model's (left) channel is silent throughout; swap the channels or remove the line")
    return wav_CS


@lru_cache(maxsize=65536)
def is_silent_throughout(path: Path) -> bool:
    """Whether the left channel never rises above SILENCE_PEAK. Asked only once a window was silent."""
    return is_silent(_decode(path)[0])


def _decode(path: Path, start_sec: float | None = None, duration_sec: float | None = None) -> np.ndarray:
    try:
        wav_CS, rate_hz = sphn.read(str(path), start_sec=start_sec, duration_sec=duration_sec)
        if rate_hz != SAMPLE_RATE_HZ and wav_CS.shape[-1]:  # sphn panics over nothing
            wav_CS = _resample(wav_CS, rate_hz)
    except Exception as error:  # sphn raises bare exceptions of several kinds
        raise BadRecording(_undecodable(path, error)) from error
    if duration_sec is not None:
        wav_CS = wav_CS[:, : round(duration_sec * SAMPLE_RATE_HZ)]
    return np.ascontiguousarray(wav_CS, dtype=np.float32)


def _undecodable(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"cannot be decoded (no such file: {error}); convert it to WAV or FLAC"
    with path.open("rb") as file:
        is_opus = b"OpusHead" in file.read(128)  # in the first page of Ogg (RFC 7845, section 5.1)
    reason = "it is Opus, which sphn does not read" if is_opus else error
    return f"cannot be decoded ({reason}); convert it to WAV or FLAC"


def _resample(wav_CS: np.ndarray, rate_hz: int) -> np.ndarray:
    """To 24 kHz, without the delay of sphn's resampler, by which words would lead the audio."""
    delay = _resampler_delay(rate_hz)
    num_samples = round(wav_CS.shape[-1] * SAMPLE_RATE_HZ / rate_hz)
    tail = -(-delay * rate_hz // SAMPLE_RATE_HZ)  # pushes the last `delay` samples out of the filter
    padded_CS = np.pad(wav_CS, ((0, 0), (0, tail)))
    return sphn.resample(padded_CS, rate_hz, SAMPLE_RATE_HZ)[:, delay : delay + num_samples]


@lru_cache
def _resampler_delay(rate_hz: int) -> int:
    """Samples at 24 kHz by which sphn's resampler is late (64 ms from 8 kHz, 12 ms from 44.1 kHz in sphn 0.2.1)."""
    impulse_1S = np.zeros((1, rate_hz), dtype=np.float32)
    impulse_1S[0, rate_hz // 2] = 1.0
    peak = int(np.abs(sphn.resample(impulse_1S, rate_hz, SAMPLE_RATE_HZ)[0]).argmax())
    return max(0, round(peak - rate_hz // 2 * SAMPLE_RATE_HZ / rate_hz))
