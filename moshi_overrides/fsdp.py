"""FSDP2 for moshi's modules.

moshi 0.2.13: `StreamingModule` has `abc.ABC` as its first base, and so another object layout than the
`FSDPModule` that torch's `fully_shard` puts before a module's class: "object layout differs". A pair of classes
whose first part also starts from `abc.ABC` is accepted. torch (2.9 to 2.13) looks such pairs up in a private
table before it makes its own; this file fills that table and touches nothing else.
"""

import abc

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fully_shard as torch_fully_shard


class _StreamingFSDPModule(abc.ABC, FSDPModule):
    """`FSDPModule` in the object layout of moshi's `StreamingModule`."""


def allow_fully_shard(model: nn.Module) -> None:
    """Make `fully_shard` accept every module of a model that derives from `abc.ABC`."""
    pairs = torch_fully_shard.cls_to_fsdp_cls
    for cls in {type(module) for module in model.modules()}:
        if issubclass(cls, abc.ABC) and not issubclass(cls, FSDPModule) and cls not in pairs:
            pairs[cls] = type(f"FSDP{cls.__name__}", (_StreamingFSDPModule, cls), {})
