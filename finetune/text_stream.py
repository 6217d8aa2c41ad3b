"""Words with times → one text token per audio frame, the stream that Moshi speaks along with its voice.

The rules are those of kyutai-labs/moshi-finetune's interleaver; `tests/test_text_stream.py` holds its results.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune.data.transcript import MAIN_SPEAKER
from finetune.data.types import ABSENT, Word


class TextTokenizer(Protocol):
    """What is needed of a sentencepiece processor."""

    def encode(self, text: str) -> list[int]: ...
    def bos_id(self) -> int: ...
    def eos_id(self) -> int: ...


@dataclass(frozen=True)
class TextStreamRules:
    """How words fall onto frames."""

    frame_rate_hz: float = 12.5
    padding_id: int = 3
    end_of_padding_id: int = 0
    keep_main_only: bool = True
    """Leave out the words of everyone but SPEAKER_MAIN."""
    keep_and_shift: bool = False
    """A word that starts before the last one's tokens are out queues behind it instead of replacing it."""
    use_bos_eos: bool = False
    """BOS before the main speaker's first word of a turn, EOS before the other's first word after it."""
    audio_delay_sec: float = 0.0
    """Positive: text leads the audio by this much. Negative: the first frames have no text."""
    in_word_padding_id: int | None = None
    """Fills the frames up to a word's end; default: the padding."""

    @property
    def padding_ids(self) -> set[int]:
        """The tokens that say no word, which the loss may count for less."""
        return {self.padding_id, self.end_of_padding_id}


@dataclass(frozen=True)
class _SpokenTokens:
    tokens: list[int]
    start_sec: float
    end_sec: float


def build_text_stream(
    words: Sequence[Word], num_frames: int, tokenizer: TextTokenizer, rules: TextStreamRules
) -> list[int]:
    """One token for each of `num_frames` frames; ABSENT where a negative delay leaves none."""
    padding = rules.padding_id
    in_word = padding if rules.in_word_padding_id is None else rules.in_word_padding_id
    stream = [padding] * num_frames
    coming = deque(_tokenize(sorted(words, key=lambda word: word.start_sec), tokenizer, rules))
    pending: deque[int] = deque()
    last_end_frame = -1
    for frame in range(num_frames):
        while coming and coming[0].start_sec * rules.frame_rate_hz < frame + 1:
            word = coming.popleft()
            last_end_frame = int(word.end_sec * rules.frame_rate_hz)
            if not rules.keep_and_shift:
                pending.clear()
            pending.extend(word.tokens)
        if pending:
            if frame > 0 and stream[frame - 1] in (padding, in_word):
                stream[frame - 1] = rules.end_of_padding_id
            stream[frame] = pending.popleft()
        elif frame <= last_end_frame:
            stream[frame] = in_word
    if rules.audio_delay_sec < 0:
        num_empty = min(num_frames, int(-rules.audio_delay_sec * rules.frame_rate_hz))
        stream[:num_empty] = [ABSENT] * num_empty
    return stream


def _tokenize(words: Iterable[Word], tokenizer: TextTokenizer, rules: TextStreamRules) -> Iterator[_SpokenTokens]:
    previous_speaker = None
    for word in words:
        if rules.keep_main_only and word.speaker != MAIN_SPEAKER:
            continue
        tokens = _encode_keeping_line_breaks(word.text, tokenizer)
        if rules.use_bos_eos and not rules.keep_main_only:
            tokens = _turn_mark(previous_speaker, word.speaker, tokenizer) + tokens
        previous_speaker = word.speaker
        if word.end_sec > word.start_sec:
            delay = rules.audio_delay_sec
            yield _SpokenTokens(tokens, word.start_sec - delay, word.end_sec - delay)


def _turn_mark(previous_speaker: str | None, speaker: str, tokenizer: TextTokenizer) -> list[int]:
    if speaker == previous_speaker:
        return []
    if speaker == MAIN_SPEAKER:
        return [tokenizer.bos_id()]
    return [tokenizer.eos_id()] if previous_speaker == MAIN_SPEAKER else []


def _encode_keeping_line_breaks(text: str, tokenizer: TextTokenizer) -> list[int]:
    first, *others = text.split("\n")
    tokens = list(tokenizer.encode(first))
    if others:
        newline = tokenizer.encode("\n")[-1]
        for line in others:
            tokens += [newline, *tokenizer.encode(line)]
    return tokens


def num_frames_of(num_samples: int, frame_size: int) -> int:
    """Frames that a codec makes of so many samples; the last may be partly empty."""
    return math.ceil(num_samples / frame_size)
