"""Spoken samples while training: fixed sentences, with and without a voice to imitate, each judged by figures."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sphn
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from finetune import distributed
from finetune.args import GenerateArgs
from finetune.checkpoint import merged_tensors
from finetune.data.types import SAMPLE_RATE_HZ
from finetune.errors import UserError
from finetune.families.base import Family, Line
from finetune.generate import read_context, speak
from finetune.judge import judge
from finetune.parallel import reshard
from finetune.sampling import Sampling

logger = logging.getLogger("parley")


class VoiceSamples:
    """Speaks the same sentences again and again, from the same random numbers, so that checks compare.

    Raises:
        UserError: the family does not speak texts, or the context clip cannot be read.
    """

    def __init__(self, args: GenerateArgs, run_dir: Path, family: Family, dtype: torch.dtype, device: torch.device):
        if not family.can_speak:
            raise UserError(f"generate.freq: {args.freq}: this family does not speak texts; set 0")
        self._folder = run_dir / "samples"
        self._family, self._dtype, self._device = family, dtype, device
        self._sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        self._max_sec = args.max_sec
        self._lines = {f"{number}_plain": Line(text, args.speaker) for number, text in enumerate(args.sentences, 1)}
        if args.context_audio is not None:
            context = [read_context(Path(args.context_audio), args.context_text, args.speaker)]
            self._lines |= {
                f"{number}_context": Line(text, args.speaker, context) for number, text in enumerate(args.sentences, 1)
            }
        for line in self._lines.values():
            self._check_length(line)

    def make(self, model: nn.Module, step: int) -> dict[str, dict[str, Any]]:
        """Speak on the main rank; all ranks must call it. Gives `path`, `text` and the figures of each sample."""
        made: dict[str, dict[str, Any]] = {}
        with self._whole(model) as whole:
            if whole is None:
                return made
            folder = self._folder / f"step_{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            # Blocks that are compiled for training would be compiled anew for every length of the cache.
            with torch.compiler.set_stance("force_eager"):
                speeches = speak(self._family, whole, list(self._lines.values()), self._sampling, self._max_sec)
            for (name, line), speech in zip(self._lines.items(), speeches, strict=True):
                path = folder / f"{name}.wav"
                sphn.write_wav(str(path), speech.wav_S, SAMPLE_RATE_HZ)
                path.with_suffix(".txt").write_text(line.text + "\n")
                made[name] = {"path": path, "text": line.text, **judge(speech.wav_S, speech.ended)}
        return made

    def _check_length(self, line: Line) -> None:
        """Refuse now what would end the run at its first sample."""
        family, limit = self._family, self._family.max_positions
        num_positions = family.count_text(line.speaker, line.text) + sum(
            family.count_text(turn.speaker, turn.text) - (-len(turn.wav_S) // family.frame_size) + 1
            for turn in line.context
        )
        if limit is not None and num_positions >= limit:
            said = f"{line.text!r:.40} and its context take {num_positions:,} positions, the model has {limit:,}"
            raise UserError(f"generate: {said}; shorten the sentence or context_audio")

    @contextmanager
    def _whole(self, model: nn.Module) -> Iterator[nn.Module | None]:
        """The model on the main rank, None on the others: itself, or a copy of one that is sharded."""
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            yield model if distributed.is_main() else None
            return
        reshard(model)
        tensors = dict(merged_tensors(model, self._family.exact_modules(model), self._dtype))
        if not distributed.is_main():
            yield None
            return
        copy = self._family.create(torch.device("meta"))
        copy.load_state_dict({name: tensor.to(self._device) for name, tensor in tensors.items()}, assign=True)
        yield copy
