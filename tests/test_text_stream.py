"""The text stream equals moshi-finetune's, on cases made by it."""

import json
from pathlib import Path

import pytest
import sentencepiece

from conftest import QUICKSTART
from finetune.data.types import ABSENT, Word
from finetune.text_stream import TextStreamRules, build_text_stream

CASES = json.loads((Path(__file__).parent / "text_stream_cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(str(QUICKSTART / "tokenizer.model"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["options"]) or "default")
def test_equals_reference(case, tokenizer):
    options = dict(case["options"])
    rules = TextStreamRules(
        keep_main_only=options.pop("keep_main_only", False),
        audio_delay_sec=options.pop("audio_delay", 0.0),
        **options,
    )
    words = [Word(text, start, end, speaker) for text, (start, end), speaker in case["alignments"]]
    assert build_text_stream(words, len(case["text_stream"]), tokenizer, rules) == case["text_stream"]


def test_line_break_inside_a_word_keeps_its_piece(tokenizer):
    newline = tokenizer.encode("\n")[-1]
    stream = build_text_stream([Word("a\nb", 0.0, 0.4, "SPEAKER_MAIN")], 8, tokenizer, TextStreamRules())
    assert newline in stream


def test_in_word_padding_fills_up_to_the_last_words_end(tokenizer):
    rules = TextStreamRules(in_word_padding_id=7)
    stream = build_text_stream([Word("hi", 0.2, 1.0, "SPEAKER_MAIN")], 20, tokenizer, rules)
    num_tokens = len(tokenizer.encode("hi"))
    assert stream[:2] == [3, 0]
    assert stream[2 + num_tokens : 13] == [7] * (11 - num_tokens)
    assert stream[13:] == [3] * 7


def test_delay_longer_than_the_clip_leaves_nothing(tokenizer):
    assert build_text_stream([], 4, tokenizer, TextStreamRules(audio_delay_sec=-9)) == [ABSENT] * 4
