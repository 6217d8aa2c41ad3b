"""Manifests, transcripts, windows and audio of any kind; what bad files do. Order and batches: test_loader.py."""

import gzip
import json
import logging
import wave
from pathlib import Path

import numpy as np
import pytest
import sphn

from conftest import QUICKSTART
from finetune.data.audio import read_window
from finetune.data.dataset import WindowDataset
from finetune.data.manifest import read_sources
from finetune.data.transcript import Transcript, read_transcript
from finetune.data.types import BadRecording, Clip, Word
from finetune.errors import UserError

KEY = "data.train_data"
FRAME_SEC = 0.08
TONES_HZ = (440.0, 1000.0, 600.0)


def write_audio(path: Path, length_sec: float = 1.0, rate_hz: int = 24_000, volumes: tuple[float, ...] = (0.5, 0.5)):
    """A WAV file of 16 bits with one tone per channel."""
    at_sec = np.arange(round(length_sec * rate_hz)) / rate_hz
    tones = [volume * np.sin(2 * np.pi * hz * at_sec) for volume, hz in zip(volumes, TONES_HZ, strict=False)]
    with wave.open(str(path), "wb") as file:
        file.setparams((len(tones), 2, rate_hz, 0, "NONE", ""))
        file.writeframes((np.stack(tones, 1) * 32_767).astype("<i2").tobytes())


def write_transcript(path: Path, starts_sec: tuple[float, ...] = ()) -> None:
    alignments = [[f"w{start}", [start, start + 0.1], "SPEAKER_MAIN"] for start in starts_sec]
    path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}))


def write_recording(path: Path, length_sec: float = 1.0, **audio) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, length_sec, **audio)
    write_transcript(path)


def write_manifest(path: Path, entries: dict[str, float]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"path": name, "duration": sec}) + "\n" for name, sec in entries.items())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def open_dataset(spec: str, duration_sec: float = 0.5, min_channels: int = 2, on_error: str = "fail") -> WindowDataset:
    rules = {"duration_sec": duration_sec, "min_channels": min_channels, "on_error": on_error}
    return WindowDataset.open(spec, KEY, frame_sec=FRAME_SEC, num_workers=2, **rules)


# Manifests


@pytest.mark.parametrize("kind", ["jsonl", "gz", "folder", "absolute"])
def test_manifests_list_recordings_relative_to_themselves(kind, tmp_path):
    folder = tmp_path / "set"
    listed = {"a.wav": 1.5, "sub/b.wav": 2, str(tmp_path / "c.flac"): 3.25}
    name = {"jsonl": "m.jsonl", "gz": "m.jsonl.gz", "folder": "deep/er/m.jsonl", "absolute": "m.jsonl"}[kind]
    spec = write_manifest(folder / name, listed)
    (source,) = read_sources(str(folder) if kind == "folder" else spec, KEY)
    base = Path(spec).parent
    paths = [base / "a.wav", base / "sub" / "b.wav", tmp_path / "c.flac"]
    assert [recording.path for recording in source.recordings] == paths
    assert [recording.duration_sec for recording in source.recordings] == [1.5, 2.0, 3.25]
    assert [recording.place for recording in source.recordings] == [f"{spec} line {n}" for n in (1, 2, 3)]


def test_a_folder_gives_all_its_manifests_and_blank_lines_count_as_lines(tmp_path):
    write_manifest(tmp_path / "x" / "a.jsonl", {"a.wav": 1.0})
    write_manifest(tmp_path / "b.jsonl.gz", {"b.wav": 1.0})
    (tmp_path / "x" / "a.jsonl").write_text('\n  \n{"path": "a.wav", "duration": 1.0}\n\n')
    (source,) = read_sources(str(tmp_path), KEY)
    places = {recording.path.relative_to(tmp_path): recording.place for recording in source.recordings}
    assert set(places.values()) == {f"{tmp_path}/x/a.jsonl line 3", f"{tmp_path}/b.jsonl.gz line 1"}


def test_sources_have_normalised_weights_and_may_hold_colons(tmp_path):
    plain = write_manifest(tmp_path / "a.jsonl", {"a.wav": 1.0})
    colon = write_manifest(tmp_path / "x:y" / "b.jsonl", {"b.wav": 1.0})
    sources = read_sources(f"{plain}:3, {colon}:0.5,{colon} ,", KEY)
    assert [source.name for source in sources] == [plain, colon, colon]
    assert [source.weight for source in sources] == pytest.approx([3 / 4.5, 0.5 / 4.5, 1 / 4.5])
    assert [source.recordings[0].path.name for source in sources] == ["a.wav", "b.wav", "b.wav"]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("m.jsonl:0", ["m.jsonl:0: weight 0 is not positive", "leave a source out"]),
        ("m.jsonl:-1", ["weight -1"]),
        ("m.jsonl:nan", ["weight nan"]),
        ("none.jsonl", ["none.jsonl: no such file", "give a manifest"]),
        ("void", ["void: no .jsonl below", "make_manifest"]),
        ("empty.jsonl", ["empty.jsonl: lists no recording", "make_manifest"]),
        ("fake.jsonl.gz", ["fake.jsonl.gz: cannot be read", "make_manifest"]),
        ("cut.jsonl.gz", ["cut.jsonl.gz: cannot be read", "make_manifest"]),
        ("damaged.jsonl.gz", ["damaged.jsonl.gz: cannot be read", "make_manifest"]),
        ("binary.jsonl", ["binary.jsonl: cannot be read", "make_manifest"]),
        (" , ", ["names no source", "give a manifest"]),
    ],
)
def test_wrong_sources_are_one_line(spec, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = gzip.compress(b'{"path": "a.wav", "duration": 1.0}\n' * 50)
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "fake.jsonl.gz").write_text("{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed[:10] + b"\xff" * 20 + packed[30:])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError) as refused:
        read_sources(spec, KEY)
    for part in [f"{KEY}: ", *parts]:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{broken", ["not a JSON object", "{broken", '{"path": "a.wav", "duration": 12.3}']),
        ('["a.wav", 1]', ["not a JSON object"]),
        ("null", ["not a JSON object"]),
        ('{"duration": 1}', ["no 'path'", '{"path": "a.wav", "duration": 12.3}']),
        ('{"path": "a.wav"}', ["no 'duration'", '{"path": "a.wav", "duration": 12.3}']),
        ('{"path": 3, "duration": 1}', ["path must be text", "make_manifest"]),
        ('{"path": "a.wav", "duration": "1"}', ["duration seconds", "make_manifest"]),
        ('{"path": "a.wav", "duration": true}', ["duration seconds", "make_manifest"]),
        ('{"path": "a.wav", "duration": 0}', ["duration is 0", "make_manifest"]),
        ('{"path": "a.wav", "duration": NaN}', ["duration is nan", "make_manifest"]),
        ('{"path": "a.wav", "duration": 1e999}', ["duration is inf", "make_manifest"]),
    ],
)
def test_malformed_lines_are_named(line, parts, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"path": "a.wav", "duration": 1}\n' + line + "\n")
    with pytest.raises(UserError) as refused:
        read_sources(str(path), KEY)
    for part in [f"{KEY}: {path} line 2: ", *parts]:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


# Transcripts


def test_alignments_and_conditions(tmp_path):
    raw = {
        "alignments": [["b", [0.5, 0.9], "SPEAKER_OTHER"], ["a", [0.1, 0.4], "SPEAKER_MAIN"]],
        "text_conditions": {"mood": "glad"},
    }
    (tmp_path / "x.json").write_text(json.dumps(raw))
    transcript = read_transcript(tmp_path / "x.wav")
    assert list(transcript.words) == [Word("a", 0.1, 0.4, "SPEAKER_MAIN"), Word("b", 0.5, 0.9, "SPEAKER_OTHER")]
    assert transcript.conditions == {"mood": "glad"}


def test_j_moshis_word_list(tmp_path):
    raw = [
        {"speaker": "B", "word": "hi", "start": 1.6, "end": 2},
        {"speaker": "A", "word": "hello", "start": 0.46, "end": 1.52},
    ]
    (tmp_path / "x.json").write_text(json.dumps(raw))
    words = read_transcript(tmp_path / "x.flac").words
    assert list(words) == [Word("hello", 0.46, 1.52, "SPEAKER_MAIN"), Word("hi", 1.6, 2.0, "SPEAKER_OTHER")]


@pytest.mark.parametrize(
    "text",
    [
        "{broken", "3", "null", "{}", '{"alignments": null}', '{"alignments": [["a", [0, 1]]]}',
        '{"alignments": [["a", [0], "S"]]}', '{"alignments": [["a", [null, 1], "S"]]}',
        '{"alignments": [[7, [0, 1], "S"]]}', '{"alignments": [["a", [0, 1], null]]}',
        '{"alignments": [], "text_conditions": {"mood": 3}}', '[{"speaker": "A", "word": "a", "start": 0}]',
        '{"alignments": [["a", [NaN, 1], "S"]]}', '{"alignments": [["a", ["0", 1], "S"]]}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_broken_transcripts_are_refused(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadRecording, match=r"transcript x\.json .*(annotate it anew|expected \{)"):
        read_transcript(tmp_path / "x.wav")


# Windows and audio


def test_windows_cover_a_file_and_hold_the_words_that_start_in_them(tmp_path):
    write_audio(tmp_path / "a.wav", 1.27)
    write_transcript(tmp_path / "a.wav", (0.0, 0.49, 0.5, 0.95, 1.2))
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.27}))
    clips = [dataset.read(window) for window in dataset.windows[0]]
    assert [clip.start_sec for clip in clips] == [0.0, 0.5, 1.0]
    assert [clip.audio_sec for clip in clips] == pytest.approx([0.5, 0.5, 0.27])
    assert {clip.duration_sec for clip in clips} == {0.5}
    assert [[word.text for word in clip.words] for clip in clips] == [["w0.0", "w0.49"], ["w0.5", "w0.95"], ["w1.2"]]
    assert clips[1].words[1].start_sec == pytest.approx(0.45)
    assert clips[1].words[1].end_sec == pytest.approx(0.55)
    whole_CS = sphn.read(str(tmp_path / "a.wav"))[0]
    np.testing.assert_array_equal(np.concatenate([clip.wav_CS for clip in clips], 1), whole_CS)


@pytest.mark.parametrize(("length_sec", "num_windows"), [(1.0, 2), (1.07, 2), (1.08, 3), (0.5, 1), (0.08, 1)])
def test_a_tail_shorter_than_a_frame_is_left_out(length_sec, num_windows, tmp_path):
    write_recording(tmp_path / "a.wav", length_sec)
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.wav": length_sec}))
    assert dataset.num_windows == num_windows
    assert all(dataset.read(window).audio_sec >= FRAME_SEC for window in dataset.windows[0])


@pytest.mark.parametrize("duration_sec", [0.1, 0.3, 1.6, 10.24])
def test_every_word_belongs_to_one_window(duration_sec, tmp_path):
    """Also the words on a boundary, where sums of seconds such as 3.2 + 1.6 are off by a bit."""
    length_sec = 40 * duration_sec
    write_audio(tmp_path / "a.wav", length_sec, rate_hz=2000)
    write_transcript(tmp_path / "a.wav")
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.wav": length_sec}), duration_sec)
    starts_sec = [round(index * duration_sec / 2, 6) for index in range(80)]
    transcript = Transcript([Word(str(start), start, start + 1, "SPEAKER_MAIN") for start in starts_sec], {})
    windows = [transcript.window(window.start_sec, duration_sec) for window in dataset.windows[0]]
    assert [word.text for words in windows for word in words] == [str(start) for start in starts_sec]
    assert all(0 <= word.start_sec < duration_sec for words in windows for word in words)


@pytest.mark.parametrize("rate_hz", [8000, 16_000, 24_000, 44_100, 48_000])
def test_any_rate_becomes_24_khz(rate_hz, tmp_path):
    write_audio(tmp_path / "a.wav", 2.0, rate_hz)
    wav_CS = read_window(tmp_path / "a.wav", 0.5, 1.0)
    assert wav_CS.shape == (2, 24_000)
    assert wav_CS.dtype == np.float32
    middle_CS = wav_CS[:, 4000:20_000] * np.hanning(16_000)
    peaks_hz = np.abs(np.fft.rfft(middle_CS)).argmax(1) * 24_000 / 16_000
    np.testing.assert_allclose(peaks_hz, TONES_HZ[:2], atol=1.5)
    assert np.abs(wav_CS[:, 4000:20_000]).max(1) == pytest.approx([0.5, 0.5], abs=0.02)


def test_windows_of_a_flac_equal_the_whole_file():
    path = QUICKSTART / "dialogues" / "audio" / "dialogue_001.flac"
    whole_CS, rate_hz = sphn.read(str(path))
    assert rate_hz == 24_000
    for start_sec in (0.0, 4.0, 40.0):
        start = round(start_sec * 24_000)
        np.testing.assert_array_equal(read_window(path, start_sec, 4.0), whole_CS[:, start : start + 96_000])


def test_mp3_is_decoded(tmp_path):
    """Frames of zeros are valid MP3 (44.1 kHz, stereo) and silent, which only a decoder can tell."""
    (tmp_path / "a.mp3").write_bytes((b"\xff\xfb\x90\x00" + bytes(413)) * 100)
    write_transcript(tmp_path / "a.mp3")
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.mp3": 2.6}))
    with pytest.raises(UserError, match="silent throughout"):
        dataset.read(dataset.windows[0][0])


def test_a_silent_window_of_a_file_with_speech_is_no_error(tmp_path):
    write_recording(tmp_path / "a.wav", 1.0)
    wav_CS = sphn.read(str(tmp_path / "a.wav"))[0]
    wav_CS[0, :12_000] = 0
    sphn.write_wav(str(tmp_path / "a.wav"), wav_CS, 24_000)
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0}))
    assert not dataset.read(dataset.windows[0][0]).wav_CS[0].any()


# Bad files


def spoil(folder: Path, how: str) -> None:
    """Make folder/bad.wav one of the files that nobody can train on."""
    path = folder / "bad.wav"
    write_recording(path)
    if how == "missing":
        path.unlink()
    elif how in ("mono", "three_channels"):
        write_audio(path, volumes=(0.5,) if how == "mono" else (0.5, 0.5, 0.5))
    elif how == "short":
        write_audio(path, 0.05)
    elif how == "shorter_than_listed":
        write_audio(path, 0.8)
    elif how == "undecodable":
        path.write_text("this is no audio " * 100)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no_transcript":
        path.with_suffix(".json").unlink()
    elif how == "broken_transcript":
        path.with_suffix(".json").write_text('{"alignments": [["a", 0.1]]}')
    elif how == "silent":
        write_audio(path, volumes=(0.0, 0.5))
    else:  # cut off, under a header that promises the whole
        write_audio(path, rate_hz=24_000 if how == "cut" else 44_100)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])


KNOWN_AT_START = {
    "missing": "no such file; mend the path",
    "mono": "mono, but the model hears two speakers; make it stereo",
    "three_channels": "has 3 channels; keep two",
    "short": "shorter than one frame (0.08 s); remove the line",
    "shorter_than_listed": "lasts 0.80 s, not 1.00 s; make the manifest anew",
    "undecodable": "cannot be decoded",
    "empty": "cannot be decoded",
    "no_transcript": "no transcript bad.json beside it; annotate",
    "broken_transcript": "transcript bad.json is not understood",
}
KNOWN_WHEN_READ = {
    "silent": "channel is silent throughout; swap the channels",
    "cut": "make the manifest anew",
    "cut_44100": "make the manifest anew",
}


@pytest.fixture
def talks(tmp_path):
    """A manifest of a good file, room for a bad one in line 2, and another good one."""
    write_recording(tmp_path / "good.wav")
    write_recording(tmp_path / "fine.wav")
    return write_manifest(tmp_path / "talks.jsonl", {"good.wav": 1.0, "bad.wav": 1.0, "fine.wav": 1.0})


def read_all(dataset: WindowDataset) -> list[Clip]:
    return [dataset.read(window) for window in dataset.windows[0]]


def check_line(line: str, folder: Path, says: str) -> None:
    assert f"{KEY}: {folder / 'talks.jsonl'} line 2: {folder / 'bad.wav'}: " in line
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("how", [*KNOWN_AT_START, *KNOWN_WHEN_READ])
def test_a_bad_file_stops_the_run_by_default(how, talks, tmp_path):
    spoil(tmp_path, how)
    if how in KNOWN_AT_START:
        with pytest.raises(UserError) as refused:
            open_dataset(talks)
        check_line(str(refused.value), tmp_path, KNOWN_AT_START[how])
    else:
        dataset = open_dataset(talks)
        with pytest.raises(UserError) as refused:
            read_all(dataset)
        check_line(str(refused.value), tmp_path, KNOWN_WHEN_READ[how])
    assert str(refused.value).endswith("set data.on_error: skip")


@pytest.mark.parametrize("how", KNOWN_AT_START)
def test_under_skip_a_file_known_to_be_bad_is_reported_once_and_left_out(how, talks, tmp_path, caplog):
    spoil(tmp_path, how)
    with caplog.at_level(logging.WARNING, "parley"):
        clips = read_all(open_dataset(talks, on_error="skip"))
    assert [Path(clip.path).name for clip in clips] == ["good.wav"] * 2 + ["fine.wav"] * 2
    assert len(caplog.messages) == 1
    check_line(caplog.messages[0], tmp_path, KNOWN_AT_START[how])


@pytest.mark.parametrize("how", KNOWN_WHEN_READ)
def test_under_skip_a_file_found_bad_when_read_becomes_empty_clips(how, talks, tmp_path, caplog):
    spoil(tmp_path, how)
    dataset = open_dataset(talks, on_error="skip")
    with caplog.at_level(logging.WARNING, "parley"):
        clips = [*read_all(dataset), *read_all(dataset)]
    clip = clips[3]
    assert (clip.path, clip.wav_CS.shape, list(clip.words), clip.duration_sec) == ("", (2, 0), [], 0.5)
    assert [bool(clip.path) for clip in clips[:2] + clips[4:6]] == [True] * 4
    assert len(caplog.messages) == 1
    check_line(caplog.messages[0], tmp_path, KNOWN_WHEN_READ[how])


def test_several_bad_files_are_counted(tmp_path):
    spec = write_manifest(tmp_path / "m.jsonl", {"x.wav": 1.0, "y.wav": 1.0, "z.wav": 1.0})
    with pytest.raises(UserError, match=r"m\.jsonl line 1: .*\(and 2 more bad files\)"):
        open_dataset(spec)


def test_a_path_that_no_file_can_have_is_named(tmp_path):
    with pytest.raises(UserError, match=r"m\.jsonl line 1: .*mend the path"):
        open_dataset(write_manifest(tmp_path / "m.jsonl", {"a" * 5000: 1.0}))


@pytest.mark.parametrize("duration_sec", [0.05, 1e-6])
def test_windows_shorter_than_a_frame_are_refused(duration_sec, talks):
    with pytest.raises(UserError, match=f"^duration_sec: {duration_sec} is shorter than one frame"):
        open_dataset(talks, duration_sec)


def test_nothing_left_stops_even_under_skip(tmp_path):
    with pytest.raises(UserError, match=f"{KEY}: .*no usable recording is left"):
        open_dataset(write_manifest(tmp_path / "m.jsonl", {"x.wav": 1.0}), on_error="skip")


def test_mono_is_fine_for_a_model_of_one_voice(tmp_path):
    write_recording(tmp_path / "a.wav", volumes=(0.5,))
    dataset = open_dataset(write_manifest(tmp_path / "m.jsonl", {"a.wav": 1.0}), min_channels=1)
    assert read_all(dataset)[0].wav_CS.shape == (1, 12_000)
