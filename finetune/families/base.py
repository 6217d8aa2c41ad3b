"""What a model family provides. The trainer knows this protocol and no family by name.

Shape legend: B batch, K streams, T frames.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from finetune.data.types import Batch, Sample, Turn
from finetune.sampling import Sampling


@dataclass(frozen=True)
class LossTerm:
    """A weighted mean over some rows of a batch: coefficient · Σ(w·nll) / Σw."""

    name: str
    rows: slice
    coefficient: float = 1.0


@dataclass(frozen=True)
class Weights:
    """A checkpoint whose tensors are read when they are needed, and only the rows that are needed."""

    names: frozenset[str]
    read: Callable[[str, int, int], torch.Tensor]
    """`read(name, start, stop)` gives rows of the tensor that the family's model calls `name`; a scalar
    counts as one row."""


@dataclass(frozen=True)
class Adapter:
    """Settings of LoRA adapters, for programs that load them."""

    rank: int
    scaling: float
    """Factor on the adapters' output."""
    dropout: float
    rslora: bool
    """Whether the factor was meant as alpha/√rank rather than alpha/rank."""


@dataclass(frozen=True)
class Line:
    """A text to speak."""

    text: str
    speaker: str
    context: Sequence[Turn] = ()
    """What was said before, perhaps in the voice to speak in."""


@dataclass(frozen=True)
class SpeechChunk:
    """What several lines sound like next, side by side."""

    wavs: Sequence[np.ndarray]
    """Mono float32 at 24 kHz; nothing for a line that is over."""
    ended: Sequence[bool]
    """Whether the model has ended each line by itself."""


class Family(Protocol):
    """One model architecture with its formats. Built from its own section of the configuration."""

    Args: type[Any]
    unit: Literal["window", "conversation"]
    """What is drawn and tokenised: windows of recordings (Clip), or conversations of turns (Conversation)."""
    terms: Sequence[LossTerm]
    frame_size: int
    """Samples per frame at 24 kHz."""
    min_channels: int
    """Channels that a recording must have; where windows are drawn."""
    main_speaker_only: bool
    """Whether the words of everyone but the main speaker are left out; where windows are drawn."""
    can_pack: bool
    """Whether samples may share a row."""
    can_speak: bool
    """Whether it speaks texts."""
    max_positions: int | None
    """Positions that the model was made for; None where nothing ends."""
    num_tail_frames: int
    """Empty frames that a sample needs behind its last one when others follow it in a row: the longest delay."""

    def __init__(self, args: Any, device: torch.device): ...

    @classmethod
    def prepare(cls, args: Any, seed: int) -> Path | None:
        """Make the untrained model that `args` describes, if it is not there yet; returns its folder if made."""
        ...

    def create(self, device: torch.device) -> nn.Module:
        """The architecture with random weights; on the meta device, with none."""
        ...

    def weights(self) -> Weights:
        """The checkpoint that training starts from, in the model's own names."""
        ...

    def count_text(self, speaker: str, text: str) -> int:
        """Positions that a turn's text takes; where conversations are drawn."""
        ...

    def tokenize(
        self, clips: Sequence[Any], generators: Sequence[np.random.Generator], *, evaluation: bool = False
    ) -> list[Sample]:
        """Codes and loss weights of some units; under `evaluation` with weights that no configuration changes.

        Takes several units where the shape of things suggests one, so that the codec runs batched.
        """
        ...

    def nll(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods [B, K, T] in nats on the model's device, zero where the weight is zero."""
        ...

    def embeddings(self, model: nn.Module) -> list[nn.Module]:
        """The embedding tables, which LoRA may train in full."""
        ...

    def exact_modules(self, model: nn.Module) -> list[nn.Module]:
        """What stays float32 whatever computes, and in checkpoints; under FSDP it computes like the rest."""
        ...

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What full fine-tuning trains, as AdamW's groups; everything else is frozen."""
        ...

    def parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """What `train_only` can name: the model in disjoint parts."""
        ...

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Units of sharding, compilation and activation checkpointing, inner ones first."""
        ...

    def export(self, folder: Path, tensors: dict[str, torch.Tensor], adapter: Adapter | None) -> None:
        """Write what the upstream inference programs load into an empty folder.

        Args:
            tensors: by parameter name, on the CPU: the whole model, or what the adapters trained.
            adapter: the adapters' settings; None if this is a whole model.
        """
        ...

    def read_adapter(self, folder: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
        """What `export` wrote of an adapter, by parameter name."""
        ...

    def speak(
        self, model: nn.Module, lines: Sequence[Line], sampling: Sampling, max_sec: float
    ) -> Iterator[SpeechChunk]:
        """Speak several lines at once, frame by frame; where `can_speak`.

        Raises:
            UserError: a line and its context are too long for the model.
        """
        ...


def target_rows(has_target_BT: torch.Tensor) -> torch.Tensor:
    """Flat indices of positions that have a target; at least one, since every rank must run every layer."""
    rows = has_target_BT.flatten().nonzero().flatten()
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64)
