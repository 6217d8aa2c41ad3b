"""Wrong input ends a real torchrun with one line, exit code 2 and no traceback of ours, on one rank and on two."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from conftest import CPU, moshi_args, run_module, write_config
from finetune.errors import UserError
from finetune.families.moshi import MoshiFamily
from finetune.parallel import materialize

TIME_LIMIT_SEC = 60
# torchrun looks this seldom (not ten times a second), so that it cannot stop a rank that is about to say too much.
MONITOR_INTERVAL_SEC = 2


@dataclass(frozen=True)
class Case:
    """One wrong input: how the configuration or the files are spoiled, and what the line must say."""

    spoil: Callable[[dict, Path], None]
    says: list[str]
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def write_recording(path: Path, left: float, right: float) -> None:
    """Two seconds of noise with a volume for each channel, and an empty transcript."""
    noise_CS = np.random.default_rng(0).uniform(-1, 1, (2, 48_000)).astype(np.float32)
    sphn.write_wav(str(path), noise_CS * np.array([[left], [right]], np.float32), 24_000)
    path.with_suffix(".json").write_text('{"alignments": []}')


def write_manifest(config: dict, folder: Path, names: list[str]) -> None:
    lines = [json.dumps({"path": name, "duration": 2.0}) + "\n" for name in names]
    (folder / "talks.jsonl").write_text("".join(lines))
    config["data"]["train_data"] = str(folder / "talks.jsonl")


def unknown_key(config: dict, folder: Path) -> None:
    config["optim"]["learning_rate"] = config["optim"].pop("lr")


def no_run_dir(config: dict, folder: Path) -> None:
    del config["run_dir"]


def used_run_dir(config: dict, folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "args.yaml").write_text("seed: 1\n")


def missing_manifest(config: dict, folder: Path) -> None:
    config["data"]["train_data"] = str(folder / "none.jsonl")


def bad_file_at_start(config: dict, folder: Path) -> None:
    write_recording(folder / "good.wav", 0.5, 0.5)
    write_recording(folder / "text.wav", 0.5, 0.5)
    (folder / "text.wav").write_text("this is no audio " * 100)
    write_manifest(config, folder, ["good.wav", "text.wav"])


def silent_file(config: dict, folder: Path) -> None:
    """Rank 0 meets the silent file in the fifth step, while rank 1 waits for it in a collective."""
    write_recording(folder / "good.wav", 0.5, 0.5)
    write_recording(folder / "silent.wav", 0.0, 0.5)
    write_manifest(config, folder, ["good.wav"] * 8 + ["silent.wav"] + ["good.wav"] * 3)
    config["data"]["shuffle"] = False
    config["batch_size"] = 1
    config["max_steps"] = 9


def hub_repo(config: dict, folder: Path) -> None:
    config["model"] = {"hf_repo_id": "kyutai/moshiko-pytorch-bf16"}


def wrong_family(config: dict, folder: Path) -> None:
    config["model"]["family"] = "moshy"


def wrong_codec(config: dict, folder: Path) -> None:
    config["model"]["mimi_path"] = str(Path(config["model"]["path"]) / "tokenizer.model")


CASES = {
    "unknown_key": Case(unknown_key, ["optim.learning_rate: unknown key", "known keys: name, lr"]),
    "no_run_dir": Case(no_run_dir, ["run_dir: not set", "--run_dir="]),
    "used_run_dir": Case(used_run_dir, ["run_dir: ", "holds a run", "overwrite_run_dir: true"], ranks=2),
    "missing_manifest": Case(missing_manifest, ["data.train_data: ", "none.jsonl", "give a manifest"]),
    "bad_file_at_start": Case(
        bad_file_at_start,
        ["error: data.train_data: ", "talks.jsonl line 2: ", "text.wav", "convert it", "on_error: skip"],
    ),
    "silent_file": Case(
        silent_file, ["error: data.train_data: ", "talks.jsonl line 9: ", "silent.wav", "swap the channels"], ranks=2
    ),
    "hub_repo": Case(
        hub_repo, ["model.hf_repo_id: kyutai/moshiko", "check the network"], environment={"HF_HUB_OFFLINE": "1"}
    ),
    "wrong_family": Case(wrong_family, ["model.family: 'moshy'", "moshi"]),
    "wrong_codec": Case(wrong_codec, ["model.mimi_path: ", "tokenizer.model", "check both files"]),
}


def check_ending(process, says: list[str]) -> None:
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    for part in says:
        assert part in lines[0]
    assert lines[0] in process.stderr
    assert process.returncode != 0
    assert re.search(r"exitcode\s*: 2\b", process.stderr), process.stderr
    # torch marks the tracebacks of a rank; torchrun's own, about a child that failed, has no such mark.
    assert "[rank" not in process.stderr, process.stderr
    assert process.stderr.count("Traceback") <= 1, process.stderr
    assert 'train.py", line' not in process.stderr
    assert "panicked" not in process.stderr


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name, config, tmp_path):
    case = CASES[name]
    case.spoil(config, tmp_path)
    path = write_config(tmp_path, config)
    environment = {"HF_HOME": str(tmp_path / "hub"), **case.environment}
    if case.ranks > 1:
        environment["PET_MONITOR_INTERVAL"] = str(MONITOR_INTERVAL_SEC)
    process = run_module("train", path, ranks=case.ranks, timeout_sec=TIME_LIMIT_SEC, **environment)
    check_ending(process, case.says)


@pytest.mark.dist
def test_what_is_no_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: [runs\ndata: x\n")
    process = run_module("train", path, timeout_sec=TIME_LIMIT_SEC)
    check_ending(process, [f"config {path} line 2: not YAML"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{broken", ["model", "config.json", "cannot be read as JSON"]),
        ("config.json", "[1]", ["model", "config.json", "no JSON object"]),
        ("tiny_mimi_config.json", "{broken", ["model", "tiny_mimi_config.json", "cannot be read as JSON"]),
        ("tokenizer.model", "x", ["model.tokenizer_path: ", "tokenizer.model", "not a SentencePiece model"]),
        ("model.safetensors", "x", ["model.moshi_path: ", "model.safetensors", "download it again"]),
        ("config.json", {"card": 1024}, ["model: ", "512", "1024", "use the model's own codec"]),
        ("config.json", {"dim": 32}, ["model: ", "[513, 64] in the checkpoint", "[513, 32] here"]),
        ("config.json", {"num_layers": 3}, ["model: ", "the checkpoint lacks transformer.layers.2."]),
        ("config.json", {"lora": True}, ["model: ", "adapter", "scripts/merge_adapter.py"]),
    ],
)
def test_spoiled_model_files_are_named(name, content, says, tiny_moshi, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_moshi, folder)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / name).read_text()), **content})
    (folder / name).write_text(content)

    def load() -> None:
        family = MoshiFamily(moshi_args(folder), CPU)
        materialize(family.create(torch.device("meta")), family.weights(), CPU, seed=0)

    with pytest.raises(UserError) as refused:
        load()
    for part in says:
        assert part in str(refused.value)
