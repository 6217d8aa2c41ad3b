"""Shared pieces: a tiny Moshi made by the project itself, a little real speech, and ways to run the trainer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # moshi compiles small pieces lazily: 25 s against 1 s
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml

from finetune.families.csm.family import CsmArgs, CsmFamily
from finetune.families.csm.untrained import prepare_untrained
from finetune.families.moshi import MoshiArgs, MoshiFamily, write_untrained

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "example" / "quickstart"
CPU = torch.device("cpu")
TINY = {
    "dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "n_q": 16,
    "dep_q": 8,
    "context": 250,
    "depformer_dim": 32,
    "depformer_dim_feedforward": 96,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
}


def pytest_configure(config):
    """GPUs are for `pytest -m gpu`; everything else runs, and agrees, on the CPU."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device (GPU tests run with -m gpu)")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def moshi_args(folder: Path, **changes) -> MoshiArgs:
    """The model section for a model folder that holds everything."""
    return MoshiArgs(hf_repo_id=None, path=str(folder), **changes)


def make_moshi(folder: Path, **architecture) -> Path:
    """Write a tiny untrained Moshi."""
    args = MoshiArgs(
        mimi_path=str(QUICKSTART / "tiny_mimi.safetensors"),
        mimi_config_path=str(QUICKSTART / "tiny_mimi_config.json"),
        tokenizer_path=str(QUICKSTART / "tokenizer.model"),
    )
    return write_untrained(args, {**TINY, **architecture}, folder, seed=0)


CSM_TINY = {
    "num_codebooks": 4,
    "backbone": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "decoder": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
}


def csm_args(folder: Path, **changes) -> CsmArgs:
    """The model section for a model folder that holds everything."""
    return CsmArgs(hf_repo_id=None, path=str(folder), **changes)


def make_csm(folder: Path, **architecture) -> Path:
    """Write a tiny untrained CSM."""
    args = CsmArgs(
        mimi_path=str(QUICKSTART / "tiny_mimi.safetensors"),
        mimi_config_path=str(QUICKSTART / "tiny_mimi_config.json"),
        tokenizer_path=str(QUICKSTART / "tokenizer.json"),
    )
    prepare_untrained(args, {**CSM_TINY, **architecture}, folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_csm(tmp_path_factory) -> Path:
    return make_csm(tmp_path_factory.mktemp("models") / "tiny_csm")


@pytest.fixture(scope="session")
def csm_family(tiny_csm) -> CsmFamily:
    return CsmFamily(csm_args(tiny_csm), CPU)


@pytest.fixture
def csm_config(config, tiny_csm) -> dict:
    """The same for CSM, on the same dialogues, cut into turns."""
    config["model"] = {"family": "csm", "hf_repo_id": None, "path": str(tiny_csm)}
    config["data"] |= {"max_frames": 256, "context_turns": 1}
    return config


@pytest.fixture(scope="session")
def tiny_moshi(tmp_path_factory) -> Path:
    return make_moshi(tmp_path_factory.mktemp("models") / "tiny_moshi")


@pytest.fixture(scope="session")
def family(tiny_moshi) -> MoshiFamily:
    return MoshiFamily(moshi_args(tiny_moshi), CPU)


@pytest.fixture
def config(tiny_moshi, tmp_path) -> dict:
    """A short run on a little speech, as a dictionary to be changed and written."""
    dialogues = QUICKSTART / "dialogues"
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"family": "moshi", "hf_repo_id": None, "path": str(tiny_moshi)},
        "data": {
            "train_data": str(dialogues / "train.jsonl"),
            "eval_data": str(dialogues / "eval.jsonl"),
            "shuffle": True,
            "num_workers": 1,
        },
        "lora": {"rank": 4},
        "duration_sec": 4.0,
        "batch_size": 2,
        "max_steps": 3,
        "tensorboard": False,
        "do_ckpt": False,
        "optim": {"lr": 1e-3},
    }


def write_config(folder: Path, config: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_module(module: str, *arguments: str, ranks: int = 1, timeout_sec: int = 240, **environment: str):
    """Run `torchrun -m module` as a user does; returns the finished process with its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(port), "-m", module, *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "WANDB_MODE": "offline", **environment}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=timeout_sec,
        check=False,
    )


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
