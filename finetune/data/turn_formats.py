"""What the projects around CSM write as training data, recognised by its content.

Read are the messages of csm-hf and Hugging Face, the conversations and the preference data of csm-mlx, the metadata
of sesame-finetune in five kinds of file, Hugging Face datasets, and stereo dialogues: moshi-finetune's manifests with
word timestamps and lists of turns with their times.
"""

import csv
import gzip
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from finetune.data.manifest import UNREADABLE, Recording, parse_recording
from finetune.data.turn_dialogues import CHANNELS
from finetune.data.turn_records import (
    MAX_SHOWN,
    AudioRef,
    Entry,
    ListedConversation,
    ListedTurn,
    Place,
    is_missing,
    parse_audio,
    parse_path,
    parse_speaker,
    parse_text,
    parse_turn,
)
from finetune.data.turn_tables import (
    HUB,
    Row,
    csv_rows,
    dataset_entries,
    hdf_rows,
    is_saved_dataset,
    parquet_rows,
    sqlite_rows,
)
from finetune.errors import UserError

logger = logging.getLogger("parley")

_SQLITE, _PARQUET, _HDF, _GZIP = b"SQLite format 3\0", b"PAR1", b"\x89HDF\r\n\x1a\n", b"\x1f\x8b"
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_DATA_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", ".sql", ".sqlite", ".db", ".hdf5", ".h5")
_AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}
_AUDIO_HEADS = (b"RIFF", b"fLaC", b"OggS", b"ID3\2", b"ID3\3", b"ID3\4")
_ROW_SPEAKER = "999"  # what sesame-finetune's pretokenize.py writes
_TURN_SPEAKER = "0"  # what csm-mlx's datasets take
_SHAPES = "messages, turns, chosen and rejected, segments and preference, text and path, or path and duration"


def read_source(name: str, key: str) -> list[Entry]:
    """All that a file, a folder of files or a dataset lists, in order; nothing of its audio is opened.

    Args:
        name: a path, also `path#split` of a saved dataset, or `hf://owner/name[/config][#split]`.

    Raises:
        UserError: names the key, the file, its line or row, and the remedy.
    """
    try:
        entries = _read_any(name, key)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or type(error).__name__}); mend the path"
        raise UserError(f"{key}: {name[:MAX_SHOWN]}: {problem}") from error
    if not entries:
        raise UserError(f"{key}: {name}: lists no conversation; each has {_SHAPES}")
    return entries


def _read_any(name: str, key: str) -> list[Entry]:
    path = Path(name)
    saved = path if path.exists() else Path(name.partition("#")[0])
    if name.startswith(HUB) or is_saved_dataset(saved):
        return dataset_entries(name, key)
    if path.is_dir():
        return [entry for file in _files_below(path, key) for entry in _read_file(file, key)]
    if path.exists():
        return _read_file(path, key)
    raise UserError(f"{key}: {path}: no such file or folder; give a file, a folder of files or {HUB}owner/name")


def _files_below(folder: Path, key: str) -> list[Path]:
    """The data files of a folder; a `.json` beside an audio file of its name is a transcript."""
    below = sorted(path for path in folder.rglob("*") if path.is_file())
    dataset = next((path.parent for path in below if is_saved_dataset(path.parent)), None)
    if dataset is not None:
        raise UserError(f"{key}: {folder}: holds a saved Hugging Face dataset; give the dataset's own folder {dataset}")
    recordings = {path.with_suffix("") for path in below if path.suffix.lower() in _AUDIO_SUFFIXES}
    files = [
        path
        for path in below
        if path.name.lower().endswith(_DATA_SUFFIXES)
        and not (path.suffix.lower() == ".json" and path.with_suffix("") in recordings)
    ]
    if not files:
        raise UserError(f"{key}: {folder}: no data file below this folder; wanted are {', '.join(_DATA_SUFFIXES)}")
    return files


def _read_file(path: Path, key: str) -> list[Entry]:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read ({error.strerror}); mend the path") from error
    if path.suffix.lower() in _AUDIO_SUFFIXES or head.startswith(_AUDIO_HEADS):
        remedy = "give a list of turns that names it, such as a CSV file with the columns text,path"
        raise UserError(f"{key}: {path}: is an audio file, without the words that are said; {remedy}")
    if head.startswith(_SQLITE):
        return _read_rows(sqlite_rows(path, key), path, key)
    if head.startswith(_HDF):
        return _read_rows(hdf_rows(path, key), path, key)
    if head.startswith(_PARQUET):
        rows = parquet_rows(path, key)
        return dataset_entries(str(path), key) if rows is None else _read_rows(rows, path, key)
    return _read_text(path, key)


def _read_text(path: Path, key: str) -> list[Entry]:
    try:
        with _open_text(path) as lines:
            first = next((line.strip() for line in lines if line.strip()), "")
            lines.seek(0)
            if not first.startswith(("[", "{")):
                return _read_rows(csv_rows(lines, path, key), path, key)
            is_by_line = first.startswith("{") and _is_json(first)
            values = _json_lines(lines, path, key) if is_by_line else _json_whole(lines.read(), path, key)
            return _read_rows(values, path, key)
    except (*UNREADABLE, csv.Error) as error:
        raise UserError(f"{key}: {path}: cannot be read ({error}); write it anew as UTF-8 text") from error


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with path.open("rb") as file:
        is_packed = file.read(2) == _GZIP
        file.seek(0)
        # A mark at the start (utf-8-sig) is what spreadsheet programs write before CSV.
        with io.TextIOWrapper(gzip.open(file) if is_packed else file, encoding="utf-8-sig", newline="") as lines:
            yield lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(lines: TextIO, path: Path, key: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = f"not a JSON object in {line.strip()!r:.80}; write one object a line"
                raise UserError(f"{key}: {path} line {number}: {problem}") from error


def _json_whole(text: str, path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """The items of one list, or one object, over any number of lines."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}); mend the line, or write one object a line"
        if error.msg == "Extra data":
            shapes = 'one object a line, such as {"turns": […]}, or one list of all conversations'
            problem = f"more JSON behind the first {'list' if text.lstrip()[0] == '[' else 'object'}; write {shapes}"
        raise UserError(f"{key}: {path} line {error.lineno}: {problem}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path}: cannot be read as JSON ({error}); write one object a line") from error
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"item {number}", item


def _read_rows(rows: Iterator[Row] | Iterator[tuple[str, Any]], path: Path, key: str) -> list[Entry]:
    entries: list[Entry] = []
    num_rejected = 0
    for where, row in rows:
        entry, is_rejecting = parse_entry(row, Place(key, f"{path} {where}", str(path.parent)))
        num_rejected += is_rejecting
        if entry is not None:
            entries.append(entry)
    if num_rejected:
        said = f"preference data: {num_rejected} rejected conversations are left out, the others are trained on"
        logger.warning("warning: %s: %s: %s", key, path, said)
    return entries


def parse_entry(entry: Any, place: Place) -> tuple[Entry | None, bool]:
    """One line, item or row as what its content says it is; and whether it brought a rejected conversation.

    Raises:
        UserError: it is none of the known shapes, or a part of it is wrong.
    """
    if isinstance(entry, list):
        return _turns(entry, place), False
    if not isinstance(entry, dict):
        raise place.error(f"{entry!r:.80} is no conversation; write {_SHAPES}")
    if "messages" in entry:
        return _messages(entry, place), False
    if "chosen" in entry:
        return _turns(entry["chosen"], place), "rejected" in entry
    if "segments" in entry:
        is_preferred = _preference(entry, place)
        return (_turns(entry["segments"], place) if is_preferred else None), not is_preferred
    if "turns" in entry:
        return _stereo_turns(entry, place), False
    if "text" in entry and {"path", "audio_path", "audio"} & entry.keys():
        return ListedConversation((parse_turn(entry, place, _ROW_SPEAKER, is_row=True),), place.name), False
    if "path" in entry and "duration" in entry:
        return _recording(entry, place), False
    found = ", ".join(map(str, entry)) or "nothing"
    raise place.error(f"has {found}; a conversation has {_SHAPES}")


def _recording(entry: dict[str, Any], place: Place) -> Recording:
    """moshi-finetune's manifests: a stereo dialogue whose transcript lies beside it."""
    path, duration = parse_path(entry["path"], place), entry["duration"]
    try:
        return parse_recording(path, duration, Path(place.folder), place.name, place.key)
    except OverflowError as error:
        raise place.error(f"duration is {duration!r:.80}; write seconds") from error


def _turns(turns: Any, place: Place) -> ListedConversation:
    """csm-mlx: a list of turns with `text`, `audio_path` and `speaker` or `speaker_id`."""
    if not isinstance(turns, list):
        raise place.error(f"{turns!r:.80} is not a list of turns")
    listed = [parse_turn(turn, place.within(f"turn {number}"), _TURN_SPEAKER) for number, turn in enumerate(turns, 1)]
    return ListedConversation(tuple(listed), place.name)


def _preference(entry: dict[str, Any], place: Place) -> bool:
    preference = entry.get("preference")
    if preference not in (1, -1):
        raise place.error(f"preference is {preference!r:.80}; write 1 or -1")
    return preference == 1


def _messages(entry: dict[str, Any], place: Place) -> ListedConversation:
    """csm-hf and Hugging Face: messages of text and audio items, and a mask that says which are trained."""
    messages, mask = entry["messages"], entry.get("training_mask")
    if not isinstance(messages, list):
        raise place.error(f"messages is {messages!r:.80}; write a list of messages")
    if mask is None:
        mask = [True] * len(messages)
    if not isinstance(mask, list) or len(mask) != len(messages) or not all(each in (True, False) for each in mask):
        raise place.error(f"training_mask is {mask!r:.80}; write true or false for each of {len(messages)} messages")
    listed = [
        _message(message, bool(is_trained), place.within(f"message {number}"))
        for number, (message, is_trained) in enumerate(zip(messages, mask, strict=True), 1)
    ]
    return ListedConversation(tuple(listed), place.name)


def _message(message: Any, is_trained: bool, place: Place) -> ListedTurn:
    if not isinstance(message, dict) or is_missing(message.get("role")):
        raise place.error(f'{message!r:.80} is no message; write {{"role": "speaker_0", "content": […]}}')
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise place.error(f"content is {content!r:.80}; write a list of text and audio items")
    unknown = [item.get("type") for item in items if item.get("type") not in ("text", "audio")]
    if unknown:
        raise place.error(f"a content item has the type {unknown[0]!r:.80}; write text or audio")
    audio = [_audio_item(item, place) for item in items if item["type"] == "audio"]
    if len(audio) > 1:
        raise place.error(f"has {len(audio)} audio files; write a message for each")
    given = [item.get("text") for item in items if item["type"] == "text"]
    # Audio whose words nobody wrote down is context; a text item that holds nothing and stands alone is a mistake.
    texts = [parse_text(text, place) for text in given if not is_missing(text) or (text is None and not audio)]
    speaker = parse_speaker(message["role"], place)
    return ListedTurn(" ".join(texts), speaker, audio[0] if audio else None, is_trained and bool(texts))


def _audio_item(item: dict[str, Any], place: Place) -> AudioRef:
    path = next((item[name] for name in ("url", "path", "audio") if not is_missing(item.get(name))), None)
    if path is None:
        raise place.error('an audio item has no path; write {"type": "audio", "path": "a.wav"}, or leave it out')
    return parse_audio(path, item, place)


def _stereo_turns(entry: dict[str, Any], place: Place) -> ListedConversation:
    """A stereo file with a list of turns and their times: speaker 0 on the left, 1 on the right."""
    audio, turns = entry.get("audio", entry.get("path")), entry["turns"]
    if is_missing(audio):
        return _turns(turns, place)
    if not isinstance(turns, list):
        raise place.error(f"turns is {turns!r:.80}; write a list of turns")
    return ListedConversation(
        tuple(_stereo_turn(audio, turn, place.within(f"turn {number}")) for number, turn in enumerate(turns, 1)),
        place.name,
    )


def _stereo_turn(audio: Any, entry: Any, place: Place) -> ListedTurn:
    turn = parse_turn({**entry, "path": audio} if isinstance(entry, dict) else entry, place, default_speaker="")
    if turn.speaker not in CHANNELS:
        raise place.error(f"speaker is {turn.speaker!r:.80}; write 0 (left channel) or 1 (right channel)")
    if turn.audio is None or turn.audio.end_sec is None:
        raise place.error("no end; write start and end in seconds")
    return replace(turn, audio=replace(turn.audio, channel=CHANNELS[turn.speaker]))
