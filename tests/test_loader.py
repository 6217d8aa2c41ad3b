"""Which window comes when and on which rank, and that reading ahead changes nothing and leaves no thread behind."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.dataset import WindowDataset
from finetune.data.loader import Loader
from finetune.data.order import Draw, DrawOrder
from finetune.data.types import ABSENT, Batch, Clip, Sample
from finetune.errors import UserError
from test_data import open_dataset, write_manifest, write_recording

LENGTHS_SEC = [1.0, 0.3, 1.2, 0.5]  # 2, 1, 3 and 1 windows of half a second
NUM_WINDOWS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    entries = {f"{index}.wav": length_sec for index, length_sec in enumerate(LENGTHS_SEC)}
    for name, length_sec in entries.items():
        write_recording(folder / name, length_sec)
    write_manifest(folder / "all.jsonl", entries)
    write_manifest(folder / "first.jsonl", {"0.wav": 1.0, "1.wav": 0.3})
    write_manifest(folder / "second.jsonl", {"2.wav": 1.2})
    return folder


@pytest.fixture
def dataset(folder) -> WindowDataset:
    dataset = open_dataset(str(folder / "all.jsonl"))
    assert dataset.num_windows == NUM_WINDOWS
    return dataset


def sample_of(clip: Clip, generator: np.random.Generator) -> Sample:
    """A stand-in for a family's tokenizer: the name says which window it was and what the generator drew."""
    shape, drawn = (2, 3), generator.integers(1 << 30)
    if not clip.path:
        return Sample(torch.full(shape, ABSENT), torch.zeros(shape), audio_sec=0.0, path="")
    name = f"{Path(clip.path).stem}@{clip.start_sec}"
    return Sample(torch.ones(shape, dtype=torch.int64), torch.ones(shape), clip.audio_sec, path=f"{name}#{drawn}")


def tokenize(clips: Sequence[Clip], generators: Sequence[np.random.Generator]) -> list[Sample]:
    return [sample_of(clip, generator) for clip, generator in zip(clips, generators, strict=True)]


def make_loader(dataset: WindowDataset, rank: int = 0, world_size: int = 1, batch_size: int = 2, **changes) -> Loader:
    settings = {"seed": 5, "shuffle": True, "num_workers": 2, "prefetch_batches": 3, "tokenize": tokenize, **changes}
    return Loader(dataset, rank=rank, world_size=world_size, batch_size=batch_size, **settings)


def take(loader: Loader, num_batches: int | None) -> list[Batch]:
    with closing(iter(loader)) as batches:
        return list(itertools.islice(batches, num_batches))


def rounds(
    dataset: WindowDataset, world_size: int, num_rounds: int | None, batch_size: int = 2, **changes
) -> list[list[str]]:
    """Names of the windows of all ranks together, round by round."""
    by_rank = [
        take(make_loader(dataset, rank, world_size, batch_size, **changes), num_rounds) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    return [[name for batch in together for name in batch.paths] for together in zip(*by_rank, strict=True)]


def window_names(names: list[str]) -> list[str]:
    return [name.partition("#")[0] for name in names]


FILE_ORDER = ["0@0.0", "0@0.5", "1@0.0", "2@0.0", "2@0.5", "2@1.0", "3@0.0"]


# The order


def test_every_window_comes_once_an_epoch_in_an_order_of_seed_and_epoch():
    def epochs(seed: int, shuffle: bool = True) -> list[list[int]]:
        draws = list(itertools.islice(DrawOrder([11], [1.0], seed, shuffle), 33))
        assert [draw.epoch for draw in draws] == [0] * 11 + [1] * 11 + [2] * 11
        return [[draw.window for draw in draws[start : start + 11]] for start in (0, 11, 22)]

    assert all(sorted(epoch) == list(range(11)) for epoch in epochs(0))
    assert epochs(0) == epochs(0)
    distinct = {tuple(epoch) for seed in (0, 1) for epoch in epochs(seed)}
    assert len(distinct) == 6
    assert epochs(0, shuffle=False) == [list(range(11))] * 3


@pytest.mark.parametrize("weights", [[0.75, 0.25], [0.5, 0.3, 0.2], [0.98, 0.02]])
def test_every_prefix_keeps_the_weights_and_every_source_its_own_epochs(weights):
    num_windows = [4, 9, 5][: len(weights)]
    draws: list[Draw] = list(itertools.islice(DrawOrder(num_windows, weights, 3, True), 500))
    drawn = np.cumsum([[draw.source == source for source in range(len(weights))] for draw in draws], 0)
    expected = np.outer(np.arange(1, 501), weights)
    assert np.abs(drawn - expected).max() <= 1.0
    for source, count in enumerate(num_windows):
        mine = [draw for draw in draws if draw.source == source]
        for epoch in range(len(mine) // count):
            part = mine[epoch * count : (epoch + 1) * count]
            assert {draw.window for draw in part} == set(range(count))
            assert {draw.epoch for draw in part} == {epoch}


def test_the_order_resumes_where_it_was():
    order = DrawOrder([4, 9], [0.7, 0.3], 1, True)
    for _ in range(17):
        next(order)
    state = json.loads(json.dumps(order.state_dict()))
    later = DrawOrder([4, 9], [0.7, 0.3], 1, True)
    later.load_state_dict(state)
    assert list(itertools.islice(later, 40)) == list(itertools.islice(order, 40))


# Training batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_every_window_is_seen_once_an_epoch_over_all_ranks(world_size, batch_size, dataset):
    num_rounds = -(-3 * NUM_WINDOWS // (world_size * batch_size))
    names = window_names([name for round_ in rounds(dataset, world_size, num_rounds, batch_size) for name in round_])
    epochs = [names[start : start + NUM_WINDOWS] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [FILE_ORDER] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_does_not_depend_on_ranks_and_batch_sizes(dataset):
    """1 rank with 2 microbatches sees in a step what 2 ranks with 1 see, and what one big batch holds."""
    two_ranks = rounds(dataset, 2, 12, 2)
    one_rank = rounds(dataset, 1, 24, 2)
    microbatches = [first + second for first, second in zip(one_rank[::2], one_rank[1::2], strict=True)]
    assert two_ranks == microbatches == rounds(dataset, 1, 12, 4)
    # Seed and draw decide what the tokenizer's generator gives; an epoch later it gives something else.
    assert len({name for round_ in two_ranks for name in round_}) == 48
    assert two_ranks != rounds(dataset, 2, 12, 2, seed=6)


def test_without_shuffling_the_order_is_that_of_the_files(dataset):
    names = [name for round_ in rounds(dataset, 2, 4, 2, shuffle=False) for name in round_]
    assert window_names(names) == [*FILE_ORDER, *FILE_ORDER, FILE_ORDER[0], FILE_ORDER[1]]


def test_weighted_sources_keep_their_shares_in_the_batches(folder):
    dataset = open_dataset(f"{folder / 'first.jsonl'}:3,{folder / 'second.jsonl'}:1")
    assert [len(windows) for windows in dataset.windows] == [3, 3]
    names = window_names([name for round_ in rounds(dataset, 2, 6, 2) for name in round_])
    assert Counter(names) == {"0@0.0": 6, "0@0.5": 6, "1@0.0": 6, "2@0.0": 2, "2@0.5": 2, "2@1.0": 2}


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_a_resumed_loader_goes_on_exactly_there(num_taken, dataset):
    def resumed_names(loader: Loader) -> list[tuple[str, ...]]:
        return [batch.paths for batch in take(loader, 6)]

    tokenized = []

    def counting(clips, generators):
        tokenized.append(len(clips))
        return tokenize(clips, generators)

    loader = make_loader(dataset, 1, 2, tokenize=counting)
    with closing(iter(loader)) as batches:
        for _ in range(num_taken):
            next(batches)
        deadline = time.monotonic() + 10
        while num_taken and len(tokenized) < num_taken + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        state = json.loads(json.dumps(loader.state_dict()))
    expected = [batch.paths for batch in take(make_loader(dataset, 1, 2), num_taken + 6)][num_taken:]
    resumed = make_loader(dataset, 1, 2)
    resumed.load_state_dict(state)
    assert resumed_names(resumed) == expected
    assert resumed_names(loader) == expected


# Evaluation batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_evaluation_is_one_pass_with_as_many_batches_on_every_rank(world_size, batch_size, dataset):
    seen, num_batches = [], set()
    for rank in range(world_size):
        loader = make_loader(dataset, rank, world_size, batch_size, once=True)
        batches = take(loader, None)
        assert [batch.paths for batch in take(loader, None)] == [batch.paths for batch in batches]  # starts afresh
        num_batches.add(len(batches))
        assert len(loader) == len(batches)
        for batch in batches:
            assert len(batch.paths) == batch_size
            empty = torch.tensor([not path for path in batch.paths])
            assert (batch.loss_weight_BKT[empty] == 0).all()
            assert (batch.segment_BT[empty] == -1).all()
            assert (batch.codes_BKT[empty] == ABSENT).all()
            assert (batch.loss_weight_BKT[~empty] == 1).all()
            seen += [path for path in batch.paths if path]
    assert num_batches == {-(-NUM_WINDOWS // (world_size * batch_size))}
    assert sorted(window_names(seen)) == FILE_ORDER


# Threads


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("clip-reader", "batch-maker"))]


@pytest.fixture
def check_threads():
    assert our_threads() == []
    yield
    assert our_threads() == []


@pytest.mark.usefixtures("check_threads")
def test_closing_early_ends_all_threads(dataset):
    with closing(iter(make_loader(dataset))) as batches:
        next(batches)
        assert our_threads()


@pytest.mark.usefixtures("check_threads")
def test_dropping_the_iterator_ends_all_threads(dataset):
    for batch in itertools.islice(make_loader(dataset, once=True), 2):  # as evaluate() does
        assert batch.paths
    for _ in make_loader(dataset, once=True):
        pass


@pytest.mark.usefixtures("check_threads")
def test_an_error_of_a_reader_surfaces_after_the_batches_before_it(folder, dataset, tmp_path):
    names = ["good.wav"] * 5 + ["gone.wav"]
    for name in set(names):
        write_recording(tmp_path / name, 0.5)
    lines = [json.dumps({"path": name, "duration": 0.5}) for name in names]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    dataset = open_dataset(str(tmp_path / "m.jsonl"))
    (tmp_path / "gone.wav").unlink()
    batches = iter(make_loader(dataset, shuffle=False))
    assert [len(next(batches).paths) for _ in range(2)] == [2, 2]
    with pytest.raises(UserError, match=r"data\.train_data: .*m\.jsonl line 6: .*gone\.wav: .*no such file"):
        next(batches)


@pytest.mark.usefixtures("check_threads")
def test_an_error_of_the_tokenizer_surfaces(dataset):
    def broken(clips, generators):
        raise ZeroDivisionError("the tokenizer broke")

    with pytest.raises(ZeroDivisionError, match="the tokenizer broke"):
        next(iter(make_loader(dataset, tokenize=broken)))


def test_batches_are_made_ahead_but_not_without_end(dataset):
    tokenized = []

    def counting(clips, generators):
        tokenized.append(threading.current_thread() is threading.main_thread())
        return tokenize(clips, generators)

    with closing(iter(make_loader(dataset, tokenize=counting, prefetch_batches=2))) as batches:
        next(batches)
        time.sleep(0.5)
        assert 3 <= len(tokenized) <= 5
        assert not any(tokenized)
