"""Exports that inference programs load: `run_dir/checkpoints/checkpoint_000100/consolidated/`."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from finetune import distributed
from finetune.args import LoraArgs
from finetune.families.base import Adapter, Family
from finetune.lora import adapted_layers, merged_weight
from finetune.parallel import gather, reshard

logger = logging.getLogger("parley")


class Checkpointer:
    """Writes checkpoints, keeps the newest and the best of them.

    Args:
        lora: the adapters' settings, or None under full fine-tuning.
        adapters_only: save the adapters alone instead of merging them.
        dtype: of merged weights in the file.
        num_keep: newest checkpoints kept; None keeps all.
    """

    def __init__(
        self,
        run_dir: Path,
        family: Family,
        *,
        lora: LoraArgs | None,
        adapters_only: bool,
        dtype: torch.dtype,
        num_keep: int | None,
    ):
        self._folder = run_dir / "checkpoints"
        self._family = family
        self._lora = lora
        self._adapters_only = adapters_only and lora is not None
        self._dtype = dtype
        self._num_keep = num_keep

    def save(self, model: nn.Module, step: int, is_best: bool = False) -> None:
        """Write one checkpoint; all ranks must call it. It appears under its name only once it is complete."""
        reshard(model)
        tensors = dict(self._tensors(model))
        if distributed.is_main():
            name = f"checkpoint_{step:06d}"
            self._write(tensors, name)
            if is_best:
                self._point_best_at(name)
            self._prune()
            logger.info("saved %s%s", self._folder / name, " (best so far)" if is_best else "")
        distributed.barrier()

    def _tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What goes into the file, tensor by tensor, so that no GPU holds more than one of them whole."""
        if self._adapters_only:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    yield name, gather(parameter)
            return
        yield from merged_tensors(model, self._family.exact_modules(model), self._dtype)

    def _write(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        final, temporary = self._folder / name, self._folder / f".{name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        consolidated = temporary / "consolidated"
        consolidated.mkdir(parents=True)
        adapter = None
        if self._adapters_only and self._lora is not None:
            lora = self._lora
            adapter = Adapter(lora.rank, lora.scaling, lora.dropout, lora.rslora)
        self._family.export(consolidated, tensors, adapter)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)

    def _point_best_at(self, name: str) -> None:
        link = self._folder / ".best.part"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self._folder / "best")

    def _prune(self) -> None:
        if self._num_keep is None:
            return
        best = (self._folder / "best").resolve().name
        by_step = sorted(self._folder.glob("checkpoint_*"), key=lambda path: int(path.name.split("_")[1]))
        for old in by_step[: -self._num_keep]:
            if old.name != best:
                shutil.rmtree(old)


def merged_tensors(
    model: nn.Module, exact: Sequence[nn.Module], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole model with its adapters merged, on the main rank's CPU; all ranks must go through all of it.

    Args:
        exact: what stays float32; the rest is rounded to `dtype`.
    """
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
    exact_ids = {id(p) for module in exact for p in module.parameters()}
    halves = {id(half.weight) for layer in layers.values() for half in (layer.lora_A, layer.lora_B)}
    for name, parameter in model.named_parameters():
        if id(parameter) in halves:
            continue
        weight = gather(parameter)
        if name in layers:
            layer = layers[name]
            lora_a, lora_b = gather(layer.lora_A.weight), gather(layer.lora_B.weight)
            if distributed.is_main():
                weight = merged_weight(weight, lora_a, lora_b, layer.scaling)
        yield name, weight.to(torch.float32 if id(parameter) in exact_ids else dtype)
