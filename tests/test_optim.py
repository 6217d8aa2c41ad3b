"""Schedules, clipping, and adapters' initial weights."""

import sys

import pytest
import torch
from torch import nn

from finetune.args import LoraArgs, OptimArgs
from finetune.errors import UserError
from finetune.lora import LoRALinear, adapted_layers, add_adapters, initial_adapter_weight, merge_into, merged_weight
from finetune.optim import build_optimizer, build_schedule, clip_gradients


def learning_rates(schedule: str, max_steps: int = 100, pct_start: float = 0.1) -> tuple[list[float], list[float]]:
    """Learning rate and beta1 that every step sees."""
    args = OptimArgs(lr=1.0, schedule=schedule, pct_start=pct_start)
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], args)
    stepper = build_schedule(optimizer, args, max_steps)
    rates, betas = [], []
    for _ in range(max_steps):
        rates.append(stepper.get_last_lr()[0])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        stepper.step()
    return rates, betas


def test_one_cycle_is_torchs_and_cycles_beta1():
    rates, betas = learning_rates("one_cycle")
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 / 250_000, rel=1e-3)
    assert betas[0] == pytest.approx(0.95)
    assert min(betas) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]
)
def test_other_schedules_warm_up_and_leave_beta1(schedule, middle, last):
    rates, betas = learning_rates(schedule)
    assert rates[0] < rates[5] < rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(middle, abs=0.01)
    assert rates[-1] == pytest.approx(last, abs=0.02)
    assert set(betas) == {0.9}


@pytest.mark.parametrize("pct_start", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "linear", "constant"])
def test_no_warm_up_one_step_of_it_and_nothing_else(schedule, pct_start):
    """Ten steps of which a tenth rise: torch's OneCycleLR divides by zero there, and where all of them do."""
    rates, _ = learning_rates(schedule, max_steps=10, pct_start=pct_start)
    assert all(0 < rate <= 1 for rate in rates)


def test_clipping_is_torchs_and_0_turns_it_off():
    def gradients() -> list[nn.Parameter]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
        for parameter in parameters[:2]:  # the third takes no part
            parameter.grad = 10 * torch.randn(3, 4)
        return parameters

    ours, theirs = gradients(), gradients()
    norm = clip_gradients(ours, 1.0)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item())
    for mine, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    untouched = gradients()
    before = [parameter.grad.clone() for parameter in untouched[:2]]
    assert clip_gradients(untouched, 0.0) == pytest.approx(norm.item())
    assert torch.equal(untouched[0].grad, before[0])
    scaled = gradients()
    for parameter in scaled[:2]:
        parameter.grad *= 1024
    assert clip_gradients(scaled, 0.0, scale=1024.0) == pytest.approx(norm.item())


def test_dropout_falls_on_the_adapter_in_training_alone():
    layer = LoRALinear(nn.Linear(8, 6), LoraArgs(rank=2, dropout=0.5))
    x = torch.randn(64, 8)
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer.train()(x), layer(x))  # the base alone
    nn.init.ones_(layer.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    merged = merged_weight(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, merged, layer.bias))


def test_adapters_start_as_nothing_and_alike_on_every_rank():
    shape = torch.Size([4, 9])
    first = initial_adapter_weight("a.lora_A.weight", shape, seed=1)
    torch.rand(3)  # other use of the global generator changes nothing
    assert torch.equal(first, initial_adapter_weight("a.lora_A.weight", shape, seed=1))
    assert not torch.equal(first, initial_adapter_weight("b.lora_A.weight", shape, seed=1))
    assert not torch.equal(first, initial_adapter_weight("a.lora_A.weight", shape, seed=2))
    assert first.abs().max() <= 1 / 3
    assert (initial_adapter_weight("a.lora_B.weight", shape, seed=1) == 0).all()


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 0.5), (True, 2.0)])
def test_alpha_is_pefts_spelling_of_the_scaling(rslora, scaling):
    assert LoraArgs(rank=16, alpha=8, rslora=rslora).scaling == scaling


def test_adapters_go_inside_what_was_chosen_and_nowhere_else():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    add_adapters(model, LoraArgs(rank=1), [model["a"]])
    assert set(adapted_layers(model)) == {"a.0", "a.1"}
    assert type(model["b"]) is nn.Linear


FIRST, SECOND = {"0.lora_A.weight": torch.ones(2, 4)}, {"0.lora_B.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "holds no tensors"),
        (FIRST, "one half of 0 alone"),
        (SECOND, "one half of 0 alone"),
        (FIRST | {"0.lora_B.weight": torch.ones(2, 3)}, "0 has the shapes"),
        (FIRST | SECOND | {"7.lora_A.weight": torch.ones(2, 4)}, r"7\.lora_A\.weight belongs to no layer"),
        (FIRST | SECOND | {"1.weight": torch.ones(4, 3)}, r"1\.weight has the shapes"),
        (FIRST | SECOND | {"table.weight": torch.ones(4, 3)}, r"table\.weight belongs to no layer"),
    ],
)
def test_an_adapter_of_another_model_is_one_line_and_changes_nothing(tensors, says):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    before = model[0].weight.clone()
    with pytest.raises(UserError, match=says):
        merge_into(model, tensors, 1.0)
    assert torch.equal(model[0].weight, before)
    merge_into(model, FIRST | SECOND, 0.5)
    torch.testing.assert_close(model[0].weight, before + 1)


def test_eight_bit_states_train_like_adamw_and_obey_the_schedule():
    pytest.importorskip("torchao", reason="the extra `lowbit` is not installed")
    torch.compiler.set_stance("force_eager")  # torchao compiles its step: a minute on a small machine
    try:
        ends, rates = [], []
        for name in ("adamw", "adamw8bit"):
            torch.manual_seed(0)
            weight = nn.Parameter(torch.randn(64, 128))
            args = OptimArgs(name=name, lr=1e-2, schedule="cosine")
            optimizer = build_optimizer([{"params": [weight]}], args)
            schedule = build_schedule(optimizer, args, 10)
            rates.append([])
            for _ in range(10):
                (weight - 1).square().sum().backward()
                rates[-1].append(float(schedule.get_last_lr()[0]))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            ends.append(weight.detach())
        moments = optimizer.state[weight]["exp_avg"]
        assert moments.codes.dtype == torch.uint8
        assert rates[0] == pytest.approx(rates[1])
        torch.testing.assert_close(*ends, rtol=0.02, atol=0.02)
    finally:
        torch.compiler.set_stance("default")


def test_a_missing_torchao_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"optim\.name: adamw8bit needs torchao .*lowbit"):
        build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], OptimArgs(name="adamw8bit"))
