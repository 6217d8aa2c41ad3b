"""Attention and positions inside the segments of packed rows.

Shape legend: B batch, T positions, H heads (keys and values may have fewer), D/H width of a head.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from finetune.data.types import send

# Attention over queries, keys and values [B, H, T, D/H], with fewer heads of keys and values; gives [B, H, T, D/H].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Attention kernels put the batch into a grid dimension that ends at 65,535.
MAX_ATTENTION_BATCH = 32768
# Whether a query may look at a key, by indices of batch, head, query and key that broadcast.
_Sees = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Flex attention's kernels multiply tiles of at least this width.
_MIN_FLEX_HEAD_DIM = 16
# Triton, which they are written in, supports no older cards; nor does flash attention, the one kernel for groups.
_MIN_FLEX_CAPABILITY = (8, 0)


def attend_causally(q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor) -> torch.Tensor:
    """Plain causal attention over whole sequences."""
    parts = [
        _attend_grouped(q, k, v, is_causal=True)
        for q, k, v in zip(*(x.split(MAX_ATTENTION_BATCH) for x in (q_BHTD, k_BHTD, v_BHTD)), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rules: Any) -> torch.Tensor:
    """Attention in which heads of keys and values may serve several of queries."""
    per_group = q.shape[1] // k.shape[1]
    if per_group > 1 and q.is_cuda and torch.cuda.get_device_capability(q.device) < _MIN_FLEX_CAPABILITY:
        k, v = (x.repeat_interleave(per_group, dim=1) for x in (k, v))  # else all scores would be made at once
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **rules)


def positions(segment_BT: torch.Tensor) -> torch.Tensor:
    """int64 positions [B, T] that restart at 0 with every run of equal segment ids, padding included."""
    index_T = torch.arange(segment_BT.shape[1])
    is_first_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
    return index_T - torch.where(is_first_BT, index_T, 0).cummax(1).values


def extend_last(segment_BT: torch.Tensor) -> torch.Tensor:
    """Padding becomes part of its row's last segment, whose frames do not look ahead into it."""
    return torch.where(segment_BT < 0, segment_BT.amax(1, keepdim=True), segment_BT)


def is_packed(segment_BT: torch.Tensor) -> bool:
    """Whether a row holds more than one segment; padding counts as one, see `extend_last`."""
    return bool((segment_BT != segment_BT[:, :1]).any())


def segment_attention(segment_BT: torch.Tensor, device: torch.device, context: int | None = None) -> Attend | None:
    """Causal attention that stays inside segments; None where plain causal attention says the same.

    Padding attends to padding, so that nothing it gives is undefined. On the CPU and on old GPUs the mask is
    dense; elsewhere flex attention (https://arxiv.org/abs/2412.05496) leaves out the blocks that are empty.

    Args:
        segment_BT: int64, on the CPU; which clip of its row a position belongs to, -1 is padding.
        device: where attention runs.
        context: how many positions a query sees, its own included; None means all.
    """
    if context is not None and context >= segment_BT.shape[1]:
        context = None
    if context is None and _is_plain(segment_BT):
        return None
    sent_BT = send(segment_BT.to(torch.int32), device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MIN_FLEX_CAPABILITY:
        return flex_segments(sent_BT, context)
    return dense_segments(sent_BT, context)


def dense_segments(segment_BT: torch.Tensor, context: int | None) -> Attend:
    """With a mask [B, 1, T, T] on the device of the segment ids."""
    batch_size, num_positions = segment_BT.shape
    row_B111 = torch.arange(batch_size, device=segment_BT.device).view(-1, 1, 1, 1)
    index_T = torch.arange(num_positions, device=segment_BT.device)
    return _DenseAttention(_sees(segment_BT, context)(row_B111, row_B111, index_T[:, None], index_T))


def flex_segments(segment_BT: torch.Tensor, context: int | None) -> Attend:
    """With the blocks of the mask that are not empty, made on the device of the segment ids without waiting for it."""
    batch_size, num_positions = segment_BT.shape
    sees = _sees(segment_BT, context)
    return _FlexAttention(create_block_mask(sees, batch_size, None, num_positions, num_positions, segment_BT.device))


def _is_plain(segment_BT: torch.Tensor) -> bool:
    """Whether every row is one segment with nothing but padding behind it."""
    is_padding_BT = segment_BT < 0
    is_only_segment = ((segment_BT == segment_BT[:, :1]) | is_padding_BT).all()
    ends_in_padding = (is_padding_BT[:, 1:] >= is_padding_BT[:, :-1]).all()
    return bool(is_only_segment and ends_in_padding)


def _sees(segment_BT: torch.Tensor, context: int | None) -> _Sees:
    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        inside = (query >= key) & (segment_BT[row, query] == segment_BT[row, key])
        return inside if context is None else inside & (query - key < context)

    return sees


@dataclass(frozen=True, eq=False)
class _DenseAttention:
    mask_B1TT: torch.Tensor

    def __call__(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor) -> torch.Tensor:
        return _attend_grouped(q_BHTD, k_BHTD, v_BHTD, attn_mask=self.mask_B1TT)


@dataclass(frozen=True, eq=False)
class _FlexAttention:
    block_mask: BlockMask

    def __call__(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor) -> torch.Tensor:
        head_dim = q_BHTD.shape[-1]
        missing = max(_MIN_FLEX_HEAD_DIM - head_dim, 0)
        if missing:  # zeros change no product of queries and keys
            q_BHTD, k_BHTD, v_BHTD = (F.pad(x, (0, missing)) for x in (q_BHTD, k_BHTD, v_BHTD))
        # Blocks that are compiled already take the function up as it is; the CPU has no compiled one for training.
        as_it_is = torch.compiler.is_compiling() or q_BHTD.device.type == "cpu"
        attend: Callable[..., Any] = flex_attention if as_it_is else _compiled_flex_attention()
        out_BHTD: torch.Tensor = attend(
            q_BHTD,
            k_BHTD,
            v_BHTD,
            block_mask=self.block_mask,
            scale=head_dim**-0.5,
            enable_gqa=q_BHTD.shape[1] != k_BHTD.shape[1],
            # Rows shorter than a block would go to the kernel for generation, which needs no gradients.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )
        return out_BHTD[..., :head_dim]


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Compiled once a process: uncompiled, flex attention makes all scores at once."""
    return torch.compile(flex_attention)
