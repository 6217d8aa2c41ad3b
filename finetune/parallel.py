"""How a model spreads over ranks: types, FSDP2 or replication, and loading it shard by shard."""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from finetune import distributed
from finetune.args import ParallelArgs
from finetune.errors import UserError
from finetune.families.base import Weights
from finetune.lora import initial_adapter_weight

Strategy = Literal["fsdp", "hsdp", "ddp"]
# A frozen base that takes more of the GPU leaves too little for activations.
MAX_REPLICATED_SHARE = 0.5
_REDUCE_BUCKET_NUMEL = 1 << 24


def compute_dtype(param_dtype: str, device: torch.device) -> torch.dtype:
    """The type that layers compute in; see `param_dtype` in args.py."""
    if param_dtype != "auto":
        return getattr(torch, param_dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def set_param_dtypes(
    model: nn.Module, trained: Iterable[torch.Tensor], exact: Iterable[nn.Module], dtype: torch.dtype
) -> None:
    """Freeze all but `trained`; what is trained or in `exact` is float32, the rest has the type it computes in."""
    trained_ids = {id(parameter) for parameter in trained}
    exact_ids = {id(parameter) for module in exact for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained_ids)
        is_float32 = parameter.requires_grad or id(parameter) in exact_ids
        parameter.data = parameter.data.to(torch.float32 if is_float32 else dtype)


def choose_strategy(args: ParallelArgs, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Strategy:
    """Settle `auto`, and refuse what cannot be.

    Replication needs that every trained parameter computes in float32, or is of an adapter or an embedding: what
    these give is cast to the type of the layers.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trains_all = len(trained) == sum(1 for _ in model.parameters())
    tables = {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for inner, _ in module.named_parameters()
    }
    replicable = dtype == torch.float32 or all(name in tables or _is_adapter(name) for name in trained)
    if args.strategy == "ddp" and not replicable:
        said = "parallel.strategy: ddp with finetuning: full"
        raise UserError(f"{said} would train in {dtype} without float32 masters; use fsdp or param_dtype: float32")
    if args.strategy != "auto":
        return args.strategy
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    fits = device.type == "cpu" or num_bytes < MAX_REPLICATED_SHARE * torch.cuda.mem_get_info(device)[1]
    many = distributed.world_size() > 1
    return "ddp" if replicable and fits and not (trains_all and many) else "fsdp"


def prepare_blocks(blocks: Sequence[nn.Module], *, compile: bool, recompute: bool) -> None:
    """Compile blocks and recompute their activations in the backward pass, in place.

    Only `forward` is wrapped, so parameter names and FSDP's hooks, which run around it, are untouched.
    """
    for block in blocks:
        forward = block.forward
        if compile:
            forward = torch.compile(forward)
        if recompute:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Apply FSDP2 to every block and to what is left around them."""
    # Inputs are cast by the models themselves: rotary angles must stay in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def build_mesh(strategy: Strategy, args: ParallelArgs, device: torch.device) -> DeviceMesh:
    """All ranks in a row, or groups of `shard_size` that replicate each other."""
    world_size = distributed.world_size()
    if strategy == "fsdp":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    size = args.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % size:
        raise UserError(f"parallel.shard_size: {size} does not divide the {world_size} ranks; choose a divisor")
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def materialize(model: nn.Module, weights: Weights, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its memory and weights; a rank reads only the rows that it holds.

    Raises:
        UserError: the checkpoint lacks parameters of the model.
    """
    adapters = {name for name, _ in model.named_parameters() if _is_adapter(name)}
    missing = sorted({name for name, _ in model.named_parameters()} - adapters - weights.names)
    if missing:
        raise UserError(f"model: the checkpoint lacks {missing[0]} and {len(missing) - 1} more; is it this model?")
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        start, stop, local = _local_rows(parameter.detach())
        if name in adapters:
            value = initial_adapter_weight(name, parameter.shape, seed)[start:stop]
        else:
            value = weights.read(name, start, stop)
        if value.shape != local.shape:
            raise UserError(f"model: {name} is {list(value.shape)} in the checkpoint, {list(local.shape)} here")
        local.copy_(value)


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _local_rows(parameter: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """First row, end row and storage of what this rank holds."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0] if parameter.dim() else 1, parameter
    local = parameter.to_local()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0], local


def reduce_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Average the gradients of replicated parameters over all ranks; sharded ones were reduced already."""
    world_size = distributed.world_size()
    if world_size == 1:
        return
    bucket: list[torch.Tensor] = []
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for index, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        if index == len(gradients) or sum(part.numel() for part in bucket) >= _REDUCE_BUCKET_NUMEL:
            flat = torch.cat([part.flatten() for part in bucket])
            dist.all_reduce(flat)
            pieces = flat.div_(world_size).split([part.numel() for part in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(part) for piece, part in zip(pieces, bucket, strict=True)])
            bucket = []


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP keeps whole after a forward pass without backward: its parameters are rounded copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter on the CPU of the main rank; all ranks must call it, the others get an empty tensor."""
    whole = parameter.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu() if distributed.is_main() else torch.empty(0)
