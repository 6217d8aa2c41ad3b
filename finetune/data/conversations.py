"""A dataset of conversations: checked turns, cut into windows, each of which can be read as a Conversation.

Lengths of audio are counted in samples at 24 kHz, those of windows in positions of the model: the text of a turn, its
frames of audio (the last one may be partly filled) and one frame that ends the speech, unless the audio is cut off.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from finetune import distributed
from finetune.data.audio import Header, is_silent, read_header, read_span
from finetune.data.dataset import OnError, fail_or_skip
from finetune.data.manifest import DURATION_SLACK_SEC, MAKE_MANIFEST, Recording, report_problems, split_spec
from finetune.data.turn_dialogues import dialogue_turns
from finetune.data.turn_formats import read_source
from finetune.data.turn_records import MAX_SHOWN, AudioRef, Entry, ListedConversation, ListedTurn, speaker_label
from finetune.data.turn_tables import open_dataset
from finetune.data.types import SAMPLE_RATE_HZ, BadRecording, Conversation, Turn
from finetune.errors import UserError

logger = logging.getLogger("parley")
_NO_AUDIO = np.zeros(0, dtype=np.float32)
_TRAINING_KEY = "data.train_data"

Located = list[tuple[ListedTurn, "AudioSpan | None"]]
"""A conversation's turns, each with its audio where it has any."""


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """Audio that a header promises."""

    path: str
    """An audio file, or the name of a table whose row embeds it."""
    row: int | None
    channel: int | None
    """None: the mean of all channels."""
    start: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class TurnRecord:
    text: str
    speaker: str
    audio: AudioSpan | None
    num_text: int
    num_frames: int
    """All its positions, those of the text included."""
    is_trained: bool
    is_cut: bool


@dataclass(frozen=True, slots=True)
class TurnWindow:
    """Consecutive turns of one conversation."""

    turns: tuple[TurnRecord, ...]
    num_context: int
    """So many turns at the start are trained in an earlier window, or in none."""
    place: str


@dataclass(frozen=True)
class _Rules:
    """How turns are measured and conversations cut."""

    key: str
    max_frames: int
    context_turns: int
    masked: Mapping[str, str]
    """`mask_speaker_ids`: speaker labels, each with its spelling in the configuration."""
    max_samples: int | None
    frame_size: int
    count_text: Callable[[str, str], int]


@dataclass(frozen=True)
class ConversationDataset:
    """Windows of whole turns of every conversation of every source."""

    key: str
    """The configuration key that named the data."""
    on_error: OnError
    weights: Sequence[float]
    windows: Sequence[Sequence[TurnWindow]]
    """By source."""

    @classmethod
    def open(
        cls,
        spec: str,
        key: str,
        *,
        max_frames: int,
        context_turns: int,
        mask_speaker_ids: Sequence[str],
        max_audio_sec: float | None,
        count_text: Callable[[str, str], int],
        frame_sec: float,
        on_error: OnError,
        num_workers: int,
    ) -> "ConversationDataset":
        """Read what the sources list and every file's header. All ranks must call it together.

        Args:
            spec: `source[:weight],source[:weight]`; a source is a file, a folder of files, a saved Hugging Face
                dataset or `hf://owner/name[/config][#split]`.
            max_frames: positions of a window at most.
            context_turns: how many earlier turns a window of a longer conversation begins with.
            mask_speaker_ids: speakers whose turns are context, in any spelling that `speaker_label` knows.
            max_audio_sec: longer audio is cut there.
            count_text: positions of a turn's text, of its speaker and text.

        Raises:
            UserError: a source is wrong, a file is bad and `on_error` is `fail`, a masked speaker says nothing, or
                nothing is left to train on.
        """
        frame_size = round(frame_sec * SAMPLE_RATE_HZ)
        rules = _Rules(
            key=key,
            max_frames=max_frames,
            context_turns=context_turns,
            masked={speaker_label(str(each)): str(each) for each in mask_speaker_ids},
            # At a frame: half a frame of silence in mid-word would be learned.
            max_samples=None if max_audio_sec is None else int(max_audio_sec / frame_sec + 1e-6) * frame_size,
            frame_size=frame_size,
            count_text=count_text,
        )
        # One rank asks the file system, the others are told.
        weights, windows = distributed.on_main_rank(_open_sources, spec, rules, on_error, num_workers)
        return cls(key, on_error, weights, windows)

    @property
    def num_windows(self) -> int:
        return sum(len(windows) for windows in self.windows)

    def num_frames(self, window: TurnWindow) -> int:
        """Positions that reading a window gives."""
        return sum(turn.num_frames for turn in window.turns)

    def read(self, window: TurnWindow) -> Conversation:
        """Read one window; a conversation without turns stands for a bad file under `on_error: skip`.

        Raises:
            UserError: a file is bad and `on_error` is `fail`.
        """
        try:
            turns = [_read_turn(turn, index >= window.num_context) for index, turn in enumerate(window.turns)]
        except BadRecording as problem:
            line = f"{window.place}: {problem}"
            fail_or_skip(self.key, line, self.on_error, line)
            return self.empty_clip()
        return Conversation(turns, window.place)

    def empty_clip(self) -> Conversation:
        """A conversation with nothing in it: no code, no weight."""
        return Conversation((), path="")


def _open_sources(
    spec: str, rules: _Rules, on_error: OnError, num_workers: int
) -> tuple[list[float], list[list[TurnWindow]]]:
    """Weights and windows by source."""
    sources = [(name, weight, read_source(name, rules.key)) for name, weight in split_spec(spec, rules.key)]
    header_of = lru_cache(maxsize=4096)(_read_header)  # many turns may lie in one file
    entries = [entry for _, _, entries in sources for entry in entries]
    with ThreadPoolExecutor(num_workers) as pool:
        located = list(pool.map(lambda entry: _locate_turns(entry, header_of, rules.frame_size), entries))
    problems = {index: turns for index, turns in enumerate(located) if isinstance(turns, str)}
    report_problems(problems, rules.key, on_error)
    _check_masked(entries, located, rules)
    windows: list[list[TurnWindow]] = []
    remaining = iter(zip(entries, located, strict=True))
    for name, _, listed in sources:
        usable = [(entry.place, turns) for entry, turns in (next(remaining) for _ in listed) if isinstance(turns, list)]
        if not usable:
            raise UserError(f"{rules.key}: {name}: no usable conversation is left; see the lines above")
        _tell_audioless([turns for _, turns in usable], f"{rules.key}: {name}")
        windows.append([window for place, turns in usable for window in _windows(turns, place, rules)])
        if not windows[-1]:
            reason = "every turn is without audio or text, masked by training_mask or mask_speaker_ids, or too long"
            raise UserError(f"{rules.key}: {name}: no turn is left to train on: {reason}")
    return [weight for _, weight, _ in sources], windows


def _check_masked(entries: Sequence[Entry], located: Sequence[Located | str], rules: _Rules) -> None:
    """A masked speaker who says nothing is misspelt, and whoever was meant would be trained."""
    listed = [entry.turns for entry in entries if isinstance(entry, ListedConversation)]
    dialogues = [[turn for turn, _ in turns] for turns in located if isinstance(turns, list)]
    speakers = {turn.speaker for turns in (*listed, *dialogues) for turn in turns}
    unknown = [spelling for label, spelling in rules.masked.items() if label not in speakers]
    # Held-out data may lack a speaker whom the training data has.
    if unknown and speakers and rules.key == _TRAINING_KEY:
        shown = ", ".join(sorted(speakers)[:10]) + (", …" if len(speakers) > 10 else "")
        said = f"no turn of {rules.key} has the speaker {unknown[0]!r}; write some of {shown}"
        raise UserError(f"data.mask_speaker_ids: {said}")


def _tell_audioless(conversations: Sequence[Located], place: str) -> None:
    has_audio = [span is not None for turns in conversations for _, span in turns]
    if not all(has_audio):
        said = "turns have no audio and are context"
        logger.info("%s: %d of %d %s", place, has_audio.count(False), len(has_audio), said)


# From what is listed to where it lies


def _locate_turns(entry: Entry, header_of: Callable[[str, int | None], Header], frame_size: int) -> Located | str:
    """A conversation's turns with their audio, or what headers and transcripts tell to be wrong with one."""
    path = ""
    try:
        if isinstance(entry, Recording):
            path = str(entry.path)
            _check_length(header_of(path, None), entry.duration_sec)
        turns = dialogue_turns(entry) if isinstance(entry, Recording) else entry.turns
        located: Located = []
        for turn in turns:
            span = None
            if turn.audio is not None:
                path = turn.audio.path
                path = _resolve(turn.audio)
                span = _span(turn.audio, path, header_of(path, turn.audio.row), frame_size)
            located.append((turn, span))
    except OSError as error:
        return f"{entry.place}: {path[:MAX_SHOWN]}: {error.strerror}; mend the path or remove the entry"
    except BadRecording as problem:
        return f"{entry.place}: {path}: {problem}"
    return located


def _check_length(header: Header, duration_sec: float) -> None:
    length_sec = header.num_samples / SAMPLE_RATE_HZ
    if length_sec < duration_sec - DURATION_SLACK_SEC:
        raise BadRecording(f"lasts {length_sec:.2f} s, not {duration_sec:.2f} s; {MAKE_MANIFEST}")


def _resolve(audio: AudioRef) -> str:
    """The file that a path means: from its list's folder, or else from the working folder, as some projects do."""
    if audio.row is not None:
        return audio.path
    try:
        given = Path(audio.path).expanduser()
    except RuntimeError as error:
        raise BadRecording("there is no such user's home folder; write the whole path") from error
    listed = Path(audio.folder) / given
    if not given.is_absolute() and not listed.is_file() and given.is_file():
        if distributed.once(f"working folder {audio.folder}"):
            said = "not found beside the list are taken from the working folder"
            logger.warning("warning: %s: audio files %s, such as %s", audio.folder, said, given)
        return str(given.absolute())
    return str(listed)


def _read_header(path: str, row: int | None) -> Header:
    with _audio_file(path, row) as file:
        header = read_header(file)
    if header.num_channels > 2:
        raise BadRecording(f"has {header.num_channels} channels; keep one or two")
    return header


def _span(audio: AudioRef, path: str, header: Header, frame_size: int) -> AudioSpan:
    if audio.channel is not None and audio.channel >= header.num_channels:
        raise BadRecording("mono, but speaker 1 is listed on the right channel; make it stereo: 0 left, 1 right")
    length_sec = header.num_samples / SAMPLE_RATE_HZ
    end_sec = length_sec if audio.end_sec is None else audio.end_sec
    if end_sec > length_sec + DURATION_SLACK_SEC:
        raise BadRecording(f"lasts {length_sec:.2f} s, but a turn ends at {end_sec:.2f} s; mend start and end")
    if audio.start_sec >= min(end_sec, length_sec):
        raise BadRecording(f"has no audio from {audio.start_sec:g} s to {end_sec:g} s; mend start and end")
    start = round(audio.start_sec * SAMPLE_RATE_HZ)
    num_samples = min(round(end_sec * SAMPLE_RATE_HZ), header.num_samples) - start
    if num_samples < frame_size:
        said = f"from {audio.start_sec:g} s to {end_sec:g} s is shorter than one frame"
        raise BadRecording(f"{said} ({frame_size / SAMPLE_RATE_HZ:g} s); mend start and end, or remove the turn")
    return AudioSpan(path, audio.row, audio.channel, start, num_samples)


@contextmanager
def _audio_file(path: str, row: int | None) -> Iterator[Path]:
    """An audio file; one that a table embeds is written out for as long as it is needed."""
    if row is None:
        yield Path(path)
        return
    audio = open_dataset(path)[row]["audio"]
    if audio is None:
        raise BadRecording("has no audio; remove the row")
    if audio["bytes"] is None:
        table = Path(path.partition("#")[0])
        yield (table.parent if table.is_file() else table) / (audio["path"] or "")
        return
    with tempfile.NamedTemporaryFile(suffix=Path(audio["path"] or "").suffix) as file:
        file.write(audio["bytes"])
        file.flush()
        yield Path(file.name)


# From turns to windows


def _windows(turns: Located, place: str, rules: _Rules) -> list[TurnWindow]:
    records = [_fit(_measure(turn, span, rules), place, rules) for turn, span in turns]
    return cut_windows(records, place, rules.max_frames, rules.context_turns)


def _measure(turn: ListedTurn, span: AudioSpan | None, rules: _Rules) -> TurnRecord:
    is_cut = span is not None and rules.max_samples is not None and span.num_samples > rules.max_samples
    if span is not None and rules.max_samples is not None and is_cut:
        span = replace(span, num_samples=rules.max_samples)
    num_text = rules.count_text(turn.speaker, turn.text)
    num_audio = 0 if span is None else -(-span.num_samples // rules.frame_size) + (not is_cut)
    is_trained = turn.is_trained and span is not None and turn.speaker not in rules.masked
    return TurnRecord(turn.text, turn.speaker, span, num_text, num_text + num_audio, is_trained, is_cut)


def _fit(turn: TurnRecord, place: str, rules: _Rules) -> TurnRecord:
    """A trained turn that no window could hold is cut at a frame."""
    if turn.num_frames <= rules.max_frames or not turn.is_trained or turn.audio is None:
        return turn
    name = f"{turn.audio.path}: {turn.text!r:.40}"
    said = f"{name} has {turn.num_frames} positions, more than max_frames ({rules.max_frames})"
    num_audio = rules.max_frames - turn.num_text
    if num_audio < 1:
        logger.warning("warning: %s: %s: %s; its text leaves no room: left out", rules.key, place, said)
        return replace(turn, is_trained=False)
    num_samples = min(turn.audio.num_samples, num_audio * rules.frame_size)
    cut_sec = num_samples / SAMPLE_RATE_HZ
    logger.warning("warning: %s: %s: %s; its audio is cut after %.2f s", rules.key, place, said, cut_sec)
    audio = replace(turn.audio, num_samples=num_samples)
    return replace(turn, audio=audio, num_frames=rules.max_frames, is_cut=True)


def cut_windows(turns: Sequence[TurnRecord], place: str, max_frames: int, context_turns: int) -> list[TurnWindow]:
    """Windows of whole turns; every trained turn is trained in exactly one, and no window is without any.

    A conversation that fits is one window. Of a longer one each window begins at a trained turn, takes up to
    `context_turns` turns before it as context (the nearest ones, where not all fit) and goes on as far as it can.
    """
    trained = [index for index, turn in enumerate(turns) if turn.is_trained]
    if trained and sum(turn.num_frames for turn in turns[: trained[-1] + 1]) <= max_frames:
        return [TurnWindow(tuple(turns[: trained[-1] + 1]), num_context=0, place=place)]
    windows = []
    last = -1
    for first in trained:
        if first <= last:
            continue
        room = max_frames - turns[first].num_frames
        start = first
        while start > max(0, first - context_turns) and turns[start - 1].num_frames <= room:
            start -= 1
            room -= turns[start].num_frames
        last = first
        for index in range(first + 1, len(turns)):
            room -= turns[index].num_frames
            if room < 0:
                break
            last = index if turns[index].is_trained else last
        windows.append(TurnWindow(tuple(turns[start : last + 1]), first - start, place))
    return windows


# From windows to audio


def _read_turn(turn: TurnRecord, is_in_body: bool) -> Turn:
    is_trained = turn.is_trained and is_in_body
    wav_S = _NO_AUDIO if turn.audio is None else _read_audio(turn.audio)
    if is_trained and is_silent(wav_S) and turn.audio is not None:
        start_sec = turn.audio.start / SAMPLE_RATE_HZ
        end_sec = start_sec + turn.audio.num_samples / SAMPLE_RATE_HZ
        remedy = "mend the times or the channels, or remove the turn"
        raise BadRecording(f"{turn.audio.path}: is silent from {start_sec:.2f} s to {end_sec:.2f} s; {remedy}")
    return Turn(turn.text, turn.speaker, wav_S, is_trained, turn.is_cut)


def _read_audio(audio: AudioSpan) -> np.ndarray:
    """Mono float32 [S] at 24 kHz, as long as the span says."""
    try:
        with _audio_file(audio.path, audio.row) as file:
            wav_CS = read_span(file, audio.start, audio.num_samples)
    except BadRecording as problem:
        raise BadRecording(f"{audio.path}: {problem}") from problem
    if audio.channel is not None:
        return np.ascontiguousarray(wav_CS[audio.channel])
    return wav_CS[0] if len(wav_CS) == 1 else wav_CS.mean(0)
