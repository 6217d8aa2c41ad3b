"""Losses and gradients equal moshi's own LMModel with an independent, plain computation of the loss."""

import json

import pytest
import torch
from moshi.conditioners import ConditionAttributes
from moshi.models import loaders
from moshi.modules.lora import LoRALinear as UpstreamLoRALinear
from moshi.modules.lora import replace_all_linear_with_lora
from torch import nn
from torch.nn import functional as F

from conftest import CPU, make_moshi, moshi_args
from finetune.args import LoraArgs
from finetune.data.types import ABSENT, Batch
from finetune.families.moshi import MoshiFamily
from finetune.lora import add_adapters
from finetune.loss import denominators, local_loss
from finetune.parallel import materialize

HIBIKI_LIKE = {"n_q": 16, "dep_q": 6, "delays": [0, 0] + [2] * 5 + [1] + [2] * 9}
VARIANTS = {
    "moshi": {},
    "hibiki": HIBIKI_LIKE,
    "one_way": {"n_q": 8, "dep_q": 8, "delays": [0, 0] + [1] * 7},
    "text_only": {"n_q": 8, "dep_q": 0, "delays": [3] + [0] * 8},
    "shared_depformer_weights": {"depformer_weights_per_step_schedule": [0, 1, 2, 2, 3, 3, 3, 3]},
    "one_depformer_weight": {"depformer_weights_per_step": False, "depformer_multi_linear": False},
    "plain_feed_forward": {
        "gating": "none",
        "depformer_gating": "silu",
        "norm": "layer_norm",
        "layer_scale": 0.1,
        "positional_embedding": "sin_rope",
        "depformer_pos_emb": "sin",
    },
    "rope_halves": {"positional_embedding": "rope_concat", "depformer_pos_emb": "rope", "norm": "rms_norm"},
    "short_context": {"context": 7},
    "low_rank_embeddings": {"depformer_low_rank_embeddings": 8, "depformer_norm": "layer_norm"},
    "grouped_keys": {"kv_repeat": 2},
    "conditioned": {
        "conditioners": {
            "mood": {"type": "lut", "lut": {"n_bins": 5, "dim": 6, "tokenizer": "noop"}},
            "place": {"type": "lut", "lut": {"n_bins": 5, "dim": 6, "tokenizer": "noop"}},
        },
        "fuser": {"sum": ["mood"], "cross": ["place"], "cross_attention_pos_emb": True},
        "cross_attention": True,
    },
}


def random_batch(family: MoshiFamily, num_frames: int = 23, batch_size: int = 2) -> Batch:
    """Random codes with an absent tail and a silent text frame, and the family's loss weights."""
    kwargs = family._lm_kwargs
    text = torch.randint(0, 9, (batch_size, 1, num_frames))  # padding (3) and end of padding (0) among them
    audio = torch.randint(0, kwargs["card"], (batch_size, kwargs["n_q"], num_frames))
    codes_BKT = torch.cat([text, audio], 1)
    codes_BKT[0, :, -5:] = ABSENT
    codes_BKT[1, 0, :2] = ABSENT
    weights = torch.stack([family._loss_weights(codes, evaluation=False) for codes in codes_BKT])
    segment_BT = torch.zeros(batch_size, num_frames, dtype=torch.int64)
    conditions = ({"mood": "gay", "place": "home"}, {"mood": "sad"})
    return Batch(codes_BKT, weights, segment_BT, audio_sec=1.0, conditions=conditions)


def load_pair(folder, **changes) -> tuple[MoshiFamily, nn.Module, nn.Module]:
    """Our model and moshi's, from the same file, in float32."""
    family = MoshiFamily(
        moshi_args(folder, first_codebook_weight_multiplier=10.0, text_padding_weight=0.3, **changes), CPU
    )
    ours = family.create(torch.device("meta"))
    materialize(ours, family.weights(), CPU, seed=0)
    kwargs = json.loads((folder / "config.json").read_text())
    for key in ("mimi_name", "mimi_config_name", "tokenizer_name"):
        kwargs.pop(key)
    theirs = loaders.get_moshi_lm(folder / "model.safetensors", kwargs, dtype=torch.float32)
    return family, ours.train(), theirs.train()


def reference_loss(model: nn.Module, batch: Batch, first_codebook: float, padding: float) -> torch.Tensor:
    """moshi-finetune's loss, computed in another way: logits of everything, loops over streams."""
    conditions = None
    if model.condition_provider is not None:
        names = model.condition_provider.text_conditions
        attributes = [ConditionAttributes(text={name: given.get(name) for name in names}) for given in batch.conditions]
        conditions = model.condition_provider.prepare_and_provide(attributes)
    if model.dep_q == 0:
        return reference_text_loss_without_depformer(model, batch, padding)
    output = model(batch.codes_BKT, conditions)
    target_BT = batch.codes_BKT[:, 0]
    weight_BT = output.text_mask[:, 0] * torch.where((target_BT == 3) | (target_BT == 0), padding, 1.0)
    losses = [weighted_mean([output.text_logits[:, 0]], [target_BT], [weight_BT])]
    audio_weights = output.mask.float()
    audio_weights[:, 0] *= first_codebook
    targets = batch.codes_BKT[:, 1 : 1 + model.dep_q]
    losses.append(weighted_mean(output.logits.unbind(1), targets.unbind(1), audio_weights.unbind(1)))
    return sum(losses)


def reference_text_loss_without_depformer(model, batch, padding):
    """moshi's own forward needs a Depformer; its `forward_text` does not."""
    codes, delay = batch.codes_BKT, model.delays[0]
    initial = model._get_initial_token().expand(len(codes), -1, -1)
    delayed = codes.clone()
    delayed[:, 0, delay:], delayed[:, :1, :delay] = codes[:, 0, :-delay], initial[:, :1]
    _, logits = model.forward_text(torch.cat([initial, delayed[..., :-1]], -1))
    target_BT = codes[:, 0, :-delay]
    weight_BT = (target_BT != ABSENT) * torch.where((target_BT == 3) | (target_BT == 0), padding, 1.0)
    return weighted_mean([logits[:, 0, delay:]], [target_BT], [weight_BT])


def weighted_mean(logits, targets, weights) -> torch.Tensor:
    total, count = torch.zeros(()), torch.zeros(())
    for logits_BTV, target_BT, weight_BT in zip(logits, targets, weights, strict=True):
        keep = weight_BT > 0
        log_probability = F.log_softmax(logits_BTV[keep], -1)
        picked = log_probability.gather(-1, target_BT[keep][:, None])[:, 0]
        total = total - (picked * weight_BT[keep]).sum()
        count = count + weight_BT[keep].sum()
    return total / count


def our_loss(family: MoshiFamily, model: nn.Module, batch: Batch) -> torch.Tensor:
    nll_BKT = family.nll(model, batch)
    assert (nll_BKT[batch.loss_weight_BKT == 0] == 0).all()
    return local_loss(nll_BKT, batch.loss_weight_BKT, family.terms, denominators([batch], family.terms))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_moshis(variant, tmp_path):
    folder = make_moshi(tmp_path / "model", **VARIANTS[variant])
    family, ours, theirs = load_pair(folder)
    batch = random_batch(family)
    loss, reference = our_loss(family, ours, batch), reference_loss(theirs, batch, 10.0, 0.3)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    loss.backward()
    reference.backward()
    for (name, parameter), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        got = parameter.grad if parameter.grad is not None else torch.zeros(())
        want = expected.grad if expected.grad is not None else torch.zeros(())
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", ["moshi", "shared_depformer_weights"])
def test_adapter_gradients_equal_moshis(variant, tmp_path):
    folder = make_moshi(tmp_path / "model", **VARIANTS[variant])
    family, ours, theirs = load_pair(folder)
    add_adapters(ours, LoraArgs(rank=3, scaling=1.5))
    replace_all_linear_with_lora(theirs, 3, 1.5)
    for name, parameter in ours.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, UpstreamLoRALinear)}
    for name, layer in layers.items():
        layer.lora_A.weight.data = ours.get_submodule(name).lora_A.weight.data.clone()
        layer.lora_B.weight.data = ours.get_submodule(name).lora_B.weight.data.clone()
    batch = random_batch(family)
    loss, reference = our_loss(family, ours, batch), reference_loss(theirs, batch, 10.0, 0.3)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    loss.backward()
    reference.backward()
    for name, layer in layers.items():
        mine = ours.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            got, want = getattr(mine, half).weight.grad, getattr(layer, half).weight.grad
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=f"{name}.{half}")


def test_chunks_and_recomputation_change_nothing(tiny_moshi, monkeypatch):
    family, model, _ = load_pair(tiny_moshi)
    batch = random_batch(family)
    whole = our_loss(family, model, batch)
    whole.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr("moshi_overrides.training_lm.MAX_LOGITS", 4000)
    monkeypatch.setattr("moshi_overrides.attention.MAX_ATTENTION_BATCH", 5)
    chunked = our_loss(family, model, batch)
    chunked.backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_batch_without_any_target_has_no_loss(family, tiny_moshi):
    _, model, _ = load_pair(tiny_moshi)
    batch = random_batch(family)
    batch.codes_BKT.fill_(ABSENT)
    batch.loss_weight_BKT.zero_()
    loss = our_loss(family, model, batch)
    assert loss.item() == 0.0
    loss.backward()
