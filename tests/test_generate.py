"""The program that speaks: runs, adapters, models' folders, and what it says when it cannot."""

import subprocess
import sys

import pytest
import sphn
import torch

import train
from conftest import CPU, QUICKSTART, ROOT, write_config
from finetune import args as configuration
from finetune.data.types import SAMPLE_RATE_HZ
from finetune.errors import UserError
from finetune.families import args_class
from finetune.families.base import Line
from finetune.generate import open_model, read_context, speak, stream
from finetune.sampling import Sampling
from merge_adapter import main as merge_main

VOICE = QUICKSTART / "ljspeech" / "audio" / "LJ001-0002.flac"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(params=["adapter", "merged", "full"])
def run_dir(request, csm_config, tmp_path):
    """A run of two steps with a checkpoint."""
    kinds = {
        "adapter": {"lora": {"rank": 4, "scaling": 2.0}},
        "merged": {"lora": {"rank": 4, "scaling": 2.0}, "save_adapters": False},
        "full": {"finetuning": "full"},
    }
    settings = kinds[request.param] | {"do_ckpt": True, "max_steps": 2, "optim": {"lr": 3e-2}}
    train.train(configuration.load(write_config(tmp_path, csm_config | settings), {}, args_class))
    return tmp_path / "run"


def say(source, **settings) -> torch.Tensor:
    family, model = open_model(str(source), device=CPU, **settings)
    (speech,) = speak(family, model, [Line("hello", "0")], GREEDY, max_sec=0.4)
    return torch.from_numpy(speech.wav_S)


def test_a_run_its_checkpoint_and_the_merged_adapter_say_the_same(run_dir, csm_config, tmp_path, monkeypatch):
    consolidated = run_dir / "checkpoints" / "checkpoint_000002" / "consolidated"
    spoken = say(run_dir)
    assert len(spoken)
    assert torch.equal(say(run_dir, checkpoint="checkpoint_000002"), spoken)
    assert torch.equal(say(consolidated), spoken)
    if (consolidated / "adapter_config.json").exists():
        untrained = say(csm_config["model"]["path"])
        assert untrained.shape != spoken.shape or not torch.allclose(untrained, spoken, atol=1e-3)
        command = ["merge_adapter", str(consolidated), "--output", str(tmp_path / "merged"), "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", command)
        assert merge_main() == 0
        torch.testing.assert_close(say(tmp_path / "merged"), spoken, rtol=1e-3, atol=1e-4)


def test_a_stream_is_the_whole_in_pieces(tiny_csm):
    family, model = open_model(str(tiny_csm), device=CPU)
    lines = [Line("hello", "0"), Line("good morning", "1")]
    chunks = list(stream(family, model, lines, GREEDY, 0.5))
    assert len(chunks) > 1
    assert all(len(wav_S) in (0, family.frame_size) for chunk in chunks for wav_S in chunk.wavs)
    whole = speak(family, model, lines, GREEDY, 0.5)
    for index, speech in enumerate(whole):
        assert sum(len(chunk.wavs[index]) for chunk in chunks) == len(speech.wav_S)


def test_a_context_is_read_whole_and_mono(tmp_path):
    turn = read_context(VOICE, "in being comparatively modern.", "0")
    assert turn.wav_S.shape == (round(sphn.FileReader(str(VOICE)).duration_sec * SAMPLE_RATE_HZ),)
    assert not turn.is_trained
    with pytest.raises(UserError, match=r"generate\.context_audio: .*nothing\.wav: no such file"):
        read_context(tmp_path / "nothing.wav", "", "0")


def test_the_program_writes_a_file_for_each_text(tiny_csm, tmp_path):
    result = speak_program(
        str(tiny_csm), "--text", "One.", "--text", "Two.", "--output", str(tmp_path / "out" / "a.wav"), "--max-sec", "0.3",
        "--context-audio", str(VOICE), "--context-text", "in being comparatively modern.", "--temperature", "0.7",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_1.wav", "a_2.wav"]
    assert result.stdout.count(" s, ") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "--text", "a", "--temperature", "-1"], "error: --temperature: -1.0 is not a number of 0 or more"),
        (["{model}", "--text", "a", "--checkpoint", "x"], "is not a run's folder"),
        (["{model}", "--text", "a", "--context-audio", "no.wav"], "generate.context_audio: no.wav: no such file"),
        (["{moshi}", "--text", "a", "--family", "moshi"], "does not speak texts"),
    ],
)
def test_the_program_says_in_one_line_what_is_wrong(arguments, says, tiny_csm, tiny_moshi):
    result = speak_program(*(part.format(model=tiny_csm, moshi=tiny_moshi) for part in arguments))
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line


def speak_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "finetune.generate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
