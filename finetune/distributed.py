"""Ranks, sums over ranks, and how a run ends: process-group set-up, main-rank logging, one error line."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from finetune.errors import UserError

EXIT_USER_ERROR = 2
# How long the silent ranks stay alive so that torchrun does not stop the one that is printing.
_SILENT_RANK_GRACE_SEC = 5.0
# How long ranks wait for one another: the main one may write a large model while the others do nothing.
_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")
logger = logging.getLogger("parley")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This process' device: its own GPU where CUDA works, the CPU elsewhere."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """NCCL on GPUs, gloo on CPUs. Without torchrun's variables the run is a world of one."""
    is_alone = "RANK" not in os.environ  # otherwise the environment names a rendezvous
    if is_alone:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if device().type == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: this machine has {torch.cuda.device_count()} GPUs; start as many"
            )
        # Less fragmentation; read when CUDA starts, under a name that torch 2.10 changed.
        name = "PYTORCH_CUDA_ALLOC_CONF" if torch.__version__ < "2.10" else "PYTORCH_ALLOC_CONF"
        os.environ.setdefault(name, "expandable_segments:True")
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    if is_alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    yield
    # Not after an exception: with the other ranks inside a collective it would wait for them.
    dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        all_sum(torch.zeros(1))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place; the tensor itself in a world of one."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main_rank(function: Callable[..., T], *args: object) -> T:
    """Call a function on the main rank alone; every rank gets its value, or its UserError.

    For what touches shared files. The value is pickled.
    """
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(function(*args), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    value, problem = outcome[0]
    if problem is not None:
        raise UserError(problem)
    return cast(T, value)


_said_here: set[str] = set()


def once(message_key: str) -> bool:
    """True on exactly one of the ranks that ask with a key, and the first time only."""
    if not dist.is_initialized() or world_size() == 1:
        first = message_key not in _said_here
        _said_here.add(message_key)
        return first and (dist.is_initialized() or is_main())
    store = dist.distributed_c10d._get_default_store()
    return store.add(f"parley/{message_key}", 1) == 1


def _said(message_key: str) -> bool:
    """Whether `once` gave some rank leave to say this."""
    if not dist.is_initialized() or world_size() == 1:
        return message_key in _said_here
    try:
        return dist.distributed_c10d._get_default_store().check([f"parley/{message_key}"])
    except RuntimeError:  # the store is gone as well
        return False


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr, from one rank, and exit code 2."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and not _said("error"):
            raise
        # A rank that left breaks the collectives of the others; its line says why.
        if isinstance(error, UserError) and once("error"):
            line = f"error: {' '.join(str(error).split())}"
            print(line, file=sys.stderr, flush=True)
            _tell_torchrun(line)
        else:
            time.sleep(_SILENT_RANK_GRACE_SEC)
        # Not sys.exit: reader threads and the peers' collectives must not hold the process back.
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)


def _tell_torchrun(line: str) -> None:
    """Have the summary that torchrun ends with repeat a line (torch.distributed.elastic.multiprocessing.errors)."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def set_up_logging() -> None:
    """Messages of the main rank only; the others speak when something is wrong."""
    level = logging.INFO if is_main() else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(level)
