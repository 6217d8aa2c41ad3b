"""The program that speaks: runs, adapters, models' folders, and what it says when it cannot."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sphn
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import CPU, QUICKSTART, ROOT, csm_args, moshi_args, write_config
from finetune import args as configuration
from finetune import generate
from finetune.args import GenerateArgs, LoraArgs
from finetune.data.types import SAMPLE_RATE_HZ
from finetune.errors import UserError
from finetune.families import args_class
from finetune.families.base import Adapter, Line
from finetune.families.csm.family import CsmFamily
from finetune.families.moshi import MoshiFamily
from finetune.generate import Speech, open_model, read_context, speak, stream
from finetune.lora import add_adapters
from finetune.sampling import Sampling
from merge_adapter import main as merge_main

VOICE = QUICKSTART / "ljspeech" / "audio" / "LJ001-0002.flac"
GREEDY = Sampling(temperature=0.0)
SWAPPED = {"bos_token": "<|end_of_text|>", "eos_token": "<|begin_of_text|>"}
MIMI_FILES = {"mimi_path": ".safetensors", "mimi_config_path": "_config.json"}


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
        str(tiny_csm), "--text", "One.", "--text", "Two.", "--output", str(tmp_path / "out" / "a.wav"),
        "--max-sec", "0.3", "--context-audio", str(VOICE), "--context-text", "in being comparatively modern.",
        "--temperature", "0.7",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_1.wav", "a_2.wav"]
    assert result.stdout.count(" s, ") == 2


@pytest.fixture
def fake_speech(monkeypatch):
    """What `run` asks the model for; nothing is loaded."""
    asked = []

    def speak(family, model, lines, sampling, max_sec):
        asked.append((lines, sampling, max_sec))
        return [Speech(np.zeros(1920, np.float32), ended=True) for _ in lines]

    monkeypatch.setattr(generate, "open_model", lambda *_, **__: (SimpleNamespace(can_speak=True), None))
    monkeypatch.setattr(generate, "speak", speak)
    return asked


def main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    return generate.main()


def test_every_option_reaches_the_model(fake_speech, monkeypatch, tmp_path):
    said = "in being comparatively modern."
    options = {
        "--speaker": "7", "--context-audio": VOICE, "--context-text": said, "--temperature": 0.7, "--top-k": 11,
        "--top-p": 0.8, "--seed": 5, "--max-sec": 3.5, "--output": tmp_path / "a.wav", "--device": "cpu",
    }  # fmt: skip
    arguments = [part for option in options.items() for part in option]
    assert main(monkeypatch, "source", "--text", "One.", "--text", "Two.", *arguments) == 0
    ((lines, sampling, max_sec),) = fake_speech
    assert [(line.text, line.speaker) for line in lines] == [("One.", "7"), ("Two.", "7")]
    for line in lines:
        (turn,) = line.context
        assert (turn.text, turn.speaker) == (said, "7")
        assert len(turn.wav_S) > SAMPLE_RATE_HZ
    assert sampling == Sampling(temperature=0.7, top_k=11, top_p=0.8, seed=5)
    assert max_sec == 3.5


def test_the_checkpoint_asked_for_else_the_best_else_the_newest(csm_config, tiny_csm, tmp_path):
    """Three checkpoints that tell their steps by a weight."""
    run, name = tmp_path / "run", "lm_head.weight"
    for step in (2, 9, 10):
        folder = run / "checkpoints" / f"checkpoint_{step}" / "consolidated"
        shutil.copytree(tiny_csm, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = torch.full_like(tensors[name], step)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configuration.save(configuration.load(write_config(tmp_path, csm_config), {}, args_class), run / "args.yaml")

    def taken(checkpoint: str | None = None) -> int:
        _, model = open_model(str(run), device=CPU, checkpoint=checkpoint)
        return round(model.get_parameter(name)[0, 0].item())

    assert taken() == 10
    (run / "checkpoints" / "best").symlink_to("checkpoint_9")
    assert taken() == 9
    assert taken("checkpoint_2") == 2


def adapter_on(base: Path, folder: Path, **paths: str) -> tuple[Path, CsmFamily]:
    """An adapter of random numbers on a model whose run wrote turns in its own way."""
    own = CsmFamily(csm_args(base, text_template="<{speaker}> {text}", **SWAPPED, **paths), CPU)
    model = own.create(CPU)
    add_adapters(model, LoraArgs(rank=2))
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters() if ".lora_" in name}
    folder.mkdir()
    own.export(folder, tensors, Adapter(2, 1.0, 0.0, rslora=False))
    return folder, own


def test_an_adapter_and_what_it_merges_into_write_turns_as_its_run_did(tiny_csm, tmp_path, monkeypatch):
    """Also on a base without a codec: the run's is taken, not Kyutai's of the hub."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    plain = CsmFamily(csm_args(tiny_csm, export_layout="sesame"), CPU)
    base.mkdir()
    plain.export(base, plain.create(CPU).state_dict(), None)
    (base / "parley.json").unlink()
    mimi = {key: str(QUICKSTART / f"tiny_mimi{end}") for key, end in MIMI_FILES.items()}
    adapter, own = adapter_on(base, tmp_path / "adapter", **mimi)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["merge_adapter", str(adapter), "--output", str(merged)])
    assert merge_main() == 0
    for folder in (adapter, merged):
        family, _ = open_model(str(folder), device=CPU)
        assert family._tokenizer.encode("3", "hello") == own._tokenizer.encode("3", "hello")
    assert own._tokenizer.encode("3", "hello") != plain._tokenizer.encode("3", "hello")


def test_a_merged_model_is_never_written_over_its_parts(tiny_csm, tmp_path, monkeypatch, capsys):
    adapter, _ = adapter_on(tiny_csm, tmp_path / "adapter")
    (tmp_path / "file").write_text("")
    for output, says in (
        (adapter, "the adapter's own"),
        (tiny_csm, "the base's own"),
        (tmp_path / "file", "is a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["merge_adapter", str(adapter), "--output", str(output)])
        assert merge_main() == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "adapter_config.json: cannot be read as JSON"),
        ("[]", "adapter_config.json: holds no JSON object"),
        ("{}", "base_model_name_or_path: None names no base"),
        ('{"base_model_name_or_path": null}', "base_model_name_or_path: None names no base"),
        ('{"base_model_name_or_path": "/gone/base"}', "adapter: its base /gone/base is not there"),
    ],
)
def test_an_adapter_without_a_base_is_one_line(tmp_path, monkeypatch, capsys, content, says):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(content)
    assert main(monkeypatch, adapter, "--text", "a", "--output", tmp_path / "a.wav") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert str(adapter) in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "error: --temperature: -1.0 is not a number of 0 or more"),
        (["--text", " "], "--text: one of them is blank"),
        (["--max-sec", "nan"], "--max-sec: nan is not"),
        (["--max-sec", "inf"], "--max-sec: inf is not"),
        (["--max-sec", "0"], "--max-sec: 0.0 is not"),
        (["--device", "foo"], "--device: foo: no device of this machine"),
        (["--device", "cuda"], "--device: cuda: no device of this machine"),
        (["--output", "folder.wav"], "--output: folder.wav is a folder"),
        (["--output", "file.wav/a.wav"], "--output: file.wav is a file"),
        (["--output", "a.mp3"], "--output: a.mp3 does not end in .wav"),
        (["--context-text", "a"], "--context-audio and --context-text: one without the other"),
        (["--context-audio", str(VOICE)], "--context-audio and --context-text: one without the other"),
        (["--context-audio", "no.wav", "--context-text", "a"], "generate.context_audio: no.wav: no such file"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(
    fake_speech, monkeypatch, capsys, tmp_path, arguments, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "file.wav").write_text("")
    assert main(monkeypatch, "source", "--text", "a", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not fake_speech


def test_blank_sentences_are_refused():
    with pytest.raises(ValueError, match="sentences: one of them is blank"):
        GenerateArgs(freq=1, sentences=["hello", " "])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "--checkpoint", "x"], "is not a run's folder"),
        (["/no/such"], "/no/such: neither a folder nor the name of a hub repository"),
        (["{moshi}", "--family", "moshi"], "does not speak texts"),
    ],
)
def test_a_wrong_source_is_one_line(arguments, says, tiny_csm, tiny_moshi, tmp_path, monkeypatch, capsys):
    arguments = [part.format(model=tiny_csm, moshi=tiny_moshi) for part in arguments]
    assert main(monkeypatch, *arguments, "--text", "a", "--output", tmp_path / "a.wav") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


def speak_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "finetune.generate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_an_adapter_is_no_model_to_start_from(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.path: .* holds an adapter; merge it first"):
        CsmFamily(csm_args(tmp_path), CPU)


def test_a_run_without_the_checkpoint_asked_for_names_those_it_has(tiny_csm, csm_config, tmp_path):
    settings = configuration.load(write_config(tmp_path, csm_config), {}, args_class)
    (tmp_path / "run").mkdir()
    configuration.save(settings, tmp_path / "run" / "args.yaml")
    with pytest.raises(UserError, match="no checkpoint in it; train with do_ckpt: true"):
        open_model(str(tmp_path / "run"), device=CPU)
    shutil.copytree(tiny_csm, tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated")
    with pytest.raises(UserError, match=r"--checkpoint: .* has no checkpoint_000004 .*; it has checkpoint_000003"):
        open_model(str(tmp_path / "run"), device=CPU, checkpoint="checkpoint_000004")


def test_a_csm_folder_is_not_taken_for_a_moshi(tiny_csm):
    with pytest.raises(UserError, match=r"model\.path: .* holds a CSM; set model\.family: csm"):
        MoshiFamily(moshi_args(tiny_csm), CPU)
