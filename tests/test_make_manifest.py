"""scripts/make_manifest.py: what it lists, what it leaves out, and that training reads what it writes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sphn

from conftest import QUICKSTART, ROOT, read_lines
from finetune.data.manifest import check_recording, read_sources

SCRIPT = ROOT / "scripts" / "make_manifest.py"


def write_wav(path: Path, duration_sec: float = 0.5, rate_hz: int = 24_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wav_CS = np.random.default_rng(0).uniform(-0.5, 0.5, (2, round(duration_sec * rate_hz))).astype(np.float32)
    sphn.write_wav(str(path), wav_CS, rate_hz)
    return path


def make_manifest(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def talks(tmp_path) -> Path:
    """Two recordings at different depths, a transcript and a hidden file."""
    write_wav(tmp_path / "talks" / "b.wav", 0.5)
    write_wav(tmp_path / "talks" / "day two" / "a.WAV", 1.25, rate_hz=16_000)
    (tmp_path / "talks" / "b.json").write_text('{"alignments": []}')
    (tmp_path / "talks" / "._b.wav").write_text("what macOS leaves on foreign disks")
    return tmp_path / "talks"


def test_lists_files_at_any_depth_with_seconds(talks):
    process = make_manifest(talks)
    assert process.returncode == 0, process.stderr
    assert read_lines(talks / "data.jsonl") == [
        {"path": "b.wav", "duration": 0.5},
        {"path": "day two/a.WAV", "duration": 1.25},
    ]
    assert [path.name for path in talks.iterdir() if path.name.endswith(".part")] == []


def test_training_reads_it(talks):
    make_manifest(talks)
    (source,) = read_sources(str(talks), "data.train_data")
    assert [recording.duration_sec for recording in source.recordings] == [0.5, 1.25]
    assert check_recording(source.recordings[0], min_channels=2, min_duration_sec=0.08) is None


def test_paths_count_from_the_manifests_folder(talks, tmp_path):
    (tmp_path / "lists").mkdir()
    process = make_manifest(talks, "--output", tmp_path / "lists" / "all.jsonl")
    assert process.returncode == 0, process.stderr
    assert read_lines(tmp_path / "lists" / "all.jsonl")[0]["path"] == "../talks/b.wav"


def test_a_linked_recording_keeps_its_name_and_so_its_transcript(talks, tmp_path):
    original = write_wav(tmp_path / "elsewhere" / "original.wav")
    (talks / "c.wav").symlink_to(original)
    make_manifest(talks)
    assert "c.wav" in [line["path"] for line in read_lines(talks / "data.jsonl")]


def test_reads_flac_and_mp3(tmp_path):
    (tmp_path / "dialogue_001.flac").symlink_to(QUICKSTART / "dialogues" / "audio" / "dialogue_001.flac")
    # 100 frames of silence: MPEG-1 layer 3, 128 kbit/s, 44.1 kHz, 1152 samples each.
    (tmp_path / "silence.mp3").write_bytes((bytes([0xFF, 0xFB, 0x90, 0x00]) + bytes(413)) * 100)
    assert make_manifest(tmp_path).returncode == 0
    flac, mp3 = read_lines(tmp_path / "data.jsonl")
    (listed,) = read_lines(QUICKSTART / "dialogues" / "eval.jsonl")
    assert flac["duration"] == pytest.approx(listed["duration"], abs=1e-6)
    assert mp3["duration"] == pytest.approx(100 * 1152 / 44_100, abs=0.05)


def test_names_what_cannot_be_decoded_and_lists_the_rest(talks):
    (talks / "broken.mp3").write_text("no audio")
    (talks / "empty.ogg").touch()
    process = make_manifest(talks)
    assert process.returncode == 1
    skipped = process.stderr.splitlines()
    assert len(skipped) == 2
    assert skipped[0].startswith(f"skipped: {talks / 'broken.mp3'}: ")
    assert skipped[1].startswith(f"skipped: {talks / 'empty.ogg'}: ")
    assert [line["path"] for line in read_lines(talks / "data.jsonl")] == ["b.wav", "day two/a.WAV"]


def test_a_pattern_chooses(talks):
    assert make_manifest(talks, "--pattern", "day*/*").returncode == 0
    assert [line["path"] for line in read_lines(talks / "data.jsonl")] == ["day two/a.WAV"]


@pytest.mark.parametrize("spoil", ["no files", "no readable file", "no match", "no folder", "gz", "no output folder"])
def test_without_anything_to_list_no_manifest_is_written(spoil, talks, tmp_path):
    arguments: list = [talks, "--output", tmp_path / "new.jsonl"]
    if spoil == "no match":
        arguments += ["--pattern", "*.aiff"]
    elif spoil == "no folder":
        arguments[0] = tmp_path / "none"
    elif spoil == "gz":
        arguments[2] = tmp_path / "new.jsonl.gz"
    elif spoil == "no output folder":
        arguments[2] = tmp_path / "none" / "new.jsonl"
    else:
        for path in [*talks.rglob("*.wav"), *talks.rglob("*.WAV")]:
            path.unlink()
        if spoil == "no readable file":
            (talks / "broken.wav").write_text("no audio")
    process = make_manifest(*arguments)
    assert process.returncode == 1
    assert "error: " in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("new.jsonl*"))


def test_an_old_manifest_stays_until_the_new_one_is_whole(talks):
    (talks / "data.jsonl").write_text("old\n")
    assert make_manifest(talks, "--pattern", "*.aiff").returncode == 1
    assert (talks / "data.jsonl").read_text() == "old\n"
    assert make_manifest(talks).returncode == 0
    assert len(read_lines(talks / "data.jsonl")) == 2


def test_help():
    process = make_manifest("--help")
    assert process.returncode == 0
    assert "--pattern" in process.stdout
