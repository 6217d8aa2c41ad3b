"""Rows of samples: what shares a row, in which order, and how little is padding."""

import itertools
import json

import numpy as np
import pytest
import torch

from finetune.data.loader import Loader
from finetune.data.order import Draw, DrawOrder
from finetune.data.packing import BUCKET_SIZE, LOOK_AHEAD, rows_of
from finetune.data.types import ABSENT, Sample, collate, trim

CAPACITY = 200


class Lengths:
    """A dataset whose windows are nothing but their lengths, and read as a sample that holds its number."""

    def __init__(self, *sources):
        self.windows = sources
        self.weights = [1 / len(sources)] * len(sources)

    def num_frames(self, window):
        return window

    def read(self, window):
        return window

    def empty_clip(self):
        return 0


def lengths(count: int, seed: int = 0, low: int = 10, high: int = 120) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def tokenize(windows, generators, num_tail_frames: int = 3):
    samples = []
    for length in windows:
        codes_KT = torch.full((2, length + num_tail_frames), ABSENT)
        codes_KT[:, :length] = length
        samples.append(Sample(codes_KT, (codes_KT != ABSENT).float(), audio_sec=length))
    return samples


def make_loader(dataset, packing: str, **settings) -> Loader:
    settings = {"batch_size": 2, "rank": 0, "world_size": 1, "num_workers": 1, "shuffle": True} | settings
    return Loader(dataset, tokenize, packing=packing, row_frames=CAPACITY, **settings)


def rows(packing: str, dataset: Lengths, count: int, seed: int = 0) -> list[tuple[Draw, ...]]:
    order = DrawOrder([len(windows) for windows in dataset.windows], dataset.weights, seed, shuffle=True)
    found = rows_of(order, lambda draw: dataset.windows[draw.source][draw.window], packing, CAPACITY, [], seed)
    return list(itertools.islice(found, count))


def take(loader: Loader, count: int) -> list:
    batches = iter(loader)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("packing", ["pack", "bucket", "none"])
def test_every_window_comes_once_an_epoch(packing):
    """Two epochs fill the look-ahead exactly, so the first rows hold both of them and nothing else."""
    dataset = Lengths(lengths(LOOK_AHEAD // 2))
    drawn: list[Draw] = []
    for row in rows(packing, dataset, LOOK_AHEAD):
        if len(drawn) >= LOOK_AHEAD:
            break
        drawn += row
    first = [draw for draw in drawn if draw.epoch == 0]
    assert sorted(draw.window for draw in first) == list(range(LOOK_AHEAD // 2))


def test_packed_rows_hold_what_fits_and_nearly_nothing_is_left_over():
    dataset = Lengths(lengths(500))
    packed = rows("pack", dataset, 200)
    used = [sum(dataset.windows[0][draw.window] for draw in row) for row in packed]
    assert max(used) <= CAPACITY
    assert sum(used) > 0.98 * CAPACITY * len(used)
    assert any(len(row) > 2 for row in packed)


def test_no_draw_waits_for_ever():
    """Windows that fit badly are taken too: the one that waits longest opens the next row."""
    dataset = Lengths([150] * 5 + [100] * 500)
    seen = {draw for row in rows("pack", dataset, 300) for draw in row}
    assert {draw.window for draw in seen if draw.epoch == 0} == set(range(505))


def test_a_window_longer_than_a_row_has_one_to_itself():
    dataset = Lengths([CAPACITY + 50, 20])
    assert all(len(row) == 1 for row in rows("pack", dataset, 10) if row[0].window == 0)


def test_buckets_hold_neighbours_in_length_in_shuffled_order():
    dataset = Lengths(lengths(LOOK_AHEAD))
    found = [dataset.windows[0][row[0].window] for row in rows("bucket", dataset, LOOK_AHEAD)]
    buckets = [found[start : start + BUCKET_SIZE] for start in range(0, LOOK_AHEAD, BUCKET_SIZE)]
    assert max(max(bucket) - min(bucket) for bucket in buckets) < 25
    shortest = [min(bucket) for bucket in buckets]
    assert shortest != sorted(shortest)


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_rows_depend_on_the_seed_alone(packing):
    dataset = Lengths(lengths(300))
    assert rows(packing, dataset, 100) == rows(packing, dataset, 100)
    assert rows(packing, dataset, 100) != rows(packing, dataset, 100, seed=1)


@pytest.mark.parametrize("packing", ["pack", "bucket", "none"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_rows_of_one_rank(packing, world_size):
    dataset = Lengths(lengths(40), lengths(17, seed=1))
    single = [
        row
        for batch in take(make_loader(dataset, packing, batch_size=1), 4 * 2 * world_size)
        for row in batch.codes_BKT
    ]
    for rank in range(world_size):
        shared = take(make_loader(dataset, packing, rank=rank, world_size=world_size), 4)
        for number, batch in enumerate(shared):
            for index, codes_KT in enumerate(batch.codes_BKT):
                alone = single[(number * world_size + rank) * 2 + index]
                assert codes_KT[codes_KT != ABSENT].tolist() == alone[alone != ABSENT].tolist()


@pytest.mark.parametrize("packing", ["pack", "bucket", "none"])
def test_a_resumed_loader_goes_on_where_the_other_stopped(packing):
    dataset = Lengths(lengths(60), lengths(45, seed=1))
    loader = make_loader(dataset, packing)
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(batches).codes_BKT for _ in range(5)]
    batches.close()
    resumed = make_loader(dataset, packing)
    resumed.load_state_dict(state)
    assert all(torch.equal(ours.codes_BKT, theirs) for ours, theirs in zip(take(resumed, 5), expected, strict=True))


@pytest.mark.parametrize("packing", ["pack", "bucket", "none"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_evaluation_pass_sees_every_window_once_on_all_ranks_together(packing, world_size):
    dataset = Lengths(lengths(23), lengths(9, seed=1))
    seen: list[int] = []
    num_batches = set()
    for rank in range(world_size):
        loader = make_loader(dataset, packing, once=True, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        num_batches.add(len(batches))
        seen += [length for batch in batches for row in batch.codes_BKT for length in segments_of(row)]
    assert len(num_batches) == 1
    assert sorted(seen) == sorted(dataset.windows[0] + dataset.windows[1])


def segments_of(codes_KT: torch.Tensor) -> list[int]:
    """The samples of a row: each holds its length in every frame, so runs of `n` are multiples of n frames."""
    values, counts = codes_KT[0][codes_KT[0] != ABSENT].unique(return_counts=True)
    return [value for value, count in zip(values.tolist(), counts.tolist(), strict=True) for _ in range(count // value)]


def test_packed_samples_keep_their_tail_and_lie_in_segments():
    samples = [trim(sample, 2) for sample in tokenize([4, 3], [None, None])]
    batch = collate([samples, tokenize([2], [None], num_tail_frames=1)], num_frames=12)
    assert batch.codes_BKT[0, 0].tolist() == [4, 4, 4, 4, -1, -1, 3, 3, 3, -1, -1, -1]
    assert batch.segment_BT[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]
    assert batch.segment_BT[1].tolist() == [0, 0, *[-1] * 10]
    assert batch.loss_weight_BKT[0, 1].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]


def test_an_empty_sample_takes_no_room():
    (sample,) = (trim(sample, 2) for sample in tokenize([0], [None]))
    assert sample.codes_KT.shape == (2, 0)
    assert (collate([[sample]]).segment_BT == -1).all()
