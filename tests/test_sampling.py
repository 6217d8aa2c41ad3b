"""Sampling against transformers' filters and a distribution counted out by hand."""

import math

import pytest
import torch

from finetune.sampling import Sampling, draw_uniform, row_generators, sample

VOCABULARY = 23
FILTERS = [
    Sampling(temperature=1.0, top_k=0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_k=0, top_p=0.6),
    Sampling(temperature=0.9, top_k=8, top_p=0.8),
    Sampling(temperature=2.0, top_k=100, top_p=0.05),
    Sampling(temperature=1.0, top_k=1),
]


def plain_distribution(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Probabilities by token, with loops."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: sampling.top_k or None]
    masses = {token: math.exp(logits[token] / sampling.temperature) for token in order}
    total, before, kept = sum(masses.values()), 0.0, {}
    for token in order:
        if before < sampling.top_p:
            kept[token] = masses[token]
        before += masses[token] / total
    return {token: mass / sum(kept.values()) for token, mass in kept.items()}


@pytest.mark.parametrize("sampling", FILTERS)
def test_tokens_come_as_often_as_they_are_probable(sampling):
    logits_V = 3 * torch.randn(VOCABULARY)
    num_draws = 4000
    even = (torch.arange(num_draws) + 0.5) / num_draws  # every share of [0, 1) once
    counts = sample(logits_V.expand(num_draws, -1), sampling, even).bincount(minlength=VOCABULARY)
    expected = plain_distribution(logits_V.tolist(), sampling)
    for token in range(VOCABULARY):
        assert abs(counts[token].item() / num_draws - expected.get(token, 0.0)) <= 1.5 / num_draws


@pytest.mark.parametrize("sampling", FILTERS)
def test_what_is_drawn_from_equals_transformers(sampling):
    processes = pytest.importorskip("transformers", reason="the extra `transformers` is not installed").generation
    logits_BV = 3 * torch.randn(50, VOCABULARY)
    scores_BV = processes.TemperatureLogitsWarper(sampling.temperature)(None, logits_BV)
    if sampling.top_k:
        scores_BV = processes.TopKLogitsWarper(sampling.top_k)(None, scores_BV)
    scores_BV = processes.TopPLogitsWarper(sampling.top_p)(None, scores_BV)
    num_draws = 20000
    even = (torch.arange(num_draws) + 0.5) / num_draws
    for logits_V, probability_V in zip(logits_BV, scores_BV.softmax(-1), strict=True):
        counts = sample(logits_V.expand(num_draws, -1), sampling, even).bincount(minlength=VOCABULARY)
        torch.testing.assert_close(counts / num_draws, probability_V, rtol=0, atol=1.5 / num_draws)


def test_temperature_zero_takes_the_most_probable():
    logits_BV = torch.randn(6, VOCABULARY)
    greedy = Sampling(temperature=0.0, top_k=3, top_p=0.5)
    assert torch.equal(sample(logits_BV, greedy, torch.rand(6)), logits_BV.argmax(-1))
    for temperature in (1e-6, 1e-30, 1e-40):  # the last one makes infinities of the logits
        almost = sample(logits_BV, Sampling(temperature=temperature), torch.rand(6))
        assert torch.equal(almost, logits_BV.argmax(-1))


def test_the_largest_number_below_one_draws_the_last_candidate():
    largest = torch.tensor([1 - 2**-24])
    for top_k in range(1, 60):
        logits_1V = torch.randn(60).sort(descending=True).values[None]
        drawn = sample(logits_1V, Sampling(temperature=50.0, top_k=top_k), largest)
        assert drawn.item() == top_k - 1


def test_half_precision_is_drawn_from_in_float32():
    logits_BV = torch.randn(500, VOCABULARY).bfloat16()
    uniform_B = torch.rand(500)
    assert torch.equal(sample(logits_BV, Sampling(), uniform_B), sample(logits_BV.float(), Sampling(), uniform_B))


def test_a_row_draws_its_own_numbers():
    alone = row_generators([7])
    among = row_generators([3, 7, 9])
    for num_draws in (4, 1, 5):
        own_1K, all_BK = draw_uniform(alone, num_draws), draw_uniform(among, num_draws)
        assert torch.equal(own_1K[0], all_BK[1])
        assert not torch.equal(all_BK[0], all_BK[2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: "):
        Sampling(**{field: value})
