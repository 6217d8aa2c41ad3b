"""Evaluation: one pass over held-out data, sums over ranks, one division."""

import math
from contextlib import closing
from itertools import islice

import torch
from torch import nn

from finetune import distributed
from finetune.data.loader import Loader
from finetune.data.types import send
from finetune.families.base import Family
from finetune.loss import stream_sums, summarize


@torch.no_grad()
def evaluate(
    model: nn.Module, family: Family, loader: Loader, max_batches: int | None, device: torch.device
) -> dict[str, float]:
    """Losses of the terms and of every stream, and perplexities e^nll. All ranks get the same numbers.

    The loader is finite and starts afresh with every call.
    """
    was_training = model.training
    model.eval()
    total = None
    with closing(iter(loader)) as batches:
        for batch in islice(batches, max_batches):
            sums = stream_sums(family.nll(model, batch), send(batch.loss_weight_BKT, device))
            total = sums if total is None else total + sums
    model.train(was_training)
    assert total is not None  # a dataset has at least one window
    means = summarize(distributed.all_sum(total).cpu(), family.terms)
    for term in family.terms:
        if f"{term.name}_loss" in means:
            means[f"{term.name}_perplexity"] = math.exp(min(means[f"{term.name}_loss"], 700.0))
    return means
