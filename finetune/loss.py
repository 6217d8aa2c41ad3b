"""The loss: for each term a weighted mean over everything that one optimiser step sees.

Loss = Σ_terms coefficient · Σ(w·nll) / Σw. The denominators run over all ranks and microbatches and are known
before the first forward pass, so that any split of a batch over them gives the same gradients.

Shape legend: B batch, K streams, T frames.
"""

from collections.abc import Sequence

import torch

from finetune import distributed
from finetune.data.types import Batch
from finetune.families.base import LossTerm


def denominators(batches: Sequence[Batch], terms: Sequence[LossTerm]) -> list[float]:
    """Σw of every term over the microbatches of all ranks. Runs on the CPU, so no GPU waits for it."""
    totals = torch.tensor(
        [
            sum(float(batch.loss_weight_BKT[:, term.rows].sum(dtype=torch.float64)) for batch in batches)
            for term in terms
        ],
        dtype=torch.float64,
    )
    return distributed.all_sum(totals).tolist()


def local_loss(
    nll_BKT: torch.Tensor,
    loss_weight_BKT: torch.Tensor,
    terms: Sequence[LossTerm],
    term_denominators: Sequence[float],
) -> torch.Tensor:
    """This microbatch's share of the step's loss: the shares of all microbatches and ranks sum to the loss.

    A term that has no weight in the whole step contributes nothing, but the result always has a gradient: a
    rank without targets must still take part in the backward pass of the others.
    """
    loss = 0.0 * nll_BKT.sum()
    for term, denominator in zip(terms, term_denominators, strict=True):
        if denominator > 0:
            weighted = nll_BKT[:, term.rows] * loss_weight_BKT[:, term.rows]
            loss = loss + term.coefficient * weighted.sum() / denominator
    return loss


def stream_sums(nll_BKT: torch.Tensor, loss_weight_BKT: torch.Tensor) -> torch.Tensor:
    """[2, K] float64: Σ(w·nll) and Σw of every stream, detached. Summable over batches and ranks."""
    weighted = nll_BKT.detach() * loss_weight_BKT
    return torch.stack([weighted.double().sum((0, 2)), loss_weight_BKT.double().sum((0, 2))])


def summarize(sums_2K: torch.Tensor, terms: Sequence[LossTerm]) -> dict[str, float]:
    """The loss, its terms, and the mean of every predicted stream, from sums on the CPU.

    Streams are numbered by their codebook, which is their row less that of the text. One without weight, or
    a term, is left out; `loss` is the sum of the terms that are there.
    """
    nll_K, weight_K = sums_2K.tolist()
    means: dict[str, float] = {"loss": 0.0}
    for term in terms:
        weight = sum(weight_K[term.rows])
        if weight > 0:
            means[f"{term.name}_loss"] = sum(nll_K[term.rows]) / weight
            means["loss"] += term.coefficient * means[f"{term.name}_loss"]
    for term in terms:
        rows = range(*term.rows.indices(len(nll_K)))
        if len(rows) > 1:
            for row in rows:
                if weight_K[row] > 0:
                    means[f"{term.name}_loss_{row - 1}"] = nll_K[row] / weight_K[row]
    return means
