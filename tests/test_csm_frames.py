"""What of CSM's frames is learned, and what it weighs."""

import numpy as np
import pytest
import torch

from finetune.data.types import ABSENT, Batch
from finetune.families.csm.frames import loss_terms, loss_weights, turn_codes
from finetune.loss import denominators, local_loss

K = 4


def audio(num_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 50, (K, num_frames), generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_turn_is_text_then_audio_then_zeros():
    codes_KT = turn_codes([7, 8, 9], audio(2))
    assert codes_KT[0].tolist() == [7, 8, 9, ABSENT, ABSENT, ABSENT]
    assert (codes_KT[1:, :3] == ABSENT).all()
    assert torch.equal(codes_KT[1:, 3:5], audio(2))
    assert codes_KT[1:, 5].tolist() == [0] * K


def test_cut_audio_and_text_alone_have_no_end():
    assert turn_codes([7], audio(2), is_cut=True).shape == (1 + K, 3)
    assert turn_codes([7, 8], audio(0)).shape == (1 + K, 2)


def test_only_trained_frames_weigh_the_end_among_them():
    context_KT, spoken_KT = turn_codes([1], audio(2)), turn_codes([2, 3], audio(3))
    codes_KT = torch.cat([context_KT, spoken_KT], 1)
    is_trained_T = torch.arange(codes_KT.shape[1]) >= context_KT.shape[1]
    weight_KT = loss_weights(codes_KT, is_trained_T, 1, rng())
    assert (weight_KT[0] == 0).all()
    expected = [0.0] * 4 + [0.0, 0.0] + [1.0] * 4
    assert all(row.tolist() == expected for row in weight_KT[1:])


def test_the_first_position_has_nothing_to_be_predicted_from():
    codes_KT = turn_codes([], audio(3))
    weight_KT = loss_weights(codes_KT, torch.ones(4, dtype=torch.bool), 1, rng())
    assert weight_KT[1].tolist() == [0, 1, 1, 1]
    assert weight_KT[2:, 0].tolist() == [0] * (K - 1)


@pytest.mark.parametrize("num_frames", [1, 3, 15, 16, 100])
def test_amortised_weights_sum_to_those_of_all_frames(num_frames):
    """At least one frame is drawn, however few there are."""
    codes_KT = turn_codes([5], audio(num_frames))
    weight_KT = loss_weights(codes_KT, torch.ones(codes_KT.shape[1], dtype=torch.bool), 16, rng())
    drawn = (weight_KT[2] > 0).sum()
    assert drawn == max(1, round((num_frames + 1) / 16))
    assert weight_KT[2].sum() == pytest.approx(num_frames + 1)
    assert torch.equal(weight_KT[2:], weight_KT[2].expand(K - 1, -1))


def test_another_draw_takes_other_frames():
    codes_KT = turn_codes([5], audio(100))
    is_trained_T = torch.ones(codes_KT.shape[1], dtype=torch.bool)
    first, again, other = (loss_weights(codes_KT, is_trained_T, 16, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_amortised_loss_is_unbiased():
    """Mean over 200 draws within three standard errors of the loss of all frames, for samples of unlike lengths."""
    terms = loss_terms(K, None, None)
    samples = [turn_codes([5], audio(num_frames, seed)) for seed, num_frames in enumerate((5, 40, 170))]
    nlls = [
        torch.rand(codes_KT.shape, generator=torch.Generator().manual_seed(9)) * 5 + i
        for i, codes_KT in enumerate(samples)
    ]

    def loss(amortization: int, seed: int) -> float:
        weights = [
            loss_weights(
                codes_KT, torch.ones(codes_KT.shape[1], dtype=torch.bool), amortization, rng(seed * 10 + index)
            )
            for index, codes_KT in enumerate(samples)
        ]
        weight_BKT = torch.cat(weights, 1)[None]
        batch = Batch(torch.cat(samples, 1)[None], weight_BKT, torch.zeros(1, weight_BKT.shape[-1]), 0.0)
        return local_loss(torch.cat(nlls, 1)[None], weight_BKT, terms, denominators([batch], terms)).item()

    drawn = torch.tensor([loss(16, seed) for seed in range(200)])
    assert drawn.std() > 0
    assert abs(drawn.mean() - loss(1, 0)) < 3 * drawn.std() / 200**0.5


@pytest.mark.parametrize("multiplier", [1.0, 31.0, 100.0])
def test_both_spellings_of_the_balance_mean_the_same(multiplier):
    """(m·c0 + 31·depth)/(m + 31), or (1 - w)·c0 + w·depth with w = 31/(m + 31)."""
    ours = [term.coefficient for term in loss_terms(32, multiplier, None)]
    assert ours == pytest.approx([multiplier / (multiplier + 31), 31 / (multiplier + 31)])
    assert ours == pytest.approx([term.coefficient for term in loss_terms(32, None, 31 / (multiplier + 31))])


def test_by_default_both_halves_weigh_alike():
    assert [term.coefficient for term in loss_terms(32, None, None)] == [0.5, 0.5]
    assert [term.rows for term in loss_terms(32, None, None)] == [slice(1, 2), slice(2, 33)]
