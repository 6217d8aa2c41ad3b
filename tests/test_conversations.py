"""Turns of any file at 24 kHz, counted to the frame; windows of whole turns; what bad files do."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sphn

from conftest import QUICKSTART
from finetune.data.conversations import ConversationDataset, TurnRecord, cut_windows
from finetune.data.types import Conversation, Turn
from finetune.errors import UserError
from test_data import write_audio

KEY = "data.train_data"
FRAME = 1920
DIALOGUE = QUICKSTART / "dialogues" / "audio" / "dialogue_001.flac"
ASSETS = Path(__file__).parent / "assets"


def count_text(speaker: str, text: str) -> int:
    """A stand-in for a family's tokenizer: `[speaker]`, a word each, and two marks."""
    return 3 + len(text.split())


def open_dataset(spec: str, **changes) -> ConversationDataset:
    settings = {"max_frames": 2048, "context_turns": 0, "mask_speaker_ids": (), "max_audio_sec": None, **changes}
    settings = {"frame_sec": 0.08, "on_error": "fail", "num_workers": 2, "count_text": count_text, **settings}
    return ConversationDataset.open(spec, KEY, **settings)


def write_rows(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "one two", **row}) + "\n" for row in rows))
    return str(path)


def write_talk(folder: Path, *lengths_sec: float, **turn) -> str:
    """One conversation of csm-mlx: turns of tones that two speakers share, speaker 1 first."""
    turns = []
    for number, length_sec in enumerate(lengths_sec, 1):
        write_audio(folder / f"{number}.wav", length_sec, volumes=(0.5,))
        turns.append({"text": f"turn {number}", "audio_path": f"{number}.wav", "speaker": number % 2, **turn})
    (folder / "talk.json").write_text(json.dumps([turns]))
    return str(folder / "talk.json")


def read_all(dataset: ConversationDataset) -> list[Conversation]:
    return [dataset.read(window) for windows in dataset.windows for window in windows]


def positions(turn: Turn) -> int:
    """What a model makes of a turn."""
    num_audio = -(-len(turn.wav_S) // FRAME)
    return count_text(turn.speaker, turn.text) + num_audio + (num_audio > 0 and not turn.is_cut)


def check_counts(dataset: ConversationDataset) -> None:
    for windows in dataset.windows:
        for window in windows:
            assert dataset.num_frames(window) == sum(map(positions, dataset.read(window).turns))


# Audio


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("times", [{}, {"start": 0.5, "end": 1.46}, {"start": 0.31234, "end": 2.00001}, {"end": 0.08}])
def test_any_rate_and_cut_is_counted_exactly(rate_hz, times, tmp_path):
    write_audio(tmp_path / "a.wav", 2.0, rate_hz, volumes=(0.5,))
    dataset = open_dataset(write_rows(tmp_path, {"path": "a.wav", **times}))
    (conversation,) = read_all(dataset)
    (turn,) = conversation.turns
    length_sec = min(times.get("end", 2.0), 2.0) - times.get("start", 0.0)
    assert abs(len(turn.wav_S) - 24_000 * length_sec) <= 1
    assert turn.wav_S.dtype == np.float32
    assert dataset.num_frames(dataset.windows[0][0]) == positions(turn) == 5 + int(np.ceil(len(turn.wav_S) / FRAME)) + 1
    assert conversation.path == f"{tmp_path}/rows.jsonl line 1"


def test_whole_frames_have_no_empty_one_behind_them(tmp_path):
    write_audio(tmp_path / "a.wav", 0.80, volumes=(0.5,))
    rows = [{"path": "a.wav"}, {"path": "a.wav", "end": 0.72}, {"path": "a.wav", "end": 0.721}]
    dataset = open_dataset(write_rows(tmp_path, *rows))
    assert [dataset.num_frames(window) for window in dataset.windows[0]] == [5 + 10 + 1, 5 + 9 + 1, 5 + 10 + 1]


def test_a_cut_of_real_speech_equals_the_file(tmp_path):
    shutil.copy(DIALOGUE, tmp_path)
    whole_CS = sphn.read(str(DIALOGUE))[0]
    cut = {"path": DIALOGUE.name, "start": 1.2345, "end": 4.0}
    (conversation,) = read_all(open_dataset(write_rows(tmp_path, cut)))
    span_CS = whole_CS[:, round(1.2345 * 24_000) : 96_000]
    np.testing.assert_allclose(conversation.turns[0].wav_S, span_CS.mean(0), atol=1e-7)
    turns = [{"speaker": who, "text": "a", "start": 1.2345, "end": 4.0} for who in (0, 1)]
    (tmp_path / "t.jsonl").write_text(json.dumps({"audio": DIALOGUE.name, "turns": turns}))
    turns = read_all(open_dataset(str(tmp_path / "t.jsonl"), mask_speaker_ids=["0"]))[0].turns
    np.testing.assert_array_equal([turn.wav_S for turn in turns], span_CS)


@pytest.mark.parametrize("name", ["tone.mp3", "tone.ogg"])
def test_compressed_files_are_counted_exactly(name, tmp_path):
    shutil.copy(ASSETS / name, tmp_path)
    check_counts(open_dataset(write_rows(tmp_path, {"path": name}, {"path": name, "start": 0.7})))


def test_longer_audio_is_cut_and_does_not_end(tmp_path):
    spec = write_talk(tmp_path, 1.0, 0.5, 2.0)
    dataset = open_dataset(spec, max_audio_sec=0.9)
    (conversation,) = read_all(dataset)
    assert [len(turn.wav_S) / 24_000 for turn in conversation.turns] == [0.88, 0.5, 0.88]  # whole frames
    assert [turn.is_cut for turn in conversation.turns] == [True, False, True]
    assert dataset.num_frames(dataset.windows[0][0]) == (5 + 11) + (5 + 7 + 1) + (5 + 11)
    check_counts(dataset)
    assert not read_all(open_dataset(spec, max_audio_sec=2.0))[0].turns[2].is_cut


def test_masked_speakers_are_context(tmp_path):
    dataset = open_dataset(write_talk(tmp_path, 0.1, 0.2, 0.3), mask_speaker_ids=["1"])
    # Nothing learns from what follows the last trained turn.
    assert [turn.is_trained for turn in read_all(dataset)[0].turns] == [False, True]
    check_counts(dataset)


@pytest.mark.parametrize("spelling", ["speaker_1", "1.0", " 1", 1, "SPEAKER_USER"])
def test_a_masked_speaker_may_be_spelled_in_any_way(spelling, tmp_path):
    for speaker in (1, 1.0, "speaker_1", "1.0"):
        write_audio(tmp_path / "a.wav", volumes=(0.5,))
        rows = [{"path": "a.wav", "speaker": each} for each in (speaker, 0)]
        (conversation,) = read_all(open_dataset(write_rows(tmp_path, *rows), mask_speaker_ids=[spelling]))
        assert [turn.speaker for turn in conversation.turns] == ["0"]


def test_a_masked_speaker_who_says_nothing_is_named(tmp_path):
    spec = write_talk(tmp_path, 0.5, 0.5)
    says = r"^data\.mask_speaker_ids: no turn of data\.train_data has the speaker 'Ann'; write some of 0, 1$"
    with pytest.raises(UserError, match=says):
        open_dataset(spec, mask_speaker_ids=["speaker_0", "Ann"])
    settings = {"max_frames": 99, "context_turns": 0, "mask_speaker_ids": ["Ann"], "max_audio_sec": None}
    settings = {"frame_sec": 0.08, "on_error": "fail", "num_workers": 1, "count_text": count_text, **settings}
    assert ConversationDataset.open(spec, "data.eval_data", **settings).num_windows == 1  # she may be in the other


def test_turns_without_audio_are_counted(tmp_path, caplog):
    write_audio(tmp_path / "a.wav", volumes=(0.5,))
    spec = write_rows(tmp_path, {"path": None}, {"path": "a.wav"}, {"path": ""})
    with caplog.at_level(logging.INFO, "parley"):
        open_dataset(spec)
    assert caplog.messages == [f"{KEY}: {spec}: 2 of 3 turns have no audio and are context"]


# Windows


def record(name: str, num_frames: int, is_trained: bool = True) -> TurnRecord:
    return TurnRecord(name, "0", None, num_frames, num_frames, is_trained, is_cut=False)


def cut(turns: str, max_frames: int, context_turns: int) -> list[str]:
    """Windows of turns written as letters, a being 1 frame long; small ones are context. `|` follows the context."""
    records = [record(turn, ord(turn.lower()) - ord("a") + 1, turn.isupper()) for turn in turns]
    return [
        "".join(turn.text for turn in window.turns[: window.num_context])
        + "|"
        + "".join(turn.text for turn in window.turns[window.num_context :])
        for window in cut_windows(records, "talk", max_frames, context_turns)
    ]


def test_windows_by_example():
    assert cut("aAbB", 6, 9) == ["|aAbB"]
    assert cut("AAAA", 3, 0) == ["|AAA", "|A"]
    assert cut("AAAA", 3, 1) == ["|AAA", "A|A"]
    assert cut("AAAAA", 3, 2) == ["|AAA", "AA|A", "AA|A"]
    assert cut("BBBB", 3, 2) == ["|B", "|B", "|B", "|B"]  # no room for context
    assert cut("CABA", 4, 2) == ["|CA", "A|BA"]  # the oldest is dropped first
    assert cut("bAbAbA", 4, 1) == ["b|A", "b|A", "b|A"]
    assert cut("bAbAbA", 4, 0) == ["|AbA", "|A"]
    assert cut("AbbA", 4, 1) == ["|A", "b|A"]  # nothing learns from what comes after
    assert cut("Azb", 4, 1) == ["|A"]
    assert cut("zA", 4, 1) == ["|A"]
    assert cut("abc", 9, 1) == cut("abc", 2, 1) == cut("", 2, 1) == []


def test_every_trained_turn_is_trained_in_one_window():
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_turns, max_frames, context_turns = generator.integers([1, 5, 0], [40, 60, 5])
        turns = [
            record(str(index), int(generator.integers(1, max_frames + 1)), bool(generator.random() < 0.7))
            for index in range(num_turns)
        ]
        windows = cut_windows(turns, "talk", max_frames, context_turns)
        body = [turn for window in windows for turn in window.turns[window.num_context :]]
        assert [turn for turn in body if turn.is_trained] == [turn for turn in turns if turn.is_trained]
        for window in windows:
            assert any(turn.is_trained for turn in window.turns[window.num_context :])
            assert sum(turn.num_frames for turn in window.turns) <= max_frames
            assert window.num_context <= context_turns
            numbers = [int(turn.text) for turn in window.turns]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_windows_of_real_dialogues(caplog):
    spec = str(QUICKSTART / "dialogues" / "train.jsonl")
    whole = open_dataset(spec)
    turns = [turn for conversation in read_all(whole) for turn in conversation.turns]
    assert (whole.num_windows, len(turns)) == (4, sum(len(window.turns) for window in whole.windows[0]))
    check_counts(whole)
    parts = open_dataset(spec, max_frames=200, context_turns=2)
    assert parts.num_windows > 8
    check_counts(parts)
    trained = [turn for conversation in read_all(parts) for turn in conversation.turns if turn.is_trained]
    assert [turn.text for turn in trained] == [turn.text for turn in turns]
    for conversation in read_all(parts):
        flags = [turn.is_trained for turn in conversation.turns]
        assert flags == sorted(flags)
        assert flags.count(False) <= 2
    assert caplog.messages == []
    assert pickle.loads(pickle.dumps(parts.windows)) == parts.windows


def test_a_turn_longer_than_a_window_is_cut_at_a_frame_and_named(tmp_path, caplog):
    spec = write_talk(tmp_path, 0.5, 3.0, 0.5)
    with caplog.at_level(logging.WARNING, "parley"):
        dataset = open_dataset(spec, max_frames=25, context_turns=1)
    (warning,) = caplog.messages
    assert (
        f"{KEY}: {spec} item 1: {tmp_path / '2.wav'}: 'turn 2' has 44 positions, more than max_frames (25)" in warning
    )
    assert "its audio is cut after 1.60 s" in warning
    conversations = read_all(dataset)
    assert [[turn.text for turn in conversation.turns] for conversation in conversations] == [
        ["turn 1"], ["turn 2"], ["turn 3"],
    ]  # fmt: skip
    (turn,) = conversations[1].turns
    assert (turn.is_cut, turn.is_trained, len(turn.wav_S)) == (True, True, 20 * FRAME)
    assert dataset.num_frames(dataset.windows[0][1]) == 25
    check_counts(dataset)


def test_a_turn_may_lose_its_end_alone(tmp_path):
    dataset = open_dataset(write_talk(tmp_path, 0.5), max_frames=12)
    (turn,) = read_all(dataset)[0].turns
    assert (turn.is_cut, len(turn.wav_S)) == (True, 12_000)
    check_counts(dataset)


def test_a_text_longer_than_a_window_is_left_out(tmp_path, caplog):
    write_audio(tmp_path / "a.wav", 0.5, volumes=(0.5,))
    spec = write_rows(tmp_path, {"path": "a.wav", "text": "no " * 20}, {"path": "a.wav"})
    with caplog.at_level(logging.WARNING, "parley"):
        dataset = open_dataset(spec, max_frames=23)
    assert [len(conversation.turns) for conversation in read_all(dataset)] == [1]
    assert "rows.jsonl line 1" in caplog.messages[0]
    assert "its text leaves no room: left out" in caplog.messages[0]


# Sources and bad files


def test_sources_have_weights(tmp_path):
    write_audio(tmp_path / "a.wav", 0.5, volumes=(0.5,))
    spec = write_rows(tmp_path, {"path": "a.wav"}, {"path": "a.wav"})
    dataset = open_dataset(f"{spec}:3,{spec}")
    assert list(dataset.weights) == [0.75, 0.25]
    assert [len(windows) for windows in dataset.windows] == [2, 2]
    assert dataset.num_windows == 4
    assert dataset.empty_clip() == Conversation((), "")


def test_nothing_to_train_on_is_said(tmp_path):
    spec = write_talk(tmp_path, 0.5, 0.5)
    with pytest.raises(UserError, match=rf"^{KEY}: {spec}: no turn is left to train on: every turn is without audio"):
        open_dataset(spec, mask_speaker_ids=["0", "1"])
    missing = write_rows(tmp_path, {"path": "none.wav"})
    with pytest.raises(UserError, match="no usable conversation is left; see the lines above"):
        open_dataset(missing, on_error="skip")


def spoil(folder: Path, how: str) -> dict:
    """The row of a file that nobody can train on."""
    path = folder / "bad.wav"
    write_audio(path, volumes=(0.5,) * 3 if how == "three channels" else (0.5,))
    times = {"late": {"end": 1.5}, "after": {"start": 1.02}, "backwards": {"start": 0.5, "end": 0.2}}.get(how, {})
    times = {"brief": {"end": 0.0001}, "far": {"start": 1e308}}.get(how, times)
    if how == "missing":
        path.unlink()
    elif how == "undecodable":
        path.write_text("this is no audio " * 100)
    elif how == "opus":
        sphn.write_opus(str(path), np.zeros((1, 24_000), dtype=np.float32), 24_000)
    elif how == "silent":
        write_audio(path, volumes=(0.0,))
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:20_000])
    return {"path": "bad.wav", **times}


KNOWN_AT_START = {
    "missing": "no such file; mend the path",
    "undecodable": "cannot be decoded",
    "opus": "it is Opus, which sphn does not read); convert it to WAV or FLAC",
    "three channels": "has 3 channels; keep one or two",
    "late": "lasts 1.00 s, but a turn ends at 1.50 s; mend start and end",
    "after": "has no audio from 1.02 s to 1 s; mend start and end",
    "brief": "from 0 s to 0.0001 s is shorter than one frame (0.08 s); mend start and end",
    "far": "has no audio from 1e+308 s to 1 s; mend start and end",
    "backwards": "has no audio from 0.5 s to 0.2 s; mend start and end",
}
KNOWN_WHEN_READ = {
    "silent": "is silent from 0.00 s to 1.00 s; mend the times",
    "cut off": "ends at 0.42 s, before its header says; convert it",
}


@pytest.mark.parametrize("how", [*KNOWN_AT_START, *KNOWN_WHEN_READ])
def test_bad_files_stop_the_run_or_are_skipped(how, tmp_path, caplog):
    write_audio(tmp_path / "good.wav", volumes=(0.5,))
    spec = write_rows(tmp_path, {"path": "good.wav"}, spoil(tmp_path, how), {"path": "good.wav"})
    line = f"{KEY}: {tmp_path}/rows.jsonl line 2: {tmp_path}/bad.wav: "
    says = {**KNOWN_AT_START, **KNOWN_WHEN_READ}[how]
    dataset = None if how in KNOWN_AT_START else open_dataset(spec)
    with pytest.raises(UserError) as refused:
        read_all(dataset or open_dataset(spec))
    assert str(refused.value).startswith(line)
    assert says in str(refused.value)
    assert str(refused.value).endswith("set data.on_error: skip")
    assert "\n" not in str(refused.value)
    with caplog.at_level(logging.WARNING, "parley"):
        dataset = open_dataset(spec, on_error="skip")
        conversations = [*read_all(dataset), *read_all(dataset)]
    assert [len(conversation.turns) for conversation in conversations if conversation.path] == [1] * 4
    assert len(conversations) == (4 if how in KNOWN_AT_START else 6)
    (warning,) = caplog.messages
    assert warning.startswith(f"warning: skipped: {line}")
    assert says in warning


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nosuch/a.wav", "~nosuch/a.wav: there is no such user's home folder; write the whole path"),
        ("a" * 5000, "a" * 300 + ": File name too long; mend the path"),
        ("a\0.wav", "no such file; mend the path"),
    ],
)
def test_impossible_paths_are_one_line(name, says, tmp_path):
    with pytest.raises(UserError) as refused:
        open_dataset(write_rows(tmp_path, {"path": name}))
    assert str(refused.value).startswith(f"{KEY}: {tmp_path}/rows.jsonl line 1: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bad_turn_takes_its_whole_conversation_along(tmp_path, caplog):
    spec = write_talk(tmp_path, 0.5, 0.5)
    talk = json.loads(Path(spec).read_text())[0]
    (tmp_path / "talk.json").write_text(json.dumps([[*talk, {"text": "a", "audio_path": "none.wav"}], talk]))
    with caplog.at_level(logging.WARNING, "parley"):
        assert [len(each.turns) for each in read_all(open_dataset(spec, on_error="skip"))] == [2]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mono.wav", "mono, but speaker 1 is listed on the right channel"),
        ("short.wav", "lasts 1.50 s, not 2.00 s"),
        ("bare.wav", r"no transcript bare\.json beside it; annotate"),
    ],
)
def test_bad_dialogues_are_named(name, says, tmp_path):
    path = tmp_path / name
    write_audio(path, 1.5 if name == "short.wav" else 2.0, volumes=(0.5,) if name == "mono.wav" else (0.5, 0.5))
    if name != "bare.wav":
        path.with_suffix(".json").write_text(json.dumps({"alignments": [["hm", [0.5, 0.9], "SPEAKER_USER"]]}))
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": name, "duration": 2.0}))
    with pytest.raises(UserError, match=rf"^{KEY}: {tmp_path}/m\.jsonl line 1: {path}: {says}"):
        open_dataset(str(tmp_path / "m.jsonl"))


def test_a_bad_row_of_a_dataset_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write_audio(tmp_path / "a.wav", volumes=(0.5,))
    audio = [{"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}, {"bytes": b"no audio", "path": "b.wav"}, None]
    rows = datasets.Dataset.from_dict({"audio": audio, "text": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match=rf"{tmp_path}/set row 2: .*cannot be decoded.*\(and 1 more bad files\)"):
        open_dataset(str(tmp_path / "set"))
    (conversation,) = read_all(open_dataset(str(tmp_path / "set"), on_error="skip"))
    assert len(conversation.turns[0].wav_S) == 24_000
