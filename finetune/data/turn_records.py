"""Conversations as their files list them: nothing is opened, measured or decoded yet."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from finetune.data.manifest import Recording
from finetune.errors import UserError

MAX_SHOWN = 300
"""Characters of a path in a message; one that is too long for the file system has thousands."""
# moshi-finetune's labels, as turn_dialogues.CHANNELS numbers them.
_DIALOGUE_SPEAKERS = {"SPEAKER_MAIN": "0", "SPEAKER_USER": "1", "SPEAKER_OTHER": "1"}
_WHOLE_NUMBER = re.compile(r"(-?[0-9]+)(\.0*)?")
_ROLE_PREFIX = "speaker_"  # csm-hf's roles are speaker_0, speaker_1, …


@dataclass(frozen=True, slots=True)
class AudioRef:
    """Where the audio of a turn is said to lie."""

    path: str
    """A file as it is written there, or the name of a table whose rows embed audio."""
    folder: str = ""
    """What a relative path counts from."""
    start_sec: float = 0.0
    end_sec: float | None = None
    """None: to the end of the file."""
    channel: int | None = None
    """None: the mean of all channels."""
    row: int | None = None
    """Which row of a table; None where `path` is an audio file."""


@dataclass(frozen=True, slots=True)
class ListedTurn:
    text: str
    speaker: str
    audio: AudioRef | None
    is_trained: bool = True
    """False where the file's own mask makes the turn context, or nobody wrote down what is said."""


@dataclass(frozen=True, slots=True)
class ListedConversation:
    turns: tuple[ListedTurn, ...]
    place: str
    """Where it is listed, such as `talks.jsonl line 7`."""


Entry = ListedConversation | Recording
"""What a source lists. A Recording is a stereo dialogue whose words lie beside it; they are read later, by threads."""


@dataclass(frozen=True)
class Place:
    """Where something is written, for messages."""

    key: str
    name: str
    folder: str

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.key}: {self.name}: {problem}")

    def within(self, what: str) -> "Place":
        return Place(self.key, f"{self.name} {what}", self.folder)


def parse_turn(entry: Any, place: Place, default_speaker: str, *, is_row: bool = False) -> ListedTurn:
    """A turn or row: `text`, audio under `path`, `audio_path` or `audio`, and optional times and speaker.

    Args:
        is_row: the turn is its whole conversation and must have a text; elsewhere audio without one is context.

    Raises:
        UserError: something that is there is not what it should be.
    """
    if not isinstance(entry, dict):
        raise place.error(f'not a turn: {entry!r:.80}; write {{"text": "Hello.", "path": "a.wav", "speaker": 0}}')
    path = next((entry[name] for name in ("path", "audio_path", "audio") if not is_missing(entry.get(name))), None)
    is_untold = is_missing(entry.get("text")) and path is not None and not is_row
    return ListedTurn(
        text="" if is_untold else parse_text(entry.get("text"), place),
        speaker=_speaker_of(entry, place, default_speaker),
        audio=None if path is None else parse_audio(path, entry, place),
        is_trained=not is_untold,
    )


def parse_audio(path: Any, times: dict[str, Any], place: Place) -> AudioRef:
    """Audio at a path, between `start` and `end` (or for `duration` from `start` on) in seconds where given."""
    path = parse_path(path, place)
    start_sec = _seconds(times, "start", place)
    end_sec = _seconds(times, "end", place)
    if start_sec is not None and end_sec is None:
        duration_sec = _seconds(times, "duration", place)
        end_sec = None if duration_sec is None else start_sec + duration_sec
    return AudioRef(path.removeprefix("file://"), place.folder, start_sec or 0.0, end_sec)


def parse_path(value: Any, place: Place) -> str:
    """A path as the file system can take it; names that are no UTF-8 keep the surrogates that Python gives them."""
    if not isinstance(value, str):
        raise place.error(f"path {value!r:.80} is not text; write the path of an audio file")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise _half_character("path", error, place) from error
    return value


def parse_text(value: Any, place: Place) -> str:
    """The words of a turn, at least one."""
    if not isinstance(value, str) or is_missing(value):
        raise place.error(f"text is {value!r:.80}; write the words of the turn as text")
    return _encodable(value, "text", place)


def parse_speaker(value: Any, place: Place) -> str:
    """A speaker or role under the one name that `speaker_label` gives it."""
    if isinstance(value, str) and value.strip():
        return speaker_label(_encodable(value, "speaker", place))
    if _is_whole(value):
        return str(int(value))
    raise place.error(f"speaker is {value!r:.80}; write a number or a name")


def _is_whole(value: Any) -> bool:
    """Whether this is a whole number; tables with gaps make floats of them, such as 30.0."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
    except OverflowError:
        return False  # what no float can hold names nobody


def speaker_label(name: str) -> str:
    """The one name of a speaker, however it is spelled: `0`, `0.0`, `speaker_0` and `SPEAKER_MAIN` are the same."""
    label = name.strip()
    label = _DIALOGUE_SPEAKERS.get(label, label.removeprefix(_ROLE_PREFIX) or label)
    number = _WHOLE_NUMBER.fullmatch(label)
    return number[1] if number else label


def _encodable(text: str, name: str, place: Place) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _half_character(name, error, place) from error
    return text


def _half_character(name: str, error: UnicodeEncodeError, place: Place) -> UserError:
    half = error.object[error.start]
    return place.error(f"{name} holds {half!r}, half of a character (a lone surrogate); write the whole character")


def _speaker_of(entry: dict[str, Any], place: Place, default: str) -> str:
    for name in ("speaker", "speaker_id"):
        if not is_missing(entry.get(name)):
            return parse_speaker(entry[name], place)
    return default


def _seconds(entry: dict[str, Any], name: str, place: Place) -> float | None:
    value: Any = entry.get(name)
    if is_missing(value):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        seconds = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise place.error(f"{name} is {value!r:.80}; write seconds") from error
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise place.error(f"{name} is {value!r:.80}; write seconds from the start of the file")
    return seconds


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, a blank text, or pandas' NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
