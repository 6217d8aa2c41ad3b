"""One token out of each row of logits: temperature, top-k, top-p, with random numbers that belong to the row.

Shape legend: B rows, K draws, V vocabulary, C candidates, most probable first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.9
    """Divides the logits; 0 takes the most probable token always."""
    top_k: int = 50
    """Only that many of the most probable tokens are drawn from; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens that hold this share of the probability together are drawn from."""
    seed: int = 0
    """Where the random numbers of a row start."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: {self.temperature} is not a number of 0 or more; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is negative; give 0 to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]; give 1 to draw from all tokens")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: {self.seed} is not in [0, 2^63)")


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a row, so that a row draws the same numbers whichever rows are beside it.

    They live on the CPU whatever computes: a GPU then draws what a CPU draws, and all numbers of a step cross in
    one copy that nothing waits for.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_uniform(generators: Sequence[torch.Generator], num_draws: int) -> torch.Tensor:
    """The next numbers [B, K] in [0, 1) of each row, on the CPU."""
    return torch.stack([torch.rand(num_draws, generator=generator) for generator in generators])


def sample(logits_BV: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token id [B] a row.

    The candidates of a row stand side by side in [0, 1), each as wide as it is probable, and the row's random number
    points at one of them. Temperature comes before top-k and top-k before top-p, as in transformers.

    Args:
        uniform_B: a float32 in [0, 1) for each row, on the device of the logits; greedy sampling ignores it.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    num_candidates = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    logits_BC, ids_BC = logits_BV.float().topk(num_candidates)
    probability_BC = (logits_BC / sampling.temperature).softmax(-1)
    before_BC = probability_BC.cumsum(-1) - probability_BC
    is_kept_BC = before_BC < sampling.top_p
    end_BC = (probability_BC * is_kept_BC).cumsum(-1)
    # The product stays below the last end, also rounded: a float32 below 1 is at most 1 - 2^-24.
    is_passed_BC = end_BC <= uniform_B[:, None] * end_BC[:, -1:]
    return ids_BC.gather(1, is_passed_BC.sum(-1, keepdim=True))[:, 0]
