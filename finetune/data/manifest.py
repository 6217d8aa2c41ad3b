"""Manifests: which recordings there are, where their transcripts lie, and what is wrong with them."""

import gzip
import json
import logging
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sphn

from finetune.data.transcript import read_transcript
from finetune.data.types import BadRecording
from finetune.errors import UserError

logger = logging.getLogger("parley")

# A manifest may round a file's length. Less than a frame, so that no window can start past the end of its file.
DURATION_SLACK_SEC = 0.05
MAKE_MANIFEST = "make the manifest anew with scripts/make_manifest.py"
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)
"""What reading a text file, gzip or not, may raise."""


@dataclass(frozen=True)
class Recording:
    path: Path
    duration_sec: float
    place: str
    """Where it is listed, such as `talks.jsonl line 7`."""


@dataclass(frozen=True)
class Source:
    name: str
    weight: float
    recordings: Sequence[Recording]


def read_sources(spec: str, key: str) -> list[Source]:
    """Read `path[:weight],path[:weight]`; a path is a manifest or a folder with manifests below it.

    Weights are normalised to a sum of 1. Relative audio paths count from their manifest's folder, as in
    moshi-finetune.

    Raises:
        UserError: names the key, the manifest, its line and the remedy.
    """
    return [Source(name, weight, _read_source(Path(name), key)) for name, weight in split_spec(spec, key)]


def split_spec(spec: str, key: str) -> list[tuple[str, float]]:
    """The sources of `path[:weight],path[:weight]`, with weights that sum to 1."""
    parsed = [_split_weight(part.strip(), key) for part in spec.split(",") if part.strip()]
    if not parsed:
        raise UserError(f"{key}: {spec!r} names no source; give a manifest (.jsonl) or a folder of them")
    total = sum(weight for _, weight in parsed)
    return [(name, weight / total) for name, weight in parsed]


def _split_weight(part: str, key: str) -> tuple[str, float]:
    name, colon, tail = part.rpartition(":")
    if not colon:
        return part, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return part, 1.0  # a colon of the path itself
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"{key}: {part}: weight {tail} is not positive; leave a source out to switch it off")
    return name, weight


def _read_source(path: Path, key: str) -> list[Recording]:
    if path.is_dir():
        manifests = sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
        if not manifests:
            raise UserError(f"{key}: {path}: no .jsonl below this folder; {MAKE_MANIFEST}")
    elif path.exists():
        manifests = [path]
    else:
        raise UserError(f"{key}: {path}: no such file or folder; give a manifest (.jsonl) or a folder of them")
    recordings = [recording for manifest in manifests for recording in _read_manifest(manifest, key)]
    if not recordings:
        raise UserError(f"{key}: {path}: lists no recording; {MAKE_MANIFEST}")
    return recordings


def _read_manifest(path: Path, key: str) -> list[Recording]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    except UNREADABLE as error:
        raise UserError(f"{key}: {path}: cannot be read ({error}); {MAKE_MANIFEST}") from error
    return [_parse_line(line, path, f"{path} line {number}", key) for number, line in numbered]


def _parse_line(line: str, manifest: Path, place: str, key: str) -> Recording:
    try:
        entry = json.loads(line)
        audio, duration = entry["path"], entry["duration"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else "not a JSON object"
        shape = '{"path": "a.wav", "duration": 12.3}'
        raise UserError(f"{key}: {place}: {problem} in {line.strip()!r:.80}; write {shape}") from error
    return parse_recording(audio, duration, manifest.parent, place, key)


def parse_recording(audio: Any, duration: Any, folder: Path, place: str, key: str) -> Recording:
    """A manifest's entry, checked."""
    if not isinstance(audio, str) or isinstance(duration, bool) or not isinstance(duration, (int, float)):
        raise UserError(f"{key}: {place}: path must be text and duration seconds; {MAKE_MANIFEST}")
    if not (duration > 0 and math.isfinite(duration)):
        raise UserError(f"{key}: {place}: duration is {duration}; {MAKE_MANIFEST}")
    return Recording(folder / audio, float(duration), place)


def check_recording(recording: Recording, min_channels: int, min_duration_sec: float) -> str | None:
    """What headers and transcripts already tell to be wrong with a recording; None if nothing."""
    try:
        if not recording.path.is_file():
            raise BadRecording("no such file; mend the path or remove the line")
        read_transcript(recording.path)
        try:
            reader = sphn.FileReader(str(recording.path))
        except Exception as error:  # sphn raises bare exceptions of several kinds
            raise BadRecording(f"cannot be decoded ({error}); convert it to WAV or FLAC") from error
        length_sec = reader.duration_sec
        check_channels(reader.channels, min_channels)
        if min(length_sec or recording.duration_sec, recording.duration_sec) < min_duration_sec:
            raise BadRecording(f"shorter than one frame ({min_duration_sec} s); remove the line")
        if length_sec and length_sec < recording.duration_sec - DURATION_SLACK_SEC:
            said = f"lasts {length_sec:.2f} s, not {recording.duration_sec:.2f} s"
            raise BadRecording(f"{said}; {MAKE_MANIFEST}")
    except OSError as error:
        return f"{recording.place}: {recording.path}: {error.strerror}; mend the path or remove the line"
    except BadRecording as problem:
        return f"{recording.place}: {recording.path}: {problem}"
    return None


def check_channels(num_channels: int, min_channels: int) -> None:
    """Raise BadRecording where channels are missing or cannot be told apart."""
    if num_channels < min_channels:
        wanted = "left is the model's voice, right the user's"
        raise BadRecording(f"mono, but the model hears two speakers; make it stereo: {wanted}")
    if num_channels > 2:
        raise BadRecording(f"has {num_channels} channels; keep two: left the model's voice, right the user's")


def check_recordings(
    recordings: Sequence[Recording], min_channels: int, min_duration_sec: float, num_workers: int
) -> dict[int, str]:
    """`check_recording` of many files at once; the problems by index."""
    with ThreadPoolExecutor(num_workers) as pool:
        problems = pool.map(lambda each: check_recording(each, min_channels, min_duration_sec), recordings)
        return {index: problem for index, problem in enumerate(problems) if problem}


def report_problems(problems: dict[int, str], key: str, on_error: Literal["fail", "skip"]) -> None:
    """Say what is wrong with files: the first one ends the run under `fail`, all are warned of under `skip`."""
    lines = list(problems.values())
    if lines and on_error == "fail":
        more = f" (and {len(lines) - 1} more bad files)" if len(lines) > 1 else ""
        raise UserError(failure(key, lines[0]) + more)
    for line in lines:
        logger.warning("warning: skipped: %s: %s", key, line)


def failure(key: str, line: str) -> str:
    return f"{key}: {line}, or set data.on_error: skip"
