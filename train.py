"""Fine-tune a speech-text model.

    torchrun --nproc-per-node 1 -m train CONFIG [--key=value …]

CONFIG is a YAML file; any key of it can be given on the command line too, dotted:
`--optim.lr=1e-5 --data.train_data=talks.jsonl`. README.md lists the keys.
"""

import logging
import os
import shutil
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from finetune import args as configuration
from finetune import distributed
from finetune.args import TrainArgs
from finetune.build import build_checkpointer, build_family, build_loader, build_model, build_samples
from finetune.cli import launch
from finetune.data.types import Batch, send
from finetune.errors import UserError
from finetune.evaluate import evaluate
from finetune.families import args_class
from finetune.families.base import Family
from finetune.loss import denominators, local_loss, stream_sums
from finetune.metrics import Meter, Report
from finetune.optim import LossScale, build_optimizer, build_schedule, clip_gradients
from finetune.parallel import compute_dtype, reduce_gradients

logger = logging.getLogger("parley")


def train(args: TrainArgs) -> None:
    """config → family → data → loop → checkpoint."""
    device = distributed.device()
    dtype = compute_dtype(args.param_dtype, device)
    distributed.on_main_rank(refuse_used_run_dir, args)

    family = build_family(args, device)
    loader = build_loader(args, family, evaluation=False)
    eval_loader = build_loader(args, family, evaluation=True) if args.do_eval else None
    samples = build_samples(args, family, dtype, device)
    model, groups = build_model(args, family, dtype, device)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, args.optim)
    schedule = build_schedule(optimizer, args.optim, args.max_steps)
    loss_scale, meter = LossScale(dtype), Meter(family.terms, device)
    checkpointer = build_checkpointer(args, family, dtype)
    best_eval_loss = float("inf")

    distributed.on_main_rank(open_run_dir, args)
    model.train()
    torch.manual_seed(args.seed + distributed.rank())  # dropout; weights and data have seeds of their own
    with Report(args) as report, closing(iter(loader)) as batches:
        for step in range(1, args.max_steps + 1):
            is_last = step == args.max_steps
            lr = float(schedule.get_last_lr()[0])
            microbatches = [next(batches) for _ in range(args.num_microbatches)]
            accumulate_gradients(model, family, microbatches, loss_scale.value, meter, device)
            norm = update(parameters, optimizer, loss_scale, args.max_norm)
            schedule.step()
            meter.end_step()

            if is_last or every(step, args.log_freq):
                record = meter.read() | {"lr": lr, "grad_norm": norm.item()}
                report.log("train", step, record | {"eta_sec": meter.sec_of(args.max_steps - step)})

            with meter.paused():
                is_best = False
                if eval_loader is not None and (is_last or every(step, args.eval_freq)):
                    losses = evaluate(model, family, eval_loader, args.eval_batches, device)
                    report.log("eval", step, losses)
                    is_best = losses["loss"] < best_eval_loss
                    best_eval_loss = min(best_eval_loss, losses["loss"])

                if samples is not None and (is_last or every(step, args.generate.freq)):
                    report.log_samples(step, samples.make(model, step))

                due = is_last or every(step, args.ckpt_freq) or (is_best and args.save_best)
                if checkpointer is not None and due:
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


def main(config: str, overrides: dict[str, str]) -> None:
    """Train as one YAML file says, with dotted keys of the command line over it."""
    train(configuration.load(config, overrides, args_class))


if __name__ == "__main__":
    launch(main, str(__doc__))
