"""The order in which windows are drawn: one sequence for the whole run, of which every rank takes its share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Draw:
    source: int
    window: int
    """Index among the source's windows."""
    epoch: int
    """How often the source was gone through before."""


class DrawOrder:
    """An endless sequence of draws.

    Within a source every window comes exactly once an epoch, in an order that depends on (seed, epoch) only.
    Between sources the one that lags most behind its weight is next, so that every prefix of the sequence
    keeps the proportions within one draw.

    Args:
        num_windows: of each source.
        weights: of each source, summing to 1.
    """

    def __init__(self, num_windows: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool):
        self._num_windows = list(num_windows)
        self._weights = np.asarray(weights)
        self._seed = seed
        self._shuffle = shuffle
        self._drawn: np.ndarray = np.zeros(len(self._num_windows), dtype=np.int64)
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> "DrawOrder":
        return self

    def __next__(self) -> Draw:
        lag = self._weights * (self._drawn.sum() + 1) - self._drawn
        source = int(lag.argmax())
        epoch, position = divmod(int(self._drawn[source]), self._num_windows[source])
        self._drawn[source] += 1
        return Draw(source, int(self._epoch_order(source, epoch)[position]), epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = np.asarray(state["drawn"], dtype=np.int64)

    def _epoch_order(self, source: int, epoch: int) -> np.ndarray:
        cached = self._permutations.get(source)
        if cached is None or cached[0] != epoch:
            indices = np.arange(self._num_windows[source])
            if self._shuffle:
                np.random.default_rng([self._seed, source, epoch]).shuffle(indices)
            self._permutations[source] = (epoch, indices)
            return indices
        return cached[1]
