"""Batches in time: data is read by threads and tokenised ahead of the training step."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from finetune.data.order import Draw, DrawOrder
from finetune.data.packing import Packing, Row, rows_of
from finetune.data.types import Batch, Sample, collate, trim

Tokenize = Callable[[Sequence[Any], Sequence[np.random.Generator]], list[Sample]]
# Packed rows are padded to a multiple of it: few shapes for kernels that are compiled for each.
_ROW_STEP = 128


class Dataset(Protocol):
    """What can be drawn: windows of recordings, or of conversations."""

    @property
    def weights(self) -> Sequence[float]:
        """How often each source is drawn from; they sum to 1."""
        ...

    @property
    def windows(self) -> Sequence[Sequence[Any]]:
        """By source."""
        ...

    @property
    def num_windows(self) -> int:
        """Of all sources."""
        ...

    def read(self, window: Any) -> Any:
        """Read a window into what the family tokenises."""
        ...

    def empty_clip(self) -> Any:
        """Something to tokenise that holds nothing."""
        ...

    def num_frames(self, window: Any) -> int:
        """Length of a window's sample, known without reading it."""
        ...


@dataclass(frozen=True)
class _Share:
    """One rank's part of one round of rows; a row without draws fills the last round of a finite sequence."""

    rows: Sequence[Row]
    state: dict[str, Any]
    """Of the order and the packing, once this round is drawn."""


class Loader:
    """Batches of one rank; all ranks together draw the same sequence, whatever their number.

    A round is `world_size · batch_size` consecutive rows and rank r takes the r-th part of it, so that one
    rank with two microbatches sees in a step what two ranks with one see. The training loader never ends; the
    evaluation loader goes through the data once, in file order, and every rank gets as many batches as the
    others: missing rows are empty and weigh nothing.

    Args:
        tokenize: makes samples of what the dataset reads, given one random generator for each, which depends on
            the draw only.
        packing: how draws share rows; see packing.py.
        row_frames: frames in a packed row.
        num_tail_frames: empty frames that a sample keeps at its end where it is packed or bucketed.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenize: Tokenize,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = False,
        once: bool = False,
        num_workers: int = 4,
        prefetch_batches: int = 4,
        packing: Packing = "none",
        row_frames: int = 0,
        num_tail_frames: int = 0,
    ):
        self._dataset = dataset
        self._tokenize = tokenize
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._once = once
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._packing: Packing = packing
        self._row_frames = row_frames
        self._num_tail_frames = num_tail_frames
        num_windows = [len(windows) for windows in dataset.windows]
        self._order = DrawOrder(num_windows, dataset.weights, seed, shuffle)
        self._pending: list[Draw] = []
        self._state = self._state_now()

    def __len__(self) -> int:
        """Batches of one pass over the data."""
        return -(-len(self._pass) // (self._batch_size * self._world_size))

    def __iter__(self) -> Generator[Batch, None, None]:
        for share, batch in _ahead(self._tokenized, self._prefetch_batches):
            self._state = share.state
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; what was merely read ahead does not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def _state_now(self) -> dict[str, Any]:
        pending = [[draw.source, draw.window, draw.epoch] for draw in self._pending]
        return {**self._order.state_dict(), "pending": pending}

    def _shares(self) -> Iterator[_Share]:
        per_round = self._world_size * self._batch_size
        start = self._rank * self._batch_size
        rows, rounds = self._rows_and_rounds()
        for _ in rounds:
            round_ = list(itertools.islice(rows, per_round))
            yield _Share(round_[start : start + self._batch_size], self._state_now())

    def _rows_and_rounds(self) -> tuple[Iterator[Row], Iterable[int]]:
        """The rows of all ranks, without end, and a count of the rounds to make of them."""
        if self._once:
            return itertools.chain(self._pass, itertools.repeat(())), range(len(self))
        self._order.load_state_dict(self._state)
        self._pending = [Draw(*draw) for draw in self._state["pending"]]
        return self._rows(self._order, self._pending), itertools.count()

    def _rows(self, draws: Iterator[Draw], pending: list[Draw]) -> Iterator[Row]:
        return rows_of(draws, self._num_frames, self._packing, self._row_frames, pending, self._seed)

    @cached_property
    def _pass(self) -> list[Row]:
        """The rows of one pass over the data, in file order."""
        draws = (
            Draw(source, window, epoch=0)
            for source, windows in enumerate(self._dataset.windows)
            for window in range(len(windows))
        )
        return list(self._rows(draws, []))

    def _num_frames(self, draw: Draw) -> int:
        return self._dataset.num_frames(self._dataset.windows[draw.source][draw.window])

    def _tokenized(self, stopped: threading.Event) -> Iterator[tuple[_Share, Batch]]:
        """Runs in the background: keeps data in the making and tokenises that of the oldest batch."""
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="clip-reader")
        reading: deque[tuple[_Share, list[Future[Any]]]] = deque()
        try:
            for share in itertools.chain(self._shares(), itertools.repeat(None)):
                if share is not None:
                    reading.append((share, [pool.submit(self._read, draw) for draw in _places(share)]))
                    if len(reading) <= self._prefetch_batches:
                        continue
                if stopped.is_set() or not reading:
                    return
                oldest, clips = reading.popleft()
                samples = self._tokenize([clip.result() for clip in clips], self._generators(oldest))
                yield oldest, self._collate(oldest, samples)
        finally:
            pool.shutdown(cancel_futures=True)

    def _collate(self, share: _Share, samples: list[Sample]) -> Batch:
        """Put a share's samples into its rows."""
        if self._packing != "none":
            samples = [trim(sample, self._num_tail_frames) for sample in samples]
        remaining = iter(samples)
        rows = [list(itertools.islice(remaining, max(1, len(row)))) for row in share.rows]
        if self._packing == "none":
            return collate(rows)
        longest = max(sum(sample.codes_KT.shape[1] for sample in row) for row in rows)
        return collate(rows, min(self._row_frames, -(-longest // _ROW_STEP) * _ROW_STEP))

    def _read(self, draw: Draw | None) -> Any:
        if draw is None:
            return self._dataset.empty_clip()
        return self._dataset.read(self._dataset.windows[draw.source][draw.window])

    def _generators(self, share: _Share) -> list[np.random.Generator]:
        keys = [(draw.source, draw.window, draw.epoch) if draw else (0, 0, 0) for draw in _places(share)]
        return [np.random.default_rng([self._seed, *key]) for key in keys]


def _places(share: _Share) -> list[Draw | None]:
    """Everything to read for a share; an empty row reads one empty thing."""
    return [draw for row in share.rows for draw in row or (None,)]


def _ahead(make: Callable[[threading.Event], Iterator[Any]], num_ahead: int) -> Iterator[Any]:
    """Run a generator in a thread that stays up to `num_ahead` items ahead; errors surface where items would."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=num_ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in make(stopped):
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="batch-maker", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(timeout=60)
