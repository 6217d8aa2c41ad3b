"""Words with times become turns, each cut from its speaker's channel."""

import json
from itertools import pairwise

import numpy as np
import pytest

from conftest import QUICKSTART
from finetune.data.manifest import Recording
from finetune.data.turn_dialogues import dialogue_turns, group_words
from finetune.data.types import BadRecording, Word
from test_data import write_audio
from test_turn_formats import read_turns, told, write_json

DIALOGUES = QUICKSTART / "dialogues"


def words_of(*spans: tuple[str, float, float]) -> list[Word]:
    """Each a label, its first letter the speaker: M main, anything else the other."""
    labels = {"M": "SPEAKER_MAIN", "U": "SPEAKER_USER", "X": "SPEAKER_OTHER"}
    return [Word(name, start, end, labels[name[0]]) for name, start, end in spans]


def grouped(*spans: tuple[str, float, float]) -> list[str]:
    return [" ".join(word.text for word in words) for words in group_words(words_of(*spans))]


def test_words_become_turns():
    assert grouped(("M2", 1, 2), ("M1", 0, 1), ("U1", 2, 3), ("X1", 3, 4), ("M3", 4, 5)) == ["M1 M2", "U1 X1", "M3"]
    assert grouped(("M1", 0, 1), ("M2", 2, 3), ("M3", 4.1, 5)) == ["M1 M2", "M3"]
    # Neither a word of agreement nor an overlap cuts the speech of one who does not stop.
    assert grouped(("M1", 0, 1), ("U1", 0.9, 1.3), ("M2", 1.1, 2)) == ["M1 M2", "U1"]
    assert grouped(("M1", 0, 1), ("U1", 0.9, 1.4), ("M2", 1.21, 2)) == ["M1", "U1", "M2"]
    assert grouped() == []


def test_the_audio_of_a_turn_keeps_off_its_speakers_other_turns(tmp_path):
    alignments = [
        ["so", [0.05, 0.5], "SPEAKER_MAIN"], ["hm", [0.4, 0.9], "SPEAKER_USER"], ["well", [0.8, 1.0], "SPEAKER_MAIN"],
        ["猫", [2.04, 2.3], "SPEAKER_MAIN"], ["です", [2.3, 2.4], "SPEAKER_MAIN"], ["ja", [2.96, 3], "SPEAKER_USER"],
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps({"alignments": alignments}))
    turns = dialogue_turns(Recording(tmp_path / "x.wav", 3.04, "line 1"))
    assert [(turn.speaker, turn.text) for turn in turns] == [
        ("0", "so"), ("1", "hm"), ("0", "well"), ("0", "猫です"), ("1", "ja"),
    ]  # fmt: skip
    spans = [(turn.audio.start_sec, turn.audio.end_sec, turn.audio.channel) for turn in turns]
    expected = [(0.0, 0.6, 0), (0.3, 1.0, 1), (0.7, 1.1, 0), (1.94, 2.5, 0), (2.86, 3.04, 1)]
    np.testing.assert_allclose(spans, expected, atol=1e-9)


def test_turns_of_one_speaker_never_overlap():
    generator = np.random.default_rng(0)
    for _ in range(50):
        starts = np.cumsum(generator.exponential(0.3, 60))
        labels = [("SPEAKER_MAIN", "SPEAKER_OTHER")[index] for index in generator.integers(2, size=60)]
        ends = starts + generator.exponential(0.2, 60)
        words = [Word("w", *each) for each in zip(starts, ends, labels, strict=True)]
        for who in set(labels):
            own = [turn for turn in group_words(words) if turn[0].speaker == who]
            spans = [(turn[0].start_sec - 0.1, max(word.end_sec for word in turn) + 0.1) for turn in own]
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
        assert sum(map(len, group_words(words))) == len(words)


def test_a_turn_of_empty_words_is_context(tmp_path):
    alignments = [[" ", [0.1, 0.5], "SPEAKER_MAIN"], ["hm", [0.6, 0.9], "SPEAKER_USER"]]
    (tmp_path / "z.json").write_text(json.dumps({"alignments": alignments}))
    turns = dialogue_turns(Recording(tmp_path / "z.wav", 1.2, "line 1"))
    assert [(turn.text, turn.is_trained) for turn in turns] == [("", False), ("hm", True)]


def test_a_word_after_the_end_is_refused(tmp_path):
    (tmp_path / "y.json").write_text(json.dumps([{"word": "a", "start": 1.21, "end": 1.3, "speaker": "A"}]))
    with pytest.raises(BadRecording, match=r"a word at 1\.21 s, after its end"):
        dialogue_turns(Recording(tmp_path / "y.wav", 1.2, "line 1"))


def test_real_dialogues_hold_each_voice_on_its_own_channel():
    conversations = read_turns(str(DIALOGUES / "train.jsonl"))
    assert len(conversations) == 4
    for turns in conversations:
        assert len(turns) >= 8
        assert all(turn.is_trained and {turn.speaker} <= {"0", "1"} for turn in turns)
        rms = [float(np.sqrt((turn.wav_S**2).mean())) for turn in turns]
        assert min(rms) > 0.01  # nobody's silence
    first = json.loads((DIALOGUES / "train.jsonl").read_text().splitlines()[0])["path"]
    alignments = json.loads((DIALOGUES / first).with_suffix(".json").read_text())["alignments"]
    listed = " ".join(word for word, _, _ in alignments).split()
    assert sorted(" ".join(turn.text for turn in conversations[0]).split()) == sorted(listed)


def test_turns_with_times_in_a_stereo_file(tmp_path):
    write_audio(tmp_path / "talk.wav", 3.0, volumes=(0.5, 0.25))
    turns = [
        {"speaker": 0, "text": "Hi.", "start": 0.5, "end": 1.0},
        {"speaker": 1, "text": "Ho.", "start": 1.0, "end": 3.0},
    ]
    spec = write_json(tmp_path / "conversations.jsonl", {"audio": "talk.wav", "turns": turns}, lines=True)
    (read,) = read_turns(spec)
    assert told(read) == [("0", "Hi.", 0.5, True), ("1", "Ho.", 2.0, True)]
    assert [np.abs(turn.wav_S).max() for turn in read] == pytest.approx([0.5, 0.25], abs=0.001)


def test_either_speaker_may_be_masked():
    for spelling, trained in (("SPEAKER_MAIN", {"1"}), ("SPEAKER_OTHER", {"0"})):
        conversations = read_turns(str(DIALOGUES / "train.jsonl"), mask_speaker_ids=[spelling])
        assert {turn.speaker for turns in conversations for turn in turns if turn.is_trained} == trained
        assert {turn.speaker for turns in conversations for turn in turns} == {"0", "1"}
