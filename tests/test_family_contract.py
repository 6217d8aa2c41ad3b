"""What every family must hold, whichever it is; a new family joins by a fixture in MAKERS."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from conftest import CPU, QUICKSTART, make_csm, make_moshi, write_config
from finetune import args as configuration
from finetune.data.types import ABSENT, collate
from finetune.families import FAMILIES, args_class, family_class
from finetune.families.base import Family
from finetune.lora import adapter_parameters, merge_into
from finetune.loss import denominators, local_loss
from finetune.parallel import materialize

MAKERS = {"csm": make_csm, "moshi": make_moshi}
"""Writes a tiny untrained model of a family into a folder."""


def test_every_registered_family_is_covered():
    assert MAKERS.keys() == FAMILIES.keys()


@pytest.fixture(params=sorted(FAMILIES))
def run(request, config, tmp_path):
    """Settings, family, model and one batch of real speech."""
    folder: Path = MAKERS[request.param](tmp_path / "model")
    config["model"] = {"family": request.param, "hf_repo_id": None, "path": str(folder)}
    config["data"]["max_frames"] = 256  # of conversations
    config |= {"finetuning": "full", "gradient_checkpointing": False, "do_ckpt": True}
    args = configuration.load(write_config(tmp_path, config), {}, args_class)
    family = train.build_family(args, CPU)
    model, groups = train.build_model(args, family, torch.float32, CPU)
    batches = iter(train.build_loader(args, family, evaluation=False))
    batch = next(batches)
    batches.close()
    return args, family, model, groups, batch


def test_shapes_and_weights_belong_together(run):
    _, family, model, _, batch = run
    batch_size, num_streams, num_frames = batch.codes_BKT.shape
    assert batch.loss_weight_BKT.shape == batch.codes_BKT.shape
    assert batch.segment_BT.shape == (batch_size, num_frames)
    assert (batch.loss_weight_BKT[batch.codes_BKT == ABSENT] == 0).all()
    supervised = batch.loss_weight_BKT.sum((0, 2)) > 0
    rows_of_terms = {row for term in family.terms for row in range(*term.rows.indices(num_streams))}
    assert {row for row in range(num_streams) if supervised[row]} == rows_of_terms
    nll_BKT = family.nll(model, batch)
    assert nll_BKT.shape == batch.codes_BKT.shape
    assert nll_BKT.isfinite().all()
    assert ((nll_BKT > 0) == (batch.loss_weight_BKT > 0)).all()


def test_nothing_is_predicted_from_itself_or_the_future(run):
    """Changing a frame's codes moves no likelihood of an earlier frame, delays apart."""
    _, family, model, _, batch = run
    before = family.nll(model, batch).detach()
    frame = batch.codes_BKT.shape[-1] // 2
    later = batch.codes_BKT[:, :, frame:]
    batch.codes_BKT[:, :, frame:] = torch.where(later > 0, later - 1, later)  # what is absent stays so
    after = family.nll(model, batch).detach()
    untouched = slice(0, frame - 2)  # the longest delay of the families' tiny models
    torch.testing.assert_close(after[..., untouched], before[..., untouched], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[..., frame:], before[..., frame:])


def test_groups_cover_every_trained_parameter_once(run):
    _, _, model, groups, _ = run
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_blocks_are_modules_of_the_model_inner_ones_first(run):
    _, family, model, _, _ = run
    blocks = family.blocks(model)
    assert blocks
    order = {id(module): number for number, module in enumerate(model.modules())}
    for outer_at, outer in enumerate(blocks):
        assert id(outer) in order
        inner = {id(module) for module in outer.modules()} - {id(outer)}
        assert not inner & {id(block) for block in blocks[outer_at:]}


def test_parts_hold_every_parameter_once(run):
    _, family, model, _, _ = run
    held = [
        id(parameter)
        for modules in family.parts(model).values()
        for module in modules
        for parameter in module.parameters()
    ]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_an_export_is_a_model_with_the_same_losses(run, tmp_path):
    """Weights that are not the base's, through a checkpoint and back into a family of its own."""
    args, family, model, _, batch = run
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    args.run_dir = str(tmp_path / "run")
    train.build_checkpointer(args, family, torch.float32).save(model, step=1)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_000001" / "consolidated"
    again = family_class(args.model.family)(replace(args.model, path=str(folder)), CPU)
    loaded = again.create(torch.device("meta"))
    materialize(loaded, again.weights(), CPU, seed=0)
    torch.testing.assert_close(again.nll(loaded, batch), family.nll(model, batch), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_read_back_as_it_was_written(run, tmp_path):
    args, family, _, _, batch = run
    args.finetuning, args.run_dir = "lora", str(tmp_path / "run")
    model, _ = train.build_model(args, family, torch.float32, CPU)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
    train.build_checkpointer(args, family, torch.float32).save(model, step=1)
    settings, tensors = family.read_adapter(tmp_path / "run" / "checkpoints" / "checkpoint_000001" / "consolidated")
    merged = family.create(torch.device("meta"))
    materialize(merged, family.weights(), CPU, seed=0)
    merge_into(merged, tensors, settings.scaling)
    torch.testing.assert_close(family.nll(merged, batch), family.nll(model, batch), rtol=1e-4, atol=1e-4)


def test_one_batch_is_learned(run):
    _, family, model, groups, batch = run
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for _ in range(12):
        term_denominators = denominators([batch], family.terms)
        loss = local_loss(family.nll(model, batch), batch.loss_weight_BKT, family.terms, term_denominators)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_unknown_family_is_named_with_the_known_ones():
    with pytest.raises(train.UserError, match=r"model\.family: 'nope' is not one of .*moshi"):
        family_class("nope")


def test_a_clip_without_audio_weighs_nothing(run):
    args, family, model, _, _ = run
    loader = train.build_loader(args, family, evaluation=True)
    (sample,) = tokenize_empty(family, loader)
    assert (sample.codes_KT == ABSENT).all()
    assert (sample.loss_weight_KT == 0).all()
    # A rank may get nothing else, and must run and learn nothing.
    nll_BKT = family.nll(model, collate([[sample]]))
    assert (nll_BKT == 0).all()
    nll_BKT.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.fixture
def process_group():
    """Of this process alone, for models that are sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("finetuning", ["full", "lora"])
@pytest.mark.parametrize("part", ["each", "ft_embed"])
def test_every_part_trains_in_bfloat16(finetuning, part, run, process_group):
    """Trained weights are float32 beside frozen ones of less; what computes must not mind."""
    args, family, model, _, batch = run
    parts = [[name] for name, modules in family.parts(model).items() if modules] if part == "each" else [None]
    for chosen in parts:
        args.finetuning, args.train_only = finetuning, chosen
        args.lora.ft_embed = part == "ft_embed"
        if finetuning == "lora" and chosen == ["embeddings"]:
            continue  # no linear layer is in it
        trained, groups = train.build_model(args, family, torch.bfloat16, CPU)
        family.nll(trained, batch).sum().backward()
        assert all(p.grad.isfinite().all() for group in groups for p in group["params"] if p.grad is not None)
        assert any((p.grad != 0).any() for group in groups for p in group["params"] if p.grad is not None)


def tokenize_empty(family: Family, loader) -> list:
    return family.tokenize([loader._dataset.empty_clip()], [None])


def test_the_quickstart_data_is_there():
    assert (QUICKSTART / "dialogues" / "train.jsonl").is_file()
