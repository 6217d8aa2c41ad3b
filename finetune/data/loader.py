"""Batches in time: windows are read by threads and tokenised ahead of the training step."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.dataset import Dataset
from finetune.data.order import Draw, DrawOrder
from finetune.data.types import Batch, Clip, Sample, collate

Tokenize = Callable[[Sequence[Clip], Sequence[np.random.Generator]], list[Sample]]


@dataclass(frozen=True)
class _Share:
    """One rank's part of one round of draws; None fills the last round of a finite sequence."""

    draws: Sequence[Draw | None]
    state: dict[str, Any]
    """Of the order, once this round is drawn."""


class Loader:
    """Batches of one rank; all ranks together draw the same sequence, whatever their number.

    A round is `world_size · batch_size` consecutive draws and rank r takes the r-th part of it, so that one
    rank with two microbatches sees in a step what two ranks with one see. The training loader never ends; the
    evaluation loader goes through the data once, in file order, and every rank gets as many batches as the
    others: missing windows are empty and weigh nothing.

    Args:
        tokenize: makes samples of clips, given one random generator per clip that depends on the draw only.
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
        num_windows = [len(windows) for windows in dataset.windows]
        self._order = DrawOrder(num_windows, dataset.weights, seed, shuffle)
        self._state = self._order.state_dict()

    def __len__(self) -> int:
        """Batches of one pass over the data."""
        return -(-self._dataset.num_windows // (self._batch_size * self._world_size))

    def __iter__(self) -> Generator[Batch, None, None]:
        for share, batch in _ahead(self._tokenized, self._prefetch_batches):
            self._state = share.state
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; what was merely read ahead does not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def _shares(self) -> Iterator[_Share]:
        per_round = self._world_size * self._batch_size
        start = self._rank * self._batch_size
        draws, rounds = self._draws()
        for _ in rounds:
            round_ = list(itertools.islice(draws, per_round))
            yield _Share(round_[start : start + self._batch_size], self._order.state_dict())

    def _draws(self) -> tuple[Iterator[Draw | None], Iterable[int]]:
        """The draws of all ranks, without end, and a count of the rounds to make of them."""
        if not self._once:
            self._order.load_state_dict(self._state)
            return self._order, itertools.count()
        everything = (
            Draw(source, window, epoch=0)
            for source, windows in enumerate(self._dataset.windows)
            for window in range(len(windows))
        )
        return itertools.chain(everything, itertools.repeat(None)), range(len(self))

    def _tokenized(self, stopped: threading.Event) -> Iterator[tuple[_Share, Batch]]:
        """Runs in the background: keeps clips in the making and tokenises those of the oldest batch."""
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="clip-reader")
        reading: deque[tuple[_Share, list[Future[Clip]]]] = deque()
        try:
            for share in itertools.chain(self._shares(), itertools.repeat(None)):
                if share is not None:
                    reading.append((share, [pool.submit(self._read, draw) for draw in share.draws]))
                    if len(reading) <= self._prefetch_batches:
                        continue
                if stopped.is_set() or not reading:
                    return
                oldest, clips = reading.popleft()
                samples = self._tokenize([clip.result() for clip in clips], self._generators(oldest))
                yield oldest, collate(samples)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, draw: Draw | None) -> Clip:
        if draw is None:
            return self._dataset.empty_clip()
        return self._dataset.read(self._dataset.windows[draw.source][draw.window])

    def _generators(self, share: _Share) -> list[np.random.Generator]:
        keys = [(draw.source, draw.window, draw.epoch) if draw else (0, 0, 0) for draw in share.draws]
        return [np.random.default_rng([self._seed, *key]) for key in keys]


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
