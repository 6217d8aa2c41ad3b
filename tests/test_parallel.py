"""FSDP2 accepts moshi's modules, loads shard by shard, and the torchrun run equals the single process."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import CPU, make_moshi, moshi_args, read_lines, run_module, write_config
from finetune.args import LoraArgs, ParallelArgs
from finetune.errors import UserError
from finetune.families.moshi import MoshiFamily
from finetune.lora import adapter_parameters, add_adapters
from finetune.parallel import build_mesh, compute_dtype, materialize, prepare_blocks, set_param_dtypes
from moshi_overrides.fsdp import allow_fully_shard


def final_weights(config: dict) -> dict[str, torch.Tensor]:
    (checkpoint,) = (p for p in (config["run_dir"] / "checkpoints").glob("checkpoint_*"))
    (file,) = (checkpoint / "consolidated").glob("*.safetensors")
    return load_file(file)


LAYOUTS = {
    "one_rank": {"ranks": 1, "num_microbatches": 6, "batch_size": 1},
    "one_big_batch": {"ranks": 1, "num_microbatches": 1, "batch_size": 6},
    "two_ranks_fsdp": {"ranks": 2, "num_microbatches": 3, "batch_size": 1, "strategy": "fsdp"},
    "two_ranks_ddp": {"ranks": 2, "num_microbatches": 1, "batch_size": 3, "strategy": "ddp"},
    "three_ranks_fsdp": {"ranks": 3, "num_microbatches": 1, "batch_size": 2, "strategy": "fsdp"},
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("finetuning", "others"),
    [
        ("full", ["one_big_batch", "two_ranks_fsdp", "three_ranks_fsdp"]),
        ("lora", ["two_ranks_ddp", "two_ranks_fsdp"]),
    ],
)
def test_any_split_of_a_batch_trains_the_same(finetuning, others, config, tmp_path):
    """Parameters after 5 steps: ranks × microbatches × batch size = 6 windows a step, however it is split."""
    reference = None
    for name in ["one_rank", *others]:
        layout = dict(LAYOUTS[name])
        ranks = layout.pop("ranks")
        run = config | {
            # Weights that differ from window to window: a denominator of each microbatch's own would show.
            "model": config["model"] | {"text_padding_weight": 0.1, "first_codebook_weight_multiplier": 3.0},
            "run_dir": tmp_path / name,
            "max_steps": 5,
            "do_ckpt": True,
            "finetuning": finetuning,
            "gradient_checkpointing": False,
            "duration_sec": 3.0,
            "parallel": {"strategy": layout.pop("strategy", "auto")},
            "optim": {"lr": 1e-3, "schedule": "constant", "pct_start": 0.0},
            **layout,
        }
        path = write_config(tmp_path, run | {"run_dir": str(run["run_dir"])})
        result = run_module("train", path, ranks=ranks)
        assert result.returncode == 0, result.stderr
        weights = final_weights(run)
        losses = [record["loss"] for record in read_lines(run["run_dir"] / "metrics.train.jsonl")]
        norms = [record["grad_norm"] for record in read_lines(run["run_dir"] / "metrics.train.jsonl")]
        if reference is None:
            reference, reference_losses, reference_norms = weights, losses, norms
            continue
        assert losses == pytest.approx(reference_losses, rel=1e-5), name
        assert norms == pytest.approx(reference_norms, rel=1e-3), name  # AdamW alone hides a wrong scale
        for key, expected in reference.items():
            got, expected = (has_gradient(key, weight) for weight in (weights[key], expected))
            torch.testing.assert_close(
                got, expected, rtol=1e-3, atol=2e-5, msg=lambda text, where=f"{name}: {key}": f"{where}: {text}"
            )


def has_gradient(key: str, weight: torch.Tensor) -> torch.Tensor:
    """The Depformer's first step attends to itself alone, so the gradient of its queries and keys is nothing but
    rounding, which AdamW blows up; only the values are compared."""
    if key.startswith("depformer.") and ".in_projs.0." in key and "lora_A" not in key:
        return weight.chunk(3)[2]
    return weight


def test_every_streaming_module_becomes_shardable(family):
    model = family.create(torch.device("meta"))
    allow_fully_shard(model)
    allow_fully_shard(model)  # a second model of the same classes
    from torch.distributed.fsdp._fully_shard import _fully_shard

    pair = _fully_shard.cls_to_fsdp_cls[type(model)]
    assert issubclass(pair, FSDPModule)
    assert issubclass(pair, type(model))
    assert pair.__mro__[2] is type(model)  # FSDPModule.__new__ reads it there


def test_packed_projections_are_found(tiny_moshi, tmp_path):
    """Kyutai's own files pack the weights of all codebook steps into one matrix."""
    state = load_file(tiny_moshi / "model.safetensors")
    packed: dict[str, list[torch.Tensor]] = {}
    for name in sorted(state, key=lambda n: [int(p) if p.isdigit() else p for p in n.split(".")]):
        for which in ("in", "out"):
            marker = f".{which}_projs."
            if marker in name:
                stem = name.split(marker)[0]
                spelling = "in_proj_weight" if which == "in" else "out_proj.weight"
                packed.setdefault(f"{stem}.{spelling}", []).append(state[name])
    plain = {name: tensor for name, tensor in state.items() if "_projs." not in name}
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in tiny_moshi.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(plain | {name: torch.cat(parts) for name, parts in packed.items()}, folder / "model.safetensors")

    models = []
    for source in (tiny_moshi, folder):
        family = MoshiFamily(moshi_args(source), CPU)
        model = family.create(torch.device("meta"))
        materialize(model, family.weights(), CPU, seed=0)
        models.append(model.state_dict())
    for name, expected in models[0].items():
        assert torch.equal(models[1][name], expected), name


def test_a_checkpoint_of_another_model_is_refused(tiny_moshi, tmp_path):
    other = make_moshi(tmp_path / "other", num_layers=3)
    config = json.loads((other / "config.json").read_text())
    mixed = MoshiFamily(moshi_args(other, moshi_path=str(tiny_moshi / "model.safetensors")), CPU)
    assert config["num_layers"] == 3
    with pytest.raises(UserError, match=r"checkpoint lacks transformer\.layers\.2"):
        materialize(mixed.create(torch.device("meta")), mixed.weights(), CPU, seed=0)


def test_recomputed_and_compiled_blocks_keep_names_and_results(tiny_moshi, monkeypatch):
    from test_moshi_parity import load_pair, our_loss, random_batch

    family, model, _ = load_pair(tiny_moshi)
    batch = random_batch(family)
    names = [name for name, _ in model.named_parameters()]
    plain = our_loss(family, model, batch)
    plain.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    prepare_blocks(family.blocks(model), compile=False, recompute=True)
    recomputed = our_loss(family, model, batch)
    recomputed.backward()
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(plain, recomputed)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, expected)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss(tiny_moshi):
    from test_moshi_parity import load_pair, our_loss, random_batch

    family, model, _ = load_pair(tiny_moshi)
    batch = random_batch(family)
    plain = our_loss(family, model, batch)
    prepare_blocks(family.blocks(model), compile=True, recompute=True)
    compiled = our_loss(family, model, batch)
    compiled.backward()
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_what_is_trained_is_float32_whatever_computes(family):
    model = family.create(torch.device("meta"))
    add_adapters(model, LoraArgs(rank=2))
    trained = adapter_parameters(model)
    set_param_dtypes(model, trained, family.exact_modules(model), torch.bfloat16)
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert sum(p.requires_grad for p in model.parameters()) == len(trained)


def test_hybrid_groups_shard_inside_and_replicate_across():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        mesh = build_mesh("hsdp", ParallelArgs(strategy="hsdp", shard_size=2), CPU)
        assert mesh["shard"].mesh.tolist() == [4, 5]
        assert mesh["replicate"].mesh.tolist() == [1, 3, 5, 7]
        with pytest.raises(UserError, match=r"shard_size: 3 does not divide the 8 ranks"):
            build_mesh("hsdp", ParallelArgs(strategy="hsdp", shard_size=3), CPU)
    finally:
        torch.distributed.destroy_process_group()


def test_cpu_computes_in_float32():
    assert compute_dtype("auto", CPU) is torch.float32
    assert compute_dtype("bfloat16", CPU) is torch.bfloat16
