"""The real download code against a hub of our own: a local server that answers as the Hugging Face Hub does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from fake_hub import serve

OPEN_REPO, GATED_REPO = "someone/tiny-moshi", "someone/gated-moshi"
LOAD = """
import sys, torch
from finetune import distributed
from finetune.families.moshi import MoshiArgs, MoshiFamily
from finetune.parallel import materialize
with distributed.one_line_errors():
    family = MoshiFamily(MoshiArgs(hf_repo_id=sys.argv[1]), torch.device("cpu"))
    model = family.create(torch.device("meta"))
    materialize(model, family.weights(), torch.device("cpu"), seed=0)
    print(family._addresses["tokenizer_name"])
"""


@pytest.fixture
def hub(tiny_moshi):
    """Serves the tiny Moshi's folder as one open repository; another one is gated."""

    yield from serve({OPEN_REPO: tiny_moshi}, {GATED_REPO: (403, "GatedRepo")})


def load(repo: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD, repo],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_comes_from_the_hub_and_its_checkpoints_say_so(hub, tmp_path):
    result = load(OPEN_REPO, hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == f"hf://{OPEN_REPO}/tokenizer.model"
    (config,) = tmp_path.rglob("config.json")
    assert json.loads(config.read_text())["dim"] == 64


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        (GATED_REPO, "accept its terms"),
        ("someone/nothing", "check the name"),
        ("not a repo id", "model.path"),
    ],
)
def test_a_refusal_is_one_line(repo, says, hub, tmp_path):
    result = load(repo, hub, tmp_path)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Warning")]
    assert line.startswith("error: model.hf_repo_id: ")
    assert repo in line
    assert says in line


def test_without_a_network_one_line_says_so(tmp_path):
    result = load(OPEN_REPO, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "model.path" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
