"""What a run says about itself: sums between two log lines, and the places they go."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import sphn
import torch
from tqdm import tqdm

from finetune import distributed
from finetune.args import TrainArgs, WandbArgs, without_secrets
from finetune.curve import draw_losses
from finetune.data.types import Batch
from finetune.errors import UserError
from finetune.families.base import LossTerm
from finetune.loss import summarize

logger = logging.getLogger("parley")


class Meter:
    """Sums since the last log line. Nothing leaves the GPU before `read`."""

    def __init__(self, terms: Sequence[LossTerm], device: torch.device):
        self._terms = terms
        self._device = device
        self._num_rows = sum(len(range(*term.rows.indices(1 << 16))) for term in terms)
        self._run_sec, self._run_steps = 0.0, 0
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._paused_sec = 0.0
        self._steps = 0
        self._sums_2K: torch.Tensor | None = None
        # audio seconds, frames, frames with a clip, tokens, tokens with a weight
        self._counts = torch.zeros(5, dtype=torch.float64)

    def add(self, batch: Batch, sums_2K: torch.Tensor) -> None:
        """Count one microbatch and its stream sums (see loss.stream_sums)."""
        self._sums_2K = sums_2K if self._sums_2K is None else self._sums_2K + sums_2K
        num_frames = batch.segment_BT.numel()
        useful_frames = int((batch.segment_BT >= 0).sum())
        useful_tokens = int((batch.loss_weight_BKT > 0).sum())
        counts = [batch.audio_sec, num_frames, useful_frames, num_frames * self._num_rows, useful_tokens]
        self._counts += torch.tensor(counts, dtype=torch.float64)

    def end_step(self) -> None:
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: evaluation, saving."""
        began = time.perf_counter()
        yield
        self._paused_sec += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Means and rates since the last call, over all ranks, which must call it together."""
        assert self._sums_2K is not None
        losses = summarize(distributed.all_sum(self._sums_2K).cpu(), self._terms)
        elapsed = time.perf_counter() - self._started - self._paused_sec
        self._run_sec, self._run_steps = self._run_sec + elapsed, self._run_steps + self._steps
        audio_sec, frames, useful_frames, tokens, useful_tokens = distributed.all_sum(self._counts).tolist()
        record = {
            **losses,
            "step_sec": elapsed / self._steps,
            "tokens_per_sec": tokens / elapsed,
            "useful_tokens_per_sec": useful_tokens / elapsed,
            "frames_per_sec": frames / elapsed,
            "useful_frames_per_sec": useful_frames / elapsed,
            "audio_sec_per_sec": audio_sec / elapsed,
            "padding_share": 1 - useful_frames / frames,
            "peak_memory_gb": peak_memory_gb(self._device),
        }
        self._reset()
        return record

    def sec_of(self, num_steps: int) -> float:
        """How long so many steps take, by the mean of the run so far."""
        return num_steps * self._run_sec / self._run_steps


def peak_memory_gb(device: torch.device) -> float:
    """Most memory so far in GB (1e9 bytes): allocated on this rank's GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class JsonlFile:
    """One JSON object a line. Opened at step n it forgets the lines after n, which a resumed run writes anew."""

    def __init__(self, path: Path, last_step: int):
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= last_step]
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)  # by line: nothing is lost when the process is killed

    def write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


class Report:
    """Progress bar, console, JSON lines, TensorBoard and Weights & Biases; silent on all ranks but the main one.

    A context manager: it closes its files and draws the loss curve however the run ends.
    """

    def __init__(self, args: TrainArgs, last_step: int = 0):
        self._is_main = distributed.is_main()
        self._max_steps = args.max_steps
        self._run_dir = Path(args.run_dir)
        if not self._is_main:
            return
        self._files = {
            kind: JsonlFile(self._run_dir / f"metrics.{kind}.jsonl", last_step) for kind in ("train", "eval", "samples")
        }
        self._tensorboard = _open_tensorboard(self._run_dir, last_step) if args.tensorboard else None
        self._wandb = _open_wandb(args.wandb, self._run_dir, without_secrets(args))
        self._bar = tqdm(
            total=args.max_steps, initial=last_step, unit="step", desc="training", disable=not sys.stderr.isatty()
        )

    def log(self, kind: str, step: int, record: dict[str, float]) -> None:
        """Write one record of `train` or `eval` everywhere."""
        if not self._is_main:
            return
        self._files[kind].write({"step": step, **record})
        if self._tensorboard is not None:
            for name, value in record.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in record.items()}, step=step)
        self._show(kind, step, record)

    def log_samples(self, step: int, samples: dict[str, dict[str, Any]]) -> None:
        """Write what was spoken, by name, with its `path` and `text` and the figures of its judge."""
        if not self._is_main:
            return
        for name, sample in samples.items():
            figures = {key: value for key, value in sample.items() if key not in ("path", "text")}
            place = {"name": name, "path": str(sample["path"].relative_to(self._run_dir)), "text": sample["text"]}
            self._files["samples"].write({"step": step, **place, **figures})
            scalars = {f"samples/{name}/{key}": value for key, value in figures.items()}
            if self._tensorboard is not None:
                _add_audio(self._tensorboard, f"samples/{name}", sample["path"], step)
                for key, value in scalars.items():
                    self._tensorboard.add_scalar(key, value, step)
            if self._wandb is not None:
                self._wandb.log({f"samples/{name}": _wandb_audio(sample), **scalars}, step=step)
        length_sec, silent, ended = (
            sum(sample[key] for sample in samples.values()) / len(samples)
            for key in ("length_sec", "silent_share", "ended")
        )
        said = (
            f"{len(samples)} spoken: {length_sec:.1f} s and {silent:.0%} silent on average, {ended:.0%} came to an end"
        )
        self._say(f"samples step {step}/{self._max_steps}  {said}")

    def _show(self, kind: str, step: int, record: dict[str, float]) -> None:
        terms = "  ".join(
            f"{name.removesuffix('_loss')} {value:.4f}" for name, value in record.items() if name.endswith("_loss")
        )
        text = f"loss {record['loss']:.4f}  {terms}"
        if kind == "eval":
            self._say(f"eval   step {step}/{self._max_steps}  {text}")
            return
        speed = f"{record['audio_sec_per_sec']:.1f}x real time"
        if self._bar.disable:
            eta = timedelta(seconds=round(record["eta_sec"]))
            self._say(f"step {step}/{self._max_steps}  {text}  lr {record['lr']:.2e}  {speed}  ETA {eta}")
        else:
            self._bar.set_postfix_str(f"{text}, {speed}")
            self._bar.update(step - self._bar.n)

    def _say(self, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            logger.info(text)

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        self._bar.close()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        draw_losses(self._run_dir)


def _open_tensorboard(run_dir: Path, last_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)


def _add_audio(tensorboard: Any, name: str, path: Path, step: int) -> None:
    wav_CS, rate_hz = sphn.read(str(path))
    if wav_CS.shape[-1]:
        tensorboard.add_audio(name, torch.from_numpy(wav_CS[0]), step, sample_rate=rate_hz)


def _wandb_audio(sample: dict[str, Any]) -> Any:
    import wandb  # seconds to import, so only where it is used

    return wandb.Audio(str(sample["path"]), caption=sample["text"])


def _open_wandb(args: WandbArgs, run_dir: Path, config: dict[str, Any]) -> Any:
    if args.project is None:
        return None
    import wandb  # seconds to import, so only where it is used

    if args.key is not None:
        os.environ["WANDB_API_KEY"] = args.key  # unlike wandb.login, leaves no trace in ~/.netrc
    try:
        return wandb.init(
            project=args.project,
            name=args.run_name or run_dir.name,
            dir=str(run_dir),
            mode="offline" if args.offline else None,
            config=config,
            # W&B's own metadata holds the command line, and that may hold the key.
            settings=wandb.Settings(x_disable_meta=True, disable_code=True, console="off"),
        )
    except wandb.Error as error:
        remedy = "set WANDB_API_KEY, run `wandb login`, or set wandb.offline: true"
        raise UserError(f"wandb.project: {args.project}: W&B refuses ({error}); {remedy}") from error
