"""Word-timestamp files: moshi-finetune's `alignments` and J-Moshi's word lists."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.data.types import SAMPLE_RATE_HZ, BadRecording, Word

MAIN_SPEAKER = "SPEAKER_MAIN"  # the left channel
OTHER_SPEAKER = "SPEAKER_OTHER"
# nu-dialogue/moshi-finetune calls the left channel's speaker A and the right one's B.
_DIALOGUE_SPEAKERS = {"A": MAIN_SPEAKER, "B": OTHER_SPEAKER}


@dataclass(frozen=True)
class Transcript:
    words: Sequence[Word]
    """Sorted by start; times count from the start of the recording."""
    conditions: dict[str, str]

    def window(self, start_sec: float, duration_sec: float) -> list[Word]:
        """The words that start inside a window, with times from the window's start."""
        start = round(start_sec * SAMPLE_RATE_HZ)  # in samples, as windows are cut: sums of seconds drift
        stop = start + round(duration_sec * SAMPLE_RATE_HZ)
        return [
            Word(word.text, word.start_sec - start_sec, word.end_sec - start_sec, word.speaker)
            for word in self.words
            if start <= round(word.start_sec * SAMPLE_RATE_HZ) < stop
        ]


@lru_cache(maxsize=4096)
def read_transcript(audio_path: Path) -> Transcript:
    """Read the `.json` beside a recording.

    Raises:
        BadRecording: the message says what is wrong and what to do.
    """
    path = audio_path.with_suffix(".json")
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadRecording(f"no transcript {path.name} beside it; annotate the recording") from error
    except (OSError, ValueError) as error:
        raise BadRecording(f"transcript {path.name} cannot be read ({error}); annotate it anew") from error
    try:
        words, conditions = _parse(raw)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        shape = '{"alignments": [["hello", [0.46, 0.81], "SPEAKER_MAIN"], …]}'
        problem = f"transcript {path.name} is not understood ({type(error).__name__}: {error})"
        raise BadRecording(f"{problem}; expected {shape}") from error
    return Transcript(sorted(words, key=lambda word: word.start_sec), conditions)


def _parse(raw: Any) -> tuple[list[Word], dict[str, str]]:
    if isinstance(raw, list):
        words = [
            Word(_text(entry["word"]), _time(entry["start"]), _time(entry["end"]), _speaker(entry["speaker"]))
            for entry in raw
        ]
        return words, {}
    words = [
        Word(_text(text), _time(start), _time(end), _speaker(speaker))
        for text, (start, end), speaker in raw["alignments"]
    ]
    conditions = raw.get("text_conditions") or {}
    return words, {_text(name): _text(value) for name, value in conditions.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _time(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not a time")
    return float(value)


def _speaker(label: Any) -> str:
    return _DIALOGUE_SPEAKERS.get(label, _text(label))
