"""What a run saves loads in moshi's own programs and gives the training model's numbers."""

import json
from pathlib import Path

import pytest
import torch
from moshi.models import LMGen
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file
from torch import nn

import train
from conftest import CPU, write_config
from finetune import args as configuration
from finetune.checkpoint import Checkpointer
from finetune.families import args_class
from merge_adapter import merge_moshi
from test_moshi_parity import our_loss, random_batch


def trained(config: dict, folder: Path, **changes):
    """A run's family, model (adapters away from zero) and settings, after nothing but building them."""
    path = write_config(folder, config | changes)
    args = configuration.load(path, {}, args_class)
    family = train.build_family(args, CPU)
    model, _ = train.build_model(args, family, torch.float32, CPU)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return args, family, model


def save(args, family, model, step=7, **how) -> Path:
    checkpointer = train.build_checkpointer(args, family, torch.float32)
    assert checkpointer is not None
    checkpointer.save(model, step, **how)
    return Path(args.run_dir) / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"


def head_logits(model: nn.Module, run) -> list[torch.Tensor]:
    """What every prediction head puts out while `run` runs, one matrix [N, vocabulary] a head."""
    seen = []
    hooks = [
        head.register_forward_hook(lambda _, __, output: seen.append(output.detach().flatten(0, -2)))
        for head in (model.text_linear, *model.linears)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def assert_same_logits(family, model, loaded) -> None:
    batch = random_batch(family)
    batch.codes_BKT.clamp_(min=0)
    batch.loss_weight_BKT.fill_(1.0)
    ours = head_logits(model.eval(), lambda: family.nll(model, batch))
    theirs = head_logits(loaded.eval(), lambda: loaded(batch.codes_BKT))
    assert len(ours) == len(theirs) == 9
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def load_with_moshi(consolidated: Path, *, fuse_lora: bool) -> tuple[CheckpointInfo, nn.Module]:
    """As `python -m moshi.server` does, with nothing but the two files of the checkpoint."""
    weights = {
        {"lora.safetensors": "lora_weights", "consolidated.safetensors": "moshi_weights"}[file.name]: file
        for file in consolidated.glob("*.safetensors")
    }
    info = CheckpointInfo.from_hf_repo("nobody/nothing", config_path=consolidated / "config.json", **weights)
    return info, info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=fuse_lora)


@pytest.mark.parametrize("fuse_lora", [True, False])
@pytest.mark.parametrize("ft_embed", [True, False])
def test_adapters_load_in_moshi(config, tmp_path, fuse_lora, ft_embed):
    lora = {"rank": 3, "scaling": 1.7, "ft_embed": ft_embed}
    args, family, model = trained(config, tmp_path, do_ckpt=True, lora=lora)
    consolidated = save(args, family, model)
    names = load_file(consolidated / "lora.safetensors").keys()
    assert "transformer.layers.0.self_attn.in_projs.0.lora_A.weight" in names
    assert ("text_emb.weight" in names) == ft_embed
    saved = json.loads((consolidated / "config.json").read_text())
    assert (saved["lora"], saved["lora_rank"], saved["lora_scaling"]) == (True, 3, 1.7)
    _, loaded = load_with_moshi(consolidated, fuse_lora=fuse_lora)
    assert_same_logits(family, model, loaded)


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_merged_weights_load_in_moshi(config, tmp_path, finetuning):
    args, family, model = trained(config, tmp_path, do_ckpt=True, save_adapters=False, finetuning=finetuning)
    consolidated = save(args, family, model)
    assert json.loads((consolidated / "config.json").read_text())["lora"] is False
    _, loaded = load_with_moshi(consolidated, fuse_lora=False)
    assert_same_logits(family, model, loaded)


@pytest.mark.parametrize("streamed_model", ["fused", "adapters", "the training model itself"])
def test_moshis_generator_streams_a_checkpoint(config, tmp_path, streamed_model):
    """LMGen's greedy dialogue, taught to the training forward, gives its text logits and audio codes back."""
    args, family, model = trained(config, tmp_path, do_ckpt=True)
    info, loaded = load_with_moshi(save(args, family, model), fuse_lora=streamed_model == "fused")
    if streamed_model == "the training model itself":
        loaded = model.eval()
    mimi = info.get_mimi(device="cpu")
    user_codes_BKT = mimi.encode(0.1 * torch.randn(1, 1, 20 * 1920))
    streamed, tokens = [], []
    generator = LMGen(loaded, use_sampling=False, on_text_logits_hook=lambda logits: streamed.append(logits))
    with torch.no_grad(), generator.streaming(1):
        for frame in range(user_codes_BKT.shape[-1]):
            out = generator.step(user_codes_BKT[..., frame : frame + 1])
            if out is not None:
                tokens.append(out)
    generated_BKT = torch.cat(tokens, -1)
    assert generated_BKT.shape == (1, 9, user_codes_BKT.shape[-1] - 1)
    assert mimi.decode(generated_BKT[:, 1:]).shape[-1] == generated_BKT.shape[-1] * 1920
    # Teacher forcing: the same tokens through the training forward.
    num_frames = generated_BKT.shape[-1]
    # LMGen replaces what it is given at its first step by the initial tokens (moshi/server.py gives it twice).
    codes_BKT = torch.cat([generated_BKT, user_codes_BKT[..., 1 : 1 + num_frames]], 1)
    batch = random_batch(family, num_frames=num_frames, batch_size=2)
    batch.codes_BKT.copy_(codes_BKT.expand(2, -1, -1))
    batch.loss_weight_BKT.fill_(1.0)
    text_logits, *audio_logits = head_logits(model.eval(), lambda: family.nll(model, batch))
    streamed_logits = torch.cat(streamed)[:num_frames, 0, 0]
    torch.testing.assert_close(streamed_logits, text_logits[:num_frames], rtol=1e-4, atol=1e-4)
    for codebook, logits in enumerate(audio_logits, 1):
        delay = model.delays[codebook]
        greedy = logits[delay:num_frames].argmax(-1)
        assert torch.equal(greedy, generated_BKT[0, codebook, : num_frames - delay]), codebook


def test_a_merged_weight_is_rounded_once(config, tmp_path):
    args, family, model = trained(config, tmp_path, do_ckpt=True, save_adapters=False)
    writer = Checkpointer(
        Path(args.run_dir), family, lora=args.lora, adapters_only=False, dtype=torch.bfloat16, num_keep=None
    )
    writer.save(model, 1)
    saved = load_file(Path(args.run_dir) / "checkpoints/checkpoint_000001/consolidated/consolidated.safetensors")
    layer = model.transformer.layers[0].self_attn.out_projs[0]
    exact = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.equal(saved["transformer.layers.0.self_attn.out_projs.0.weight"], exact.to(torch.bfloat16))
    assert not any("lora" in name for name in saved)


def test_the_newest_and_the_best_are_kept(config, tmp_path):
    args, family, model = trained(config, tmp_path, do_ckpt=True, num_ckpt_keep=2)
    for step, is_best in [(1, True), (2, True), (3, False), (4, False), (1_000_000, False)]:
        save(args, family, model, step=step, is_best=is_best)
    folder = Path(args.run_dir) / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best", "checkpoint_000002", "checkpoint_000004", "checkpoint_1000000"]
    assert (folder / "best").resolve().name == "checkpoint_000002"


def test_training_goes_on_from_a_merged_checkpoint(config, tmp_path):
    args, family, model = trained(config, tmp_path, do_ckpt=True, save_adapters=False)
    consolidated = save(args, family, model)
    assert json.loads((consolidated / "config.json").read_text())["moshi_name"] == "consolidated.safetensors"
    section = {"family": "moshi", "hf_repo_id": None, "path": str(consolidated)}
    again = configuration.load(write_config(tmp_path, config | {"model": section}), {}, args_class)
    continued, _ = train.build_model(again, train.build_family(again, CPU), torch.float32, CPU)
    _, merged = load_with_moshi(consolidated, fuse_lora=False)
    for name, expected in merged.named_parameters():
        assert torch.equal(continued.state_dict()[name], expected), name


def test_an_adapter_is_merged_later(config, tmp_path):
    """The script gives what `save_adapters: false` would have saved."""
    args, family, model = trained(config, tmp_path, do_ckpt=True)
    merge_moshi(save(args, family, model), tmp_path / "merged", torch.float32)
    _, merged = load_with_moshi(tmp_path / "merged", fuse_lora=False)
    assert_same_logits(family, model, merged)
    section = {"hf_repo_id": None, "path": str(tmp_path / "merged")}
    again = configuration.load(write_config(tmp_path, config | {"model": section}), {}, args_class)
    train.build_model(again, train.build_family(again, CPU), torch.float32, CPU)


def test_training_from_an_adapters_config_is_refused(config, tmp_path):
    args, family, model = trained(config, tmp_path, do_ckpt=True)
    section = {"hf_repo_id": None, "path": str(save(args, family, model))}
    again = configuration.load(write_config(tmp_path, config | {"model": section}), {}, args_class)
    with pytest.raises(train.UserError, match=r"describes an adapter .* merge it first"):
        train.build_family(again, CPU)


def test_a_crash_while_writing_leaves_no_checkpoint(config, tmp_path, monkeypatch):
    args, family, model = trained(config, tmp_path, do_ckpt=True)
    monkeypatch.setattr(family, "export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(args, family, model)
    assert not list((Path(args.run_dir) / "checkpoints").glob("checkpoint_*"))


def test_the_base_is_exported_unchanged_by_an_untouched_adapter(config, tmp_path, tiny_moshi):
    """B starts at zero, so merging at step 0 gives the base back, bit for bit in its own type."""
    path = write_config(tmp_path, config | {"do_ckpt": True, "save_adapters": False})
    args = configuration.load(path, {}, args_class)
    family = train.build_family(args, CPU)
    model, _ = train.build_model(args, family, torch.float32, CPU)
    assert our_loss(family, model, random_batch(family)).isfinite()
    saved = load_file(save(args, family, model) / "consolidated.safetensors")
    for name, expected in load_file(tiny_moshi / "model.safetensors").items():
        assert torch.equal(saved[name], expected.float()), name
