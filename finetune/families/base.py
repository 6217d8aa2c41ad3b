"""What a model family provides. The trainer knows this protocol and no family by name.

Shape legend: B batch, K streams, T frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from finetune.data.types import Batch, Clip, Sample


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


class Family(Protocol):
    """One model architecture with its formats. Built from its own section of the configuration."""

    Args: type[Any]
    terms: Sequence[LossTerm]
    frame_size: int
    """Samples per frame at 24 kHz."""
    min_channels: int
    """Channels that a recording must have."""
    main_speaker_only: bool
    """Whether the words of everyone but the main speaker are left out."""

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

    def tokenize(
        self, clips: Sequence[Clip], generators: Sequence[np.random.Generator], *, evaluation: bool = False
    ) -> list[Sample]:
        """Codes and loss weights of some clips; under `evaluation` with weights that no configuration changes.

        Takes several clips where the shape of things suggests one, so that the codec runs batched.
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

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Units of sharding, compilation and activation checkpointing, inner ones first."""
        ...

    def export_config(self, weights_file: str, lora: dict[str, Any] | None) -> dict[str, Any]:
        """`config.json` of a checkpoint.

        Args:
            weights_file: the file beside it.
            lora: rank and scaling, if that file is an adapter; None if it is a whole model.
        """
        ...
