"""Whole runs: golden losses, an overfitted batch, what a run leaves behind, two ranks through torchrun."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from conftest import CPU, QUICKSTART, make_moshi, read_lines, run_module, write_config
from finetune import args as configuration
from finetune.data.types import ABSENT
from finetune.evaluate import evaluate
from finetune.families import args_class
from finetune.loss import denominators, local_loss
from finetune.optim import LossScale, build_optimizer

# What configures the run, how it differs, and its losses.
GOLDEN_LOSSES = {
    "moshi": ("config", {}, [12.8323, 12.8375, 12.0754, 12.4908, 12.4136, 12.0290, 12.4805, 12.1245, 12.4210, 11.4913]),
    "csm": (
        "csm_config",
        {"finetuning": "full"},
        [6.2574, 6.2492, 6.2538, 6.2399, 6.2453, 6.2313, 6.2268, 6.2178, 6.2331, 6.2152],
    ),
}


def run(config: dict, folder: Path, **overrides: str) -> Path:
    """A run in this process; returns its folder."""
    args = configuration.load(write_config(folder, config), overrides, args_class)
    train.train(args)
    return Path(args.run_dir)


@pytest.mark.parametrize("family", GOLDEN_LOSSES)
def test_ten_steps_give_the_golden_losses(family, request, tmp_path):
    """Any refactoring must leave these; a change that means to move them says why in its commit."""
    fixture, changes, golden = GOLDEN_LOSSES[family]
    run_dir = run(request.getfixturevalue(fixture) | changes | {"max_steps": 10}, tmp_path)
    losses = [record["loss"] for record in read_lines(run_dir / "metrics.train.jsonl")]
    assert losses == pytest.approx(golden, rel=1e-4), losses


def test_one_batch_can_be_overfitted(config, tmp_path):
    path = write_config(tmp_path, config | {"finetuning": "full", "duration_sec": 1.0})
    args = configuration.load(path, {}, args_class)
    family = train.build_family(args, CPU)
    model, groups = train.build_model(args, family, torch.float32, CPU)
    optimizer = build_optimizer(groups, args.optim)
    optimizer.param_groups[0]["lr"] = 1e-2
    batches = iter(train.build_loader(args, family, evaluation=False))
    batch = next(batches)
    batches.close()
    for _ in range(60):
        loss = local_loss(
            family.nll(model, batch), batch.loss_weight_BKT, family.terms, denominators([batch], family.terms)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5


def test_a_run_leaves_what_the_readme_says(config, tmp_path):
    changes = {"do_eval": True, "eval_freq": 1, "do_ckpt": True, "ckpt_freq": 2, "tensorboard": True}
    run_dir = run(config | changes, tmp_path)
    records = read_lines(run_dir / "metrics.train.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    wanted = "loss text_loss audio_loss audio_loss_0 audio_loss_7 lr grad_norm tokens_per_sec useful_tokens_per_sec"
    wanted += " frames_per_sec useful_frames_per_sec audio_sec_per_sec peak_memory_gb step_sec eta_sec"
    assert set(wanted.split()) <= records[0].keys()
    assert records[0]["loss"] == pytest.approx(records[0]["text_loss"] + records[0]["audio_loss"])
    assert 0 < records[0]["useful_tokens_per_sec"] < records[0]["tokens_per_sec"]
    evaluations = read_lines(run_dir / "metrics.eval.jsonl")
    assert [record["step"] for record in evaluations] == [1, 2, 3]
    assert evaluations[0]["text_perplexity"] == pytest.approx(math.exp(evaluations[0]["text_loss"]))
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "checkpoints" / "best").is_dir()
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [round(event.value, 4) for event in events.Scalars("train/loss")] == [
        round(record["loss"], 4) for record in records
    ]
    # The written configuration runs again as it is, to the same losses.
    again = yaml.safe_load((run_dir / "args.yaml").read_text()) | {"run_dir": str(tmp_path / "again")}
    repeated = read_lines(run(again, tmp_path) / "metrics.train.jsonl")
    assert [record["loss"] for record in repeated] == [record["loss"] for record in records]


def test_log_lines_between_which_steps_lie_hold_their_mean(config, tmp_path):
    every = read_lines(run(config | {"max_steps": 4}, tmp_path) / "metrics.train.jsonl")
    changes = {"max_steps": 4, "log_freq": 4, "run_dir": str(tmp_path / "seldom")}
    (seldom,) = read_lines(run(config | changes, tmp_path) / "metrics.train.jsonl")
    assert seldom["step"] == 4
    losses = [record["text_loss"] for record in every]
    assert min(losses) < seldom["text_loss"] < max(losses)


def test_evaluation_does_not_depend_on_the_loss_weights(config, tmp_path):
    results = []
    for number, weights in enumerate([(1.0, 0.5), (100.0, 0.0)]):
        multiplier, padding = weights
        model = config["model"] | {
            "first_codebook_weight_multiplier": multiplier,
            "text_padding_weight": padding,
        }
        changes = {"model": model, "do_eval": True, "max_steps": 1, "optim": {"lr": 1e-12}}
        run_dir = run(config | changes | {"run_dir": str(tmp_path / str(number))}, tmp_path)
        results.append(read_lines(run_dir / "metrics.eval.jsonl")[0])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_evaluation_stops_after_eval_batches_and_starts_afresh(config, tmp_path):
    changes = {"do_eval": True, "eval_freq": 1, "eval_batches": 1, "optim": {"lr": 1e-12}}
    losses = [record["loss"] for record in read_lines(run(config | changes, tmp_path) / "metrics.eval.jsonl")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    whole = run(config | changes | {"eval_batches": None, "run_dir": str(tmp_path / "whole")}, tmp_path)
    assert read_lines(whole / "metrics.eval.jsonl")[0]["loss"] != pytest.approx(losses[0], rel=1e-5)


def test_frames_past_the_end_of_a_file_are_absent(config, tmp_path):
    """The last window of a file is shorter; its rest is neither fed nor predicted."""
    path = write_config(tmp_path, config | {"duration_sec": 30.0, "batch_size": 1, "data": config["data"]})
    args = configuration.load(path, {}, args_class)
    family = train.build_family(args, CPU)
    loader = train.build_loader(args, family, evaluation=True)  # one file of 43.679 s
    whole, rest = list(loader)
    num_frames = math.ceil((43.679 - 30.0) * 12.5)
    assert (whole.codes_BKT != ABSENT).all()
    assert (rest.codes_BKT[..., :num_frames] != ABSENT).all()
    assert (rest.codes_BKT[..., num_frames:] == ABSENT).all()
    assert (rest.loss_weight_BKT[..., num_frames:] == 0).all()
    assert (rest.segment_BT[0] >= 0).sum() == num_frames


def test_wandb_offline_never_writes_the_key(config, tmp_path):
    """Neither from the YAML nor from the command line, where W&B's own metadata would pick it up."""
    key = "0123456789abcdef0123456789abcdef01234567"
    config["wandb"] = {"project": "parley-test", "offline": True, "key": key}
    path = write_config(tmp_path, config)
    result = run_module("train", path, f"--wandb.key={key}", HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    run_dir = Path(config["run_dir"])
    (record,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in record.read_bytes()
    assert key not in result.stdout + result.stderr
    written = [p for p in [*run_dir.rglob("*"), *(tmp_path / "home").rglob("*")] if p.is_file()]
    assert written
    for file in written:
        assert key.encode() not in file.read_bytes(), file


@pytest.mark.dist
def test_wandb_without_a_key_is_one_line(config, tmp_path):
    config["wandb"] = {"project": "parley-test"}
    environment = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": ""}
    result = run_module("train", write_config(tmp_path, config), **environment)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "wandb.project: parley-test" in line
    assert "WANDB_API_KEY" in line


def test_a_model_made_otherwise_is_not_taken_silently(config, tmp_path):
    config["model"]["architecture"] = {"dim": 128}
    args = configuration.load(write_config(tmp_path, config), {"model.architecture.num_layers": "2"}, args_class)
    assert args.model.architecture == {"dim": 128, "num_layers": 2}
    with pytest.raises(train.UserError, match=r"model\.architecture\.dim: 128, but .* was made with 64"):
        train.build_family(args, CPU)


def test_labels_without_a_main_speaker_are_said(config, tmp_path, caplog):
    audio = QUICKSTART / "dialogues" / "audio"
    for name in ("dialogue_011.flac", "dialogue_011.json"):
        content = (audio / name).read_bytes().replace(b"SPEAKER_MAIN", b"SPEAKER_00")
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data.jsonl").write_text('{"path": "dialogue_011.flac", "duration": 35.705}\n')
    config["data"]["train_data"] = str(tmp_path / "data.jsonl")
    args = configuration.load(write_config(tmp_path, config), {}, args_class)
    train.build_loader(args, train.build_family(args, CPU), evaluation=False)
    assert "no word is labelled SPEAKER_MAIN (labels: SPEAKER_00, SPEAKER_USER)" in caplog.text


@pytest.mark.dist
def test_two_ranks_evaluate_and_save_together(config, tmp_path):
    """Five evaluation windows on two ranks with batches of two: the ranks do not run out at different times."""
    changes = {"do_eval": True, "eval_freq": 2, "do_ckpt": True, "ckpt_freq": 2, "max_steps": 4}
    config |= changes | {"duration_sec": 9.0, "save_adapters": False, "parallel": {"strategy": "fsdp"}}
    result = run_module("train", write_config(tmp_path, config), ranks=2)
    assert result.returncode == 0, result.stderr
    run_dir = Path(config["run_dir"])
    assert [record["step"] for record in read_lines(run_dir / "metrics.train.jsonl")] == [1, 2, 3, 4]
    alone = run(config | {"run_dir": str(tmp_path / "alone"), "batch_size": 4, "parallel": {}}, tmp_path)
    losses = [record["loss"] for record in read_lines(alone / "metrics.eval.jsonl")]
    assert [r["loss"] for r in read_lines(run_dir / "metrics.eval.jsonl")] == pytest.approx(losses, rel=1e-4)
    counts, counts_alone = (
        [r["useful_tokens_per_sec"] * r["step_sec"] for r in read_lines(folder / "metrics.train.jsonl")]
        for folder in (run_dir, alone)
    )
    assert counts == pytest.approx(counts_alone)  # tokens of a step, over all ranks


@pytest.mark.dist
def test_adapters_saved_after_an_evaluation_are_the_masters(config, tmp_path):
    """An evaluation leaves FSDP with rounded whole copies of the root's parameters; they must not be saved."""
    changes = {"do_eval": True, "do_ckpt": True, "max_steps": 1, "param_dtype": "bfloat16", "batch_size": 1}
    config |= changes | {"lora": {"rank": 2, "ft_embed": True}, "parallel": {"strategy": "fsdp"}}
    result = run_module("train", write_config(tmp_path, config), ranks=2)
    assert result.returncode == 0, result.stderr
    (file,) = (Path(config["run_dir"]) / "checkpoints").glob("checkpoint_*/consolidated/lora.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16"])
def test_hybrid_sharding_in_low_precision_learns(param_dtype, config, tmp_path):
    """Two groups of two ranks, float32 masters, half-precision computation."""
    config |= {
        "finetuning": "full",
        "param_dtype": param_dtype,
        "parallel": {"strategy": "hsdp", "shard_size": 2},
        "max_steps": 12,
        "batch_size": 1,
    }
    result = run_module("train", write_config(tmp_path, config), ranks=4, timeout_sec=500)
    assert result.returncode == 0, result.stderr
    losses = [record["loss"] for record in read_lines(Path(config["run_dir"]) / "metrics.train.jsonl")]
    assert losses[-1] < losses[0] - 1


def test_the_best_checkpoint_has_the_lowest_evaluation_loss(config, tmp_path):
    """A learning rate that breaks the model: the first evaluations are the best."""
    changes = {"do_eval": True, "eval_freq": 1, "do_ckpt": True, "ckpt_freq": 1, "max_steps": 4}
    run_dir = run(config | changes | {"optim": {"lr": 3.0, "pct_start": 0.9}}, tmp_path)
    losses = {record["step"]: record["loss"] for record in read_lines(run_dir / "metrics.eval.jsonl")}
    lowest = min(losses, key=losses.__getitem__)
    assert lowest < 4
    assert (run_dir / "checkpoints" / "best").resolve().name == f"checkpoint_{lowest:06d}"


def test_evaluation_is_without_dropout_and_training_goes_on_with_it(config, tmp_path):
    changes = {"lora": {"rank": 4, "dropout": 0.5}, "do_eval": True}
    args = configuration.load(write_config(tmp_path, config | changes), {}, args_class)
    family = train.build_family(args, CPU)
    model, _ = train.build_model(args, family, torch.float32, CPU)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.train()
    loader = train.build_loader(args, family, evaluation=True)
    first, second = (evaluate(model, family, loader, None, CPU) for _ in range(2))
    assert first == second
    assert model.training


def test_float16_trains_as_float32_does(config, tmp_path):
    """The loss scale cancels out: nearly the same losses and gradient norms."""
    changes = {"max_steps": 3, "duration_sec": 2.0, "batch_size": 1, "max_norm": 0.1}
    runs = [
        run(config | changes | {"param_dtype": dtype, "run_dir": str(tmp_path / dtype)}, tmp_path)
        for dtype in ("float32", "float16")
    ]
    exact, half = (read_lines(run_dir / "metrics.train.jsonl") for run_dir in runs)
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in half] == pytest.approx([record[key] for record in exact], rel=0.02)


def test_a_step_that_overflows_changes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "accepts", lambda self, norm: False)
    run_dir = run(config | {"do_ckpt": True}, tmp_path)
    (file,) = (run_dir / "checkpoints").glob("checkpoint_*/consolidated/lora.safetensors")
    assert all((tensor == 0).all() for name, tensor in load_file(file).items() if "lora_B" in name)


def test_float16_skips_a_step_that_overflows():
    scale = LossScale(torch.float16)
    before = scale.value
    assert not scale.accepts(torch.tensor(math.inf))
    assert scale.value == before / 2
    assert scale.accepts(torch.tensor(1.0))
    scale.GROWTH_INTERVAL = 2
    assert scale.accepts(torch.tensor(1.0))
    assert scale.value == before
    assert LossScale(torch.bfloat16).accepts(torch.tensor(math.inf))  # never looks


def test_the_metrics_file_of_a_resumed_run_holds_every_step_once(tmp_path):
    from finetune.metrics import JsonlFile

    path = tmp_path / "metrics.train.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    file = JsonlFile(path, last_step=2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_text_conditions_reach_the_model(config, tmp_path):
    """Transcripts with `text_conditions` train a conditioned model."""
    from test_moshi_parity import VARIANTS

    conditioned = make_moshi(tmp_path / "conditioned", **VARIANTS["conditioned"])
    data = tmp_path / "data"
    data.mkdir()
    source = QUICKSTART / "dialogues" / "audio" / "dialogue_011.flac"
    (data / "talk.flac").write_bytes(source.read_bytes())
    words = json.loads(source.with_suffix(".json").read_text())
    conditions = {"text_conditions": {"mood": "calm", "place": "home"}}
    (data / "talk.json").write_text(json.dumps(words | conditions))
    (data / "data.jsonl").write_text('{"path": "talk.flac", "duration": 35.705}\n')
    config["data"] |= {"train_data": str(data / "data.jsonl")}
    config["model"] |= {"path": str(conditioned)}
    losses = read_lines(run(config | {"finetuning": "full"}, tmp_path) / "metrics.train.jsonl")
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize(
    ("conditions", "says"),
    [({"tempo": "calm"}, "the model knows mood"), ({"mood": "odd"}, "'odd' is not one of calm, wild")],
)
def test_a_condition_that_the_model_does_not_know_is_one_line(conditions, says, config, tmp_path):
    lut = {"n_bins": 2, "dim": 6, "tokenizer": "noop", "possible_values": ["calm", "wild"]}
    conditioners = {"conditioners": {"mood": {"type": "lut", "lut": lut}}, "fuser": {"sum": ["mood"]}}
    config["model"]["path"] = str(make_moshi(tmp_path / "conditioned", **conditioners))
    audio = QUICKSTART / "dialogues" / "audio" / "dialogue_011.flac"
    (tmp_path / "talk.flac").write_bytes(audio.read_bytes())
    words = json.loads(audio.with_suffix(".json").read_text())
    (tmp_path / "talk.json").write_text(json.dumps(words | {"text_conditions": conditions}))
    (tmp_path / "data.jsonl").write_text('{"path": "talk.flac", "duration": 35.705}\n')
    config["data"]["train_data"] = str(tmp_path / "data.jsonl")
    with pytest.raises(train.UserError, match=f"talk.flac: text_conditions.*{says}"):
        run(config, tmp_path)


def test_a_folder_that_is_no_run_is_never_emptied(config, tmp_path):
    precious = Path(config["run_dir"]) / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(train.UserError, match="holds files that are not a run's"):
        run(config | {"overwrite_run_dir": True}, tmp_path)
    assert precious.exists()


def test_a_mistake_leaves_the_old_run_alone(config, tmp_path):
    run_dir = run(config, tmp_path)
    wrong = config | {"overwrite_run_dir": True, "data": config["data"] | {"train_data": "gone.jsonl"}}
    with pytest.raises(train.UserError, match=r"gone\.jsonl: no such file"):
        run(wrong, tmp_path)
    assert len(read_lines(run_dir / "metrics.train.jsonl")) == 3
    run(config | {"overwrite_run_dir": True, "max_steps": 1}, tmp_path)
    assert len(read_lines(run_dir / "metrics.train.jsonl")) == 1


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.INFO, logger="parley")
