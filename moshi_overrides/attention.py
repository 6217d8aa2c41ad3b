"""Plain functions for training: norm, rotation, attention and feed-forward of moshi's layers, without streaming.

They read the weights of the modules of moshi 0.2.13 and equal those modules' own forward passes
(`tests/test_moshi_parity.py`). The differences are in how, not in what: cosines are computed once a forward
instead of once a layer, causal attention needs no mask, gating goes through its linear modules so that adapters
on them count.

Shape legend: B batch, T frames, D width, H heads, K codebook steps, N rows (frames of all samples).
"""

import math
from collections.abc import Callable

import torch
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import RMSNorm, StreamingMultiheadAttention
from torch import nn
from torch.nn import functional as F

# Attention over queries, keys and values [B, H, T, D/H], with fewer heads of keys and values; gives [B, H, T, D/H].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Attention kernels put the batch into a grid dimension that ends at 65,535.
MAX_ATTENTION_BATCH = 32768


def apply_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A norm of moshi's; RMS norms as one kernel, in float32 where the module asks for it."""
    if not isinstance(norm, RMSNorm):
        return norm(x)
    dtype = norm.dtype or x.dtype
    alpha_D = norm.alpha.flatten().to(dtype)
    return F.rms_norm(x.to(dtype), alpha_D.shape, alpha_D, norm.eps).to(x.dtype)


class Rotation:
    """Cosines and sines of rotary position embeddings, in float32.

    Args:
        position: positions [T] of all rows or [B, T] of each.
        interleaved: pairs are neighbours; otherwise the halves of a head.
    """

    def __init__(self, position: torch.Tensor, head_dim: int, max_period: float, interleaved: bool):
        rates = torch.arange(head_dim // 2, device=position.device, dtype=torch.float32)
        rates = torch.exp(rates * (-math.log(max_period) * 2 / head_dim))
        angles = position.float()[..., None] * rates
        if position.dim() > 1:
            angles = angles[:, None]  # the same for all heads
        self._cos, self._sin = angles.cos(), angles.sin()
        self._interleaved = interleaved

    def __call__(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        if self._interleaved:
            real, imaginary = x_BHTD.unflatten(-1, (-1, 2)).float().unbind(-1)
        else:
            real, imaginary = x_BHTD.float().chunk(2, -1)
        turned = (
            real * self._cos - imaginary * self._sin,
            real * self._sin + imaginary * self._cos,
        )
        joined = torch.stack(turned, -1).flatten(-2) if self._interleaved else torch.cat(turned, -1)
        return joined.to(x_BHTD.dtype)


def split_heads(
    attention: StreamingMultiheadAttention, projected_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, H, T, D/H], keys and values [B, H/kv_repeat, T, D/H] of a packed projection."""
    head_dim = attention.embed_dim // attention.num_heads
    num_kv = attention.num_heads // attention.kv_repeat
    heads_BHTD = projected_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads_BHTD.split([attention.num_heads, num_kv, num_kv], dim=1)


def attend(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention [B, H, T, D/H]. A mask excludes `is_causal`."""
    same_heads = q_BHTD.shape[1] == k_BHTD.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal and mask is None, enable_gqa=not same_heads
        )
        for q, k, v in zip(
            *(x.split(MAX_ATTENTION_BATCH) for x in (q_BHTD, k_BHTD, v_BHTD)),
            strict=True,
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join_heads(x_BHTD: torch.Tensor) -> torch.Tensor:
    """[B, T, D]."""
    return x_BHTD.transpose(1, 2).flatten(-2)


def window_mask(num_positions: int, context: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a causal window, or None where plain causal attention says the same."""
    if context is None or num_positions <= context:
        return None
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).tril()
    return causal & ~causal.tril(-context)


def gated_feed_forward(gating: ActivationGating, x: torch.Tensor) -> torch.Tensor:
    """`gating_forward_generic` of moshi, which moshi itself takes only where no linear module is plain."""
    gate, value = gating.linear_in(x).chunk(2, -1)
    return gating.linear_out(gating.activation(gate) * value)
