"""The benchmark runs, checks what it compares, and finds our steps faster than what they are compared with."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmark_tools import Contender, Race, compare, summarize
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "benchmark.py"
# What the plain recipe costs against ours at size tiny, on one thread in float32, at the least.
MIN_RATIO = 1.3
# What transformers' CSM costs against ours at size small, and all frames against one in 16, at the least.
MIN_CSM_RATIO, MIN_AMORTIZATION_RATIO = 1.0, 3.0


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


@pytest.fixture
def csm_race() -> Race:
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    import benchmark_csm

    settings = {"size": "tiny", "device": "cpu", "dtype": "float32", "amortization": 4}
    args = argparse.Namespace(**settings, batch_size=2, duration_sec=0.96)
    return benchmark_csm.prepare(args, Path())


@pytest.mark.parametrize(
    ("family", "options"), [("moshi", ["--no-recompute", "moshi_7b"]), ("csm", ["--amortization", "csm_1b"])]
)
def test_help(family, options):
    if family == "csm":
        pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    finished = run_benchmark("--family", family, "--help")
    assert finished.returncode == 0, finished.stderr
    for option in ("--size", "--rounds", "--json", *options):
        assert option in finished.stdout


@pytest.mark.parametrize("wrong_by", [0.0, 1e-3, math.nan])
def test_the_check_sees_a_wrong_gradient(wrong_by):

    def contender(name: str, gradient: float):
        weight = nn.Parameter(torch.ones(3))

        def loss() -> torch.Tensor:
            return (weight * gradient).sum() - (weight.detach() * gradient).sum() + 5.0

        return Contender(name, {"layer": weight}, loss, lambda: None, torch.optim.AdamW([weight]))

    check = compare(contender("ours", 0.1 + wrong_by), contender("plain", 0.1))
    assert check["equal"] == (wrong_by == 0.0)
    assert check["gradients_unequal"] == ([] if wrong_by == 0.0 else ["layer"])


def test_unequal_parts_with_an_equal_sum_are_seen():
    weight = nn.Parameter(torch.ones(2))
    ours, reference = (
        Contender(name, {"layer": weight}, lambda parts=parts: weight * torch.tensor(parts))
        for name, parts in (("ours", [1.0, 2.0]), ("reference", [2.0, 1.0]))
    )
    assert not compare(ours, reference)["equal"]
    assert compare(ours, ours)["equal"]


def test_ratios_are_medians_of_those_of_rounds():
    slow, fast = (Contender(name, {}, torch.ones) for name in ("slow", "fast"))
    slow.step_sec, fast.step_sec = [[2.0], [30.0], [4.0]], [[1.0], [10.0], [1.0]]
    summary = summarize(Race([slow, fast], {"ratio": ("slow", "fast")}, num_frames=8, audio_sec=0.64, facts={}))
    assert (summary["ratio"], summary["ratio_by_round"]) == (3.0, [2.0, 3.0, 4.0])
    assert summary["slow"]["frames_per_sec"] == 2.0


def test_csm_equals_transformers(csm_race):
    ours, theirs, amortized = csm_race.contenders
    check = compare(ours, theirs)
    assert check["equal"], check
    assert check["gradients_compared"] == len(ours.weights) > 40
    assert check["gradient_relative_error"] < 1e-5
    semantic, acoustic = amortized.loss().tolist()
    assert semantic == pytest.approx(check["loss_parts_ours"][0])
    assert acoustic == pytest.approx(check["loss_parts_ours"][1], rel=0.05)
    assert acoustic != check["loss_parts_ours"][1]
    assert not compare(amortized, theirs)["equal"]


def test_csm_contenders_share_their_weights_and_leave_them(csm_race):
    ours, theirs, amortized = csm_race.contenders
    before = {name: weight.detach().clone() for name, weight in ours.weights.items()}
    for contender in csm_race.contenders:
        contender.step()
        assert all(weight.grad is None for weight in contender.weights.values())
    for name, weight in ours.weights.items():
        assert weight.data_ptr() == theirs.weights[name].data_ptr()
        assert weight is amortized.weights[name]
        assert torch.equal(weight, before[name])


@pytest.mark.slow
def test_csm_keeps_its_targets(tmp_path: Path):
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    file = tmp_path / "result.json"
    finished = run_benchmark("--family", "csm", "--size", "small", "--rounds", "3", "--json", str(file))
    assert finished.returncode == 0, finished.stderr
    result = json.loads(file.read_text())
    assert result["check"]["equal"]
    assert len(result["ours 1/16"]["step_sec"]) == 3
    assert result["ratio"] >= MIN_CSM_RATIO, finished.stdout
    assert result["amortization_ratio"] >= MIN_AMORTIZATION_RATIO, finished.stdout


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
