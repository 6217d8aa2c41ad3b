"""What only a GPU can show. Run with `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch

from conftest import CPU, moshi_args, read_lines, run_module, write_config
from finetune.families.moshi import MoshiFamily
from finetune.parallel import compute_dtype, materialize
from test_moshi_parity import our_loss, random_batch

pytestmark = pytest.mark.gpu


def test_a_gpu_gives_the_cpus_loss(tiny_moshi):
    losses = []
    for device in (CPU, torch.device("cuda")):
        torch.manual_seed(0)
        family = MoshiFamily(moshi_args(tiny_moshi), device)
        model = family.create(torch.device("meta"))
        materialize(model, family.weights(), device, seed=0)
        nll_BKT = family.nll(model, random_batch(family))
        losses.append(nll_BKT.sum().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_modern_cards_compute_in_bfloat16():
    assert compute_dtype("auto", torch.device("cuda")) in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("finetuning", ["lora", "full"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_on_a_gpu_learns(finetuning, compile, config, tmp_path):
    config |= {"finetuning": finetuning, "compile": compile, "max_steps": 20, "do_ckpt": True}
    result = run_module("train", write_config(tmp_path, config), timeout_sec=600)
    assert result.returncode == 0, result.stderr
    records = read_lines(Path(config["run_dir"]) / "metrics.train.jsonl")
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["peak_memory_gb"] > 0


def test_a_step_never_waits_for_the_gpu(tiny_moshi):
    """Forward, loss and backward queue their work without one synchronisation."""
    device = torch.device("cuda")
    family = MoshiFamily(moshi_args(tiny_moshi), device)
    model = family.create(torch.device("meta"))
    materialize(model, family.weights(), device, seed=0)
    batch = random_batch(family)
    family.nll(model, batch).sum().backward()  # first use of kernels may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        family.nll(model, batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert our_loss(MoshiFamily(moshi_args(tiny_moshi), CPU), model.to(CPU), batch).isfinite()
