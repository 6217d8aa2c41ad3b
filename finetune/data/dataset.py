"""A dataset: checked recordings, cut into windows, each of which can be read as a Clip."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune import distributed
from finetune.data.audio import read_window
from finetune.data.manifest import (
    DURATION_SLACK_SEC,
    MAKE_MANIFEST,
    Recording,
    Source,
    check_channels,
    check_recordings,
    failure,
    read_sources,
    report_problems,
)
from finetune.data.transcript import MAIN_SPEAKER, read_transcript
from finetune.data.types import SAMPLE_RATE_HZ, BadRecording, Clip
from finetune.errors import UserError

OnError = Literal["fail", "skip"]
logger = logging.getLogger("parley")
_NUM_LABEL_PROBES = 50


@dataclass(frozen=True)
class Window:
    recording: Recording
    start_sec: float


@dataclass(frozen=True)
class WindowDataset:
    """Windows of `duration_sec` of every recording of every source."""

    key: str
    """The configuration key that named the data."""
    duration_sec: float
    min_channels: int
    """1 where the model hears one voice, 2 where it takes part in a dialogue."""
    on_error: OnError
    weights: Sequence[float]
    windows: Sequence[Sequence[Window]]
    """By source."""
    frame_sec: float
    """Length of a frame."""
    num_tail_frames: int
    """Empty frames that a sample has behind its audio, if the window is long enough."""

    @classmethod
    def open(
        cls,
        spec: str,
        key: str,
        *,
        duration_sec: float,
        min_channels: int,
        frame_sec: float,
        on_error: OnError,
        num_workers: int,
        main_speaker_only: bool = False,
        num_tail_frames: int = 0,
    ) -> "WindowDataset":
        """Read manifests and check every file's header and transcript. All ranks must call it together.

        A window that is shorter than a frame, at the end of a file, is left out.

        Raises:
            UserError: a manifest is wrong, a file is bad and `on_error` is `fail`, or nothing is left.
        """
        if duration_sec < frame_sec:
            raise UserError(f"duration_sec: {duration_sec} is shorter than one frame; set {frame_sec} or more")
        sources = read_sources(spec, key)
        recordings = [recording for source in sources for recording in source.recordings]
        # One rank asks the file system, the others are told.
        problems = distributed.on_main_rank(check_recordings, recordings, min_channels, frame_sec, num_workers)
        report_problems(problems, key, on_error)
        if main_speaker_only:
            _warn_without_main_speaker(recordings, key)
        bad = {id(recordings[index]) for index in problems}
        windows = [_cut(source, bad, duration_sec, frame_sec) for source in sources]
        for source, cut in zip(sources, windows, strict=True):
            if not cut:
                raise UserError(f"{key}: {source.name}: no usable recording is left; see the lines above")
        weights = [source.weight for source in sources]
        return cls(key, duration_sec, min_channels, on_error, weights, windows, frame_sec, num_tail_frames)

    @property
    def num_windows(self) -> int:
        return sum(len(windows) for windows in self.windows)

    def read(self, window: Window) -> Clip:
        """Read one window; an empty clip stands for a bad file under `on_error: skip`.

        Raises:
            UserError: the file is bad and `on_error` is `fail`.
        """
        recording = window.recording
        try:
            wav_CS = read_window(recording.path, window.start_sec, self._length_sec(window))
            check_channels(len(wav_CS), self.min_channels)
            if wav_CS.shape[-1] / SAMPLE_RATE_HZ < self._length_sec(window) - DURATION_SLACK_SEC:
                raise BadRecording(f"ends inside the window at {window.start_sec:g} s; {MAKE_MANIFEST}")
            transcript = read_transcript(recording.path)
        except BadRecording as problem:
            fail_or_skip(self.key, f"{recording.place}: {recording.path}: {problem}", self.on_error, recording.path)
            return self.empty_clip()
        return Clip(
            wav_CS=wav_CS,
            words=transcript.window(window.start_sec, self.duration_sec),
            path=str(recording.path),
            start_sec=window.start_sec,
            duration_sec=self.duration_sec,
            conditions=transcript.conditions,
        )

    def empty_clip(self) -> Clip:
        """A window with nothing in it: no code, no weight."""
        silence = np.zeros((self.min_channels, 0), dtype=np.float32)
        return Clip(silence, words=(), path="", start_sec=0.0, duration_sec=self.duration_sec)

    def num_frames(self, window: Window) -> int:
        """Frames of a window's sample: those of its audio and the tail, as far as the window reaches."""
        frame_samples = round(self.frame_sec * SAMPLE_RATE_HZ)
        present, whole = (
            -(-round(seconds * SAMPLE_RATE_HZ) // frame_samples)
            for seconds in (self._length_sec(window), self.duration_sec)
        )
        return min(whole, present + self.num_tail_frames)

    def _length_sec(self, window: Window) -> float:
        return min(self.duration_sec, window.recording.duration_sec - window.start_sec)


def _cut(source: Source, bad: set[int], duration_sec: float, frame_sec: float) -> list[Window]:
    windows = []
    for recording in source.recordings:
        if id(recording) in bad:
            continue
        # Counted in samples: sums of seconds such as 0.1 drift.
        step = round(duration_sec * SAMPLE_RATE_HZ)
        last = round((recording.duration_sec - frame_sec) * SAMPLE_RATE_HZ)
        windows += [Window(recording, start / SAMPLE_RATE_HZ) for start in range(0, last + 1, step)]
    return windows


def fail_or_skip(key: str, line: str, on_error: OnError, name: Any) -> None:
    """Say what reading found: an end of the run under `fail`, one warning for all that has this `name` under `skip`."""
    if on_error == "fail":
        raise UserError(failure(key, line))
    if distributed.once(f"bad data {name}"):
        logger.error("warning: skipped: %s: %s", key, line)


def _warn_without_main_speaker(recordings: Sequence[Recording], key: str) -> None:
    """Say so where the labels look like someone else's: the text stream would be empty without a word."""
    labels: set[str] = set()
    for recording in recordings[:_NUM_LABEL_PROBES]:
        try:
            labels |= {word.speaker for word in read_transcript(recording.path).words}
        except BadRecording:
            continue  # reported already
    if labels and MAIN_SPEAKER not in labels:
        said = ", ".join(sorted(labels))
        remedy = f"label the left channel's words {MAIN_SPEAKER} or set model.keep_main_only: false"
        logger.warning("warning: %s: no word is labelled %s (labels: %s); %s", key, MAIN_SPEAKER, said, remedy)
