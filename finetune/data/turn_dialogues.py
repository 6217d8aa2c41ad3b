"""Stereo dialogues cut into turns: each speaker's voice from his own channel."""

from collections.abc import Sequence

from finetune.data.manifest import Recording
from finetune.data.transcript import MAIN_SPEAKER, read_transcript
from finetune.data.turn_records import AudioRef, ListedTurn
from finetune.data.types import BadRecording, Word

# A silence as long as this ends a turn, also where the same speaker goes on.
PAUSE_SEC = 1.0
# One who pauses for less than this goes on speaking, whatever the other says meanwhile ("mhm").
HOLD_SEC = 0.2
# Audio before the first word and after the last: word times are rarely exact, and breath belongs to speech.
# Half of HOLD_SEC, so that no turn reaches into another one of its speaker.
MARGIN_SEC = HOLD_SEC / 2
CHANNELS = {"0": 0, "1": 1}
"""Speaker 0 is the main one, on the left; anyone else is speaker 1, on the right."""


def dialogue_turns(recording: Recording) -> list[ListedTurn]:
    """The turns of a dialogue by its word timestamps, in the order in which they begin.

    Raises:
        BadRecording: the transcript is missing, broken, or speaks of a time after the recording's end.
    """
    groups = group_words(read_transcript(recording.path).words)
    last_start_sec = max((group[-1].start_sec for group in groups), default=0.0)
    if last_start_sec >= recording.duration_sec:
        raise BadRecording(f"has a word at {last_start_sec:g} s, after its end; annotate it anew")
    return [_turn(words, recording) for words in groups]


def _turn(words: Sequence[Word], recording: Recording) -> ListedTurn:
    speaker = _speaker(words[0])
    start_sec = max(0.0, words[0].start_sec - MARGIN_SEC)
    end_sec = min(_end_sec(words) + MARGIN_SEC, recording.duration_sec)
    audio = AudioRef(str(recording.path), "", start_sec, end_sec, CHANNELS[speaker])
    text = _join([word.text.strip() for word in words])
    return ListedTurn(text, speaker, audio, is_trained=bool(text))


def group_words(words: Sequence[Word]) -> list[list[Word]]:
    """Words by turn. Consecutive words of one speaker are one turn, unless he pauses for PAUSE_SEC.

    One who keeps on speaking keeps his turn: words of the other in between, as where two overlap, are the other's
    turn and do not cut his in two.
    """
    turns: list[list[Word]] = []
    latest: dict[str, list[Word]] = {}
    for word in sorted(words, key=lambda word: word.start_sec):
        own = latest.get(_speaker(word))
        if own is not None:
            pause_sec = word.start_sec - _end_sec(own)
            if pause_sec <= (PAUSE_SEC if own is turns[-1] else HOLD_SEC):
                own.append(word)
                continue
        turns.append([word])
        latest[_speaker(word)] = turns[-1]
    return turns


def _speaker(word: Word) -> str:
    return "0" if word.speaker == MAIN_SPEAKER else "1"


def _end_sec(words: Sequence[Word]) -> float:
    return max(word.end_sec for word in words)


def _join(texts: Sequence[str]) -> str:
    """Words in a line; without a space between words of Chinese or Japanese."""
    line = ""
    for text in texts:
        is_apart = line and text and not (_is_unspaced(line[-1]) and _is_unspaced(text[0]))
        line += (" " if is_apart else "") + text
    return line


def _is_unspaced(character: str) -> bool:
    """Kana, ideographs and their punctuation, full width forms (Unicode blocks from 2E80 to 9FFF and from FF00)."""
    return "\u2e80" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef"
