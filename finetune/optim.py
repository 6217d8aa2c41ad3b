"""AdamW, its learning-rate schedules, gradient clipping and the loss scale of float16."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from finetune.args import OptimArgs
from finetune.errors import UserError

# moshi-finetune's values (its train.py).
BETAS = (0.9, 0.95)
EPS = 1e-8


def build_optimizer(param_groups: list[dict[str, Any]], args: OptimArgs) -> torch.optim.Optimizer:
    """AdamW over the given groups, whose own settings win over `args`. The parameters are float32 masters.

    Raises:
        UserError: 8-bit states are asked for and torchao is not installed.
    """
    settings: dict[str, Any] = {"lr": args.lr, "betas": BETAS, "eps": EPS, "weight_decay": args.weight_decay}
    if args.name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit  # an extra, and one of the two that shard with FSDP2's DTensor
        except ImportError as error:
            remedy = "pip install 'parley-finetune[lowbit]' or set optim.name: adamw"
            raise UserError(f"optim.name: adamw8bit needs torchao ({error}); {remedy}") from error
        return AdamW8bit(param_groups, **settings)
    on_gpu = any(parameter.is_cuda for group in param_groups for parameter in group["params"])
    return torch.optim.AdamW(param_groups, fused=on_gpu, **settings)


def build_schedule(optimizer: torch.optim.Optimizer, args: OptimArgs, max_steps: int) -> LRScheduler:
    """The learning rate over `max_steps` steps; to be stepped after each of them."""
    if args.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        # torch divides by zero where the rise takes exactly one step or all of them.
        at_zero = args.pct_start * max_steps in (1.0, float(max_steps))
        pct_start = args.pct_start - 1e-6 * at_zero
        # torchao compiles its step anew for every value of beta1.
        cycles = args.name == "adamw"
        return OneCycleLR(optimizer, peaks, total_steps=max_steps, pct_start=pct_start, cycle_momentum=cycles)
    num_warmup = round(args.pct_start * max_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        progress = (step - num_warmup) / max(1, max_steps - num_warmup)
        shapes = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return shapes[args.schedule]

    return LambdaLR(optimizer, factor)


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float, scale: float = 1.0) -> torch.Tensor:
    """Divide gradients by `scale`, clip their global norm, and return the norm before clipping.

    Every rank must call it: with sharded gradients the norm is a collective. 0 turns clipping off.
    """
    pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    with_gradient, gradients = [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]
    if scale != 1.0:
        torch._foreach_div_(gradients, scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


class LossScale:
    """The dynamic loss scale of float16: halved when gradients overflow, doubled after 2,000 good steps.

    The rule of https://arxiv.org/abs/1710.03740. The global gradient norm tells an overflow on every rank
    alike, which torch's GradScaler, looking at local gradients, does not. Other types keep a scale of 1.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, dtype: torch.dtype):
        self._dynamic = dtype == torch.float16
        self.value = 2.0**16 if self._dynamic else 1.0
        self._good_steps = 0

    def accepts(self, norm: torch.Tensor) -> bool:
        """Whether to take the step. Looks at the norm, and so waits for the GPU, under float16 only."""
        if not self._dynamic:
            return True
        if not math.isfinite(norm.item()):
            self.value, self._good_steps = self.value / 2, 0
            return False
        self._good_steps += 1
        if self._good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2
        return True
