"""moshi 0.2.13's `StreamingTransformerLayer` for training; in streaming it stays moshi's own.

Replaced: `forward` outside streaming, `_ff_block` and `_cross_attention_block` everywhere. Differences: see
`attention.py`; the Depformer's layer takes the codebook steps as its first dimension, so that each step's
weights meet one contiguous matrix (moshi slices `x[:, t:t+1]`, which turns each of them into a batched product
that reads the weights again for every frame). Feed-forward and cross-attention call their linear modules rather
than read their weights, so that adapters count.

Shape legend: B batch, T frames, D width, K codebook steps, N rows (frames of all samples).
"""

import torch
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

from moshi_overrides.attention import (
    Attend,
    Rotation,
    apply_norm,
    attend,
    gated_feed_forward,
    join_heads,
    split_heads,
)


class TrainingLayer(StreamingTransformerLayer):
    """A layer of the temporal transformer."""

    def forward(
        self,
        x_BTD: torch.Tensor,
        cross_attention_src: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        mask: torch.Tensor | None = None,
        attend_inside: Attend | None = None,
    ) -> torch.Tensor:
        """One layer over whole sequences.

        Args:
            cross_attention_src: conditions [B, C, D] of models with cross-attention.
            rotation: rotary positions, if the model has them.
            mask: boolean [T, T] or [B, 1, T, T]; None means plain causal attention.
            attend_inside: self-attention of packed rows, in place of the mask.
        """
        if self.is_streaming:
            return super().forward(x_BTD, cross_attention_src)
        if not self.skip_self_attn:
            update = self._self_attention(apply_norm(self.norm1, x_BTD), rotation, mask, attend_inside)
            x_BTD = x_BTD + self.layer_scale_1(update)
        if self.cross_attention is not None:
            x_BTD = self._cross_attention_block(x_BTD, cross_attention_src)
        return self._ff_block(x_BTD)

    def _self_attention(
        self,
        x_BTD: torch.Tensor,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        attend_inside: Attend | None,
    ) -> torch.Tensor:
        q, k, v = split_heads(self.self_attn, self.self_attn.in_projs[0](x_BTD))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        out_BHTD = attend(q, k, v, mask, is_causal=True) if attend_inside is None else attend_inside(q, k, v)
        return self.self_attn.out_projs[0](join_heads(out_BHTD))

    def _cross_attention_block(self, x_BTD: torch.Tensor, cross_attention_src: torch.Tensor | None) -> torch.Tensor:
        attention = self.cross_attention
        assert attention is not None
        assert cross_attention_src is not None
        project = attention.in_projs[0]
        q, _, _ = split_heads(attention, project(apply_norm(self.norm_cross, x_BTD)))
        _, k, v = split_heads(attention, project(cross_attention_src))
        return x_BTD + self.layer_scale_cross(attention.out_projs[0](join_heads(attend(q, k, v))))

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        normed = apply_norm(self.norm2, x)
        if self.gating is None:
            update = self.linear2(self.activation(self.linear1(normed)))
        elif isinstance(self.gating, nn.ModuleList):  # streaming, one codebook step at a time
            step = self._streaming_state.offset_cpu
            update = gated_feed_forward(self.gating[self._weights_of(step)], normed)
        else:
            update = gated_feed_forward(self.gating, normed)
        return x + self.layer_scale_2(update)

    def _weights_of(self, step: int) -> int:
        schedule = self.weights_per_step_schedule
        return step if schedule is None else schedule[step]


class DepformerLayer(TrainingLayer):
    """A layer of the depth transformer, over all codebook steps of many frames at once."""

    def forward(  # type: ignore[override]
        self, x_KND: torch.Tensor, cross_attention_src: None = None, rotation: Rotation | None = None
    ) -> torch.Tensor:
        """One layer over [K, N, D]; in streaming over moshi's [B, 1, D]."""
        if self.is_streaming:
            return super().forward(x_KND, cross_attention_src)
        attention = self.self_attn
        projected = self._per_step(attention.in_projs, apply_norm(self.norm1, x_KND))
        q, k, v = split_heads(attention, projected.transpose(0, 1))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        attended_KND = join_heads(attend(q, k, v, is_causal=True)).transpose(0, 1).contiguous()
        x_KND = x_KND + self.layer_scale_1(self._per_step(attention.out_projs, attended_KND))
        return self._feed_forward_per_step(x_KND)

    def _feed_forward_per_step(self, x_KND: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.gating, nn.ModuleList):
            return self._ff_block(x_KND)
        normed_KND = apply_norm(self.norm2, x_KND)
        update_KND = torch.stack(
            [gated_feed_forward(self.gating[self._weights_of(step)], x_ND) for step, x_ND in enumerate(normed_KND)]
        )
        return x_KND + self.layer_scale_2(update_KND)

    def _per_step(self, modules: nn.ModuleList, x_KND: torch.Tensor) -> torch.Tensor:
        """Each step through its own weights, or all steps through the only ones."""
        if len(modules) == 1:
            return modules[0](x_KND)
        return torch.stack([modules[self._weights_of(step)](x_ND) for step, x_ND in enumerate(x_KND)])
