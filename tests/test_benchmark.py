"""The benchmark runs, checks what it compares, and finds our step faster than the plain recipe."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmark
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "benchmark.py"
# What the plain recipe costs against ours at size tiny, on one thread in float32, at the least.
MIN_RATIO = 1.3


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help():
    finished = run_benchmark("--help")
    assert finished.returncode == 0, finished.stderr
    for option in ("--size", "--rounds", "--no-recompute", "--json"):
        assert option in finished.stdout


@pytest.mark.parametrize("wrong_by", [0.0, 1e-3, math.nan])
def test_the_check_sees_a_wrong_gradient(wrong_by):

    def contender(name: str, gradient: float):
        weight = nn.Parameter(torch.ones(3))

        def loss() -> torch.Tensor:
            return (weight * gradient).sum() - (weight.detach() * gradient).sum() + 5.0

        return benchmark.Contender(name, {"layer": weight}, loss, lambda: None, torch.optim.AdamW([weight]))

    check = benchmark.compare(contender("ours", 0.1 + wrong_by), contender("plain", 0.1))
    assert check["equal"] == (wrong_by == 0.0)
    assert check["gradients_unequal"] == ([] if wrong_by == 0.0 else ["layer"])


@pytest.mark.slow
def test_our_step_beats_the_plain_recipe(tmp_path: Path):
    file = tmp_path / "result.json"
    finished = run_benchmark("--size", "tiny", "--rounds", "5", "--steps", "2", "--json", str(file))
    assert finished.returncode == 0, finished.stderr
    result = json.loads(file.read_text())
    check = result["check"]
    assert check["equal"]
    assert check["gradients_compared"] > 100
    assert check["gradient_largest"] > 0
    assert abs(check["loss_ours"] - check["loss_plain"]) < 1e-4
    assert [len(steps) for steps in result["ours"]["step_sec"]] == [2] * 5
    assert result["ratio"] >= MIN_RATIO, finished.stdout
