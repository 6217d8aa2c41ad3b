"""Rows of a batch: several short samples behind each other, or samples of like length side by side.

What goes into which row follows from the draws and their lengths alone, before anything is read, so that it does
not depend on the number of ranks.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Literal

import numpy as np

from finetune.data.order import Draw

Packing = Literal["pack", "bucket", "none"]
Row = tuple[Draw, ...]
# Draws to choose from: enough that the last gap of a row is smaller than nearly every sample.
LOOK_AHEAD = 256
# Neighbours in length that stay together: the batches of a step may be cut from them anywhere.
BUCKET_SIZE = 32


def rows_of(
    draws: Iterator[Draw],
    num_frames: Callable[[Draw], int],
    packing: Packing,
    capacity: int,
    pending: list[Draw],
    seed: int,
) -> Iterator[Row]:
    """Group draws into rows, without end if there is no end of draws.

    Args:
        capacity: frames in a row.
        pending: draws that were taken but are in no row yet; changed in place, so that together with the state
            of `draws` it is the state of the rows.
    """
    if packing == "none":
        return ((draw,) for draw in draws)
    if packing == "bucket":
        return _bucketed(draws, num_frames, pending, seed)
    return _packed(draws, num_frames, capacity, pending)


def _packed(
    draws: Iterator[Draw], num_frames: Callable[[Draw], int], capacity: int, pending: list[Draw]
) -> Iterator[Row]:
    """Best fit: the draw that waits longest opens a row, then always the longest that still fits."""
    waiting: dict[int, Draw] = {}  # by arrival
    by_length: list[tuple[int, int]] = []  # (frames, -arrival), sorted: of equal ones the first to come is last
    arrivals = count()

    def add(draw: Draw) -> None:
        arrival = next(arrivals)
        waiting[arrival] = draw
        insort(by_length, (num_frames(draw), -arrival))

    for draw in pending:
        add(draw)
    while True:
        for draw in islice(draws, LOOK_AHEAD - len(waiting)):
            add(draw)
        if not waiting:
            return
        oldest = next(iter(waiting))
        place = bisect_left(by_length, (num_frames(waiting[oldest]), -oldest))
        row, room = [], capacity
        while place >= 0:
            length, negative_arrival = by_length.pop(place)
            row.append(waiting.pop(-negative_arrival))
            room -= length
            place = bisect_right(by_length, (room, 0)) - 1
        pending[:] = waiting.values()
        yield tuple(row)


def _bucketed(
    draws: Iterator[Draw], num_frames: Callable[[Draw], int], pending: list[Draw], seed: int
) -> Iterator[Row]:
    """Look ahead, sort by length, and shuffle buckets of neighbours."""
    while True:
        if not pending:
            seen = sorted(islice(draws, LOOK_AHEAD), key=num_frames)
            buckets = [seen[start : start + BUCKET_SIZE] for start in range(0, len(seen), BUCKET_SIZE)]
            if not buckets:
                return
            first = min((draw.epoch, draw.source, draw.window) for draw in seen)
            order = np.random.default_rng([seed, *first]).permutation(len(buckets))
            pending.extend(draw for index in order for draw in buckets[index])
        yield (pending.pop(0),)
