"""Fine-tune a speech-text model.

    torchrun --nproc-per-node 1 -m train CONFIG [--key=value …]

CONFIG is a YAML file; any key of it can be given on the command line too, dotted:
`--optim.lr=1e-5 --data.train_data=talks.jsonl`. README.md lists the keys.
"""

import logging
import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import args as configuration
from finetune import distributed
from finetune.args import TrainArgs
from finetune.checkpoint import Checkpointer
from finetune.cli import launch
from finetune.data.dataset import Dataset
from finetune.data.loader import Loader
from finetune.data.types import SAMPLE_RATE_HZ, Batch, send
from finetune.errors import UserError
from finetune.evaluate import evaluate
from finetune.families import args_class, family_class
from finetune.families.base import Family
from finetune.lora import adapter_parameters, add_adapters
from finetune.loss import denominators, local_loss, stream_sums
from finetune.metrics import Meter, Report
from finetune.optim import LossScale, build_optimizer, build_schedule, clip_gradients
from finetune.parallel import (
    build_mesh,
    choose_strategy,
    compute_dtype,
    materialize,
    prepare_blocks,
    reduce_gradients,
    set_param_dtypes,
    shard,
)

logger = logging.getLogger("parley")


def train(args: TrainArgs) -> None:
    """config → family → data → loop → checkpoint."""
    device = distributed.device()
    dtype = compute_dtype(args.param_dtype, device)
    distributed.on_main_rank(refuse_used_run_dir, args)

    family = build_family(args, device)
    loader = build_loader(args, family, evaluation=False)
    eval_loader = build_loader(args, family, evaluation=True) if args.do_eval else None
    model, groups = build_model(args, family, dtype, device)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, args.optim)
    schedule = build_schedule(optimizer, args.optim, args.max_steps)
    loss_scale = LossScale(dtype)
    checkpointer = build_checkpointer(args, family, dtype)
    meter = Meter(family.terms, device)
    best_eval_loss = float("inf")

    distributed.on_main_rank(open_run_dir, args)
    model.train()
    torch.manual_seed(args.seed + distributed.rank())  # dropout; weights and data have seeds of their own
    with Report(args) as report, closing(iter(loader)) as batches:
        for step in range(1, args.max_steps + 1):
            is_last = step == args.max_steps
            microbatches = [next(batches) for _ in range(args.num_microbatches)]
            lr = schedule.get_last_lr()[0]
            accumulate_gradients(model, family, microbatches, loss_scale.value, meter, device)
            norm = update(parameters, optimizer, loss_scale, args.max_norm)
            schedule.step()
            meter.end_step()

            if is_last or every(step, args.log_freq):
                record = meter.read()
                extra = {"lr": lr, "grad_norm": norm.item(), "eta_sec": meter.sec_of(args.max_steps - step)}
                report.log("train", step, record | extra)

            is_best = False
            if eval_loader is not None and (is_last or every(step, args.eval_freq)):
                with meter.paused():
                    losses = evaluate(model, family, eval_loader, args.eval_batches, device)
                report.log("eval", step, losses)
                is_best = losses["loss"] < best_eval_loss
                best_eval_loss = min(best_eval_loss, losses["loss"])

            due = is_last or every(step, args.ckpt_freq) or (is_best and args.save_best)
            if checkpointer is not None and due:
                with meter.paused():
                    checkpointer.save(model, step, is_best)
    logger.info("done: the losses are drawn in %s", Path(args.run_dir) / "loss.png")


def accumulate_gradients(
    model: nn.Module, family: Family, microbatches: list[Batch], scale: float, meter: Meter, device: torch.device
) -> None:
    """Forward and backward of every microbatch; the gradients sum to those of the step's loss times `scale`."""
    term_denominators = denominators(microbatches, family.terms)
    # Ranks average their gradients, in FSDP as in reduce_gradients, and the loss is a sum over ranks.
    scale *= distributed.world_size()
    for batch in microbatches:
        loss_weight_BKT = send(batch.loss_weight_BKT, device)
        nll_BKT = family.nll(model, batch)
        loss = local_loss(nll_BKT, loss_weight_BKT, family.terms, term_denominators)
        (loss * scale).backward()
        meter.add(batch, stream_sums(nll_BKT, loss_weight_BKT))


def update(
    parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, loss_scale: LossScale, max_norm: float
) -> torch.Tensor:
    """One optimiser step, unless the gradients overflowed; returns their global norm before clipping."""
    reduce_gradients(parameters)
    norm = clip_gradients(parameters, max_norm, loss_scale.value)
    if loss_scale.accepts(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def every(step: int, frequency: int) -> bool:
    """Whether something that happens every so many steps happens now; never at 0."""
    return frequency > 0 and step % frequency == 0


def refuse_used_run_dir(args: TrainArgs) -> None:
    """Make sure that the run's folder is there, can be written, and is empty or may be emptied."""
    run_dir = Path(args.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        is_used = any(run_dir.iterdir())
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be written ({error.strerror}); choose another") from error
    if not os.access(run_dir, os.W_OK):
        raise UserError(f"run_dir: {run_dir} cannot be written; choose another or mend its permissions")
    if is_used and not (run_dir / "args.yaml").exists():
        raise UserError(f"run_dir: {run_dir} holds files that are not a run's; choose another")
    if is_used and not args.overwrite_run_dir:
        raise UserError(f"run_dir: {run_dir} holds a run; choose another or set overwrite_run_dir: true")
    logger.info("run_dir: %s, ranks: %d", run_dir, distributed.world_size())


def open_run_dir(args: TrainArgs) -> None:
    """Empty the run's folder and write the configuration into it; the last thing before the first step."""
    run_dir = Path(args.run_dir)
    if any(run_dir.iterdir()):
        logger.warning("warning: emptying %s (overwrite_run_dir: true)", run_dir)
        shutil.rmtree(run_dir)
        run_dir.mkdir()
    configuration.save(args, run_dir / "args.yaml")


def build_family(args: TrainArgs, device: torch.device) -> Family:
    """The family, whose untrained model is made first if the configuration describes one."""
    cls = family_class(args.model.family)
    made = distributed.on_main_rank(cls.prepare, args.model, args.seed)
    if made is not None:
        logger.info("made an untrained model in %s", made)
    return cls(args.model, device)


def build_loader(args: TrainArgs, family: Family, *, evaluation: bool) -> Loader:
    """Batches for training, without end, or one pass over the evaluation data."""
    spec = args.data.eval_data if evaluation else args.data.train_data
    assert spec is not None
    key = "data.eval_data" if evaluation else "data.train_data"
    dataset = Dataset.open(
        spec,
        key,
        duration_sec=args.duration_sec,
        min_channels=family.min_channels,
        min_duration_sec=family.frame_size / SAMPLE_RATE_HZ,
        on_error=args.data.on_error,
        main_speaker_only=family.main_speaker_only,
        num_workers=args.data.num_workers,
    )
    logger.info("%s: %d windows of %g s", key, dataset.num_windows, args.duration_sec)
    return Loader(
        dataset,
        partial(family.tokenize, evaluation=evaluation),
        batch_size=args.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=args.seed,
        shuffle=args.data.shuffle,
        once=evaluation,
        num_workers=args.data.num_workers,
        prefetch_batches=args.data.prefetch_batches,
    )


def build_model(
    args: TrainArgs, family: Family, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, spread over the ranks and loaded, and AdamW's parameter groups."""
    model = family.create(torch.device("meta"))
    if args.finetuning == "lora":
        add_adapters(model, args.lora)

    def groups() -> list[dict[str, Any]]:
        if args.finetuning == "full":
            return family.param_groups(model)
        tables = family.embeddings(model) if args.lora.ft_embed else []
        embeddings = [table.weight for table in tables]
        return [{"params": adapter_parameters(model) + embeddings}]

    trained = [parameter for group in groups() for parameter in group["params"]]
    set_param_dtypes(model, trained, family.exact_modules(model), dtype)
    blocks = family.blocks(model)
    prepare_blocks(blocks, compile=args.compile, recompute=args.gradient_checkpointing)
    strategy = choose_strategy(args.parallel, model, dtype, device)
    if strategy != "ddp":
        shard(model, blocks, build_mesh(strategy, args.parallel, device), dtype)
    materialize(model, family.weights(), device, args.seed)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_total = sum(p.numel() for p in model.parameters())
    logger.info(
        "training %.2f of %.2f million parameters, computing in %s, spread by %s",
        num_trained / 1e6, num_total / 1e6, str(dtype).removeprefix("torch."), strategy,
    )  # fmt: skip
    return model, groups()


def build_checkpointer(args: TrainArgs, family: Family, dtype: torch.dtype) -> Checkpointer | None:
    """The writer of checkpoints, unless the run saves none."""
    if not args.do_ckpt:
        return None
    return Checkpointer(
        Path(args.run_dir),
        family,
        lora=args.lora if args.finetuning == "lora" else None,
        adapters_only=args.save_adapters,
        dtype=dtype,
        num_keep=args.num_ckpt_keep,
    )


def main(config: str, overrides: dict[str, str]) -> None:
    """Train as one YAML file says, with dotted keys of the command line over it."""
    train(configuration.load(config, overrides, args_class))


if __name__ == "__main__":
    launch(main, str(__doc__))
