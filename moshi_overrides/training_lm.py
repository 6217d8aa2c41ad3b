"""moshi 0.2.13's `LMModel` for training; generation stays moshi's own.

Replaced: `forward`, which gives negative log-likelihoods instead of logits. Differences: frames without a target
are dropped before the Depformer and the heads, targets are shifted rather than logits, logits exist for one
chunk of rows at a time, and the Depformer runs step by step over contiguous rows (`layers.py`). Rows may hold
several segments, each a sequence of its own. The numbers are those of moshi (`tests/test_moshi_parity.py`), of
segments those of each alone (`tests/test_moshi_packing.py`).

Shape legend: B batch, K streams (row 0 text, then audio), T frames, D width, N rows (frames that have a target).
"""

from collections.abc import Sequence
from typing import Any

import torch
from moshi.conditioners import ConditionTensors
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from moshi.modules.transformer import StreamingTransformer, create_sin_embedding
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moshi_overrides.attention import Attend, Rotation, apply_norm, window_mask
from moshi_overrides.layers import DepformerLayer, TrainingLayer

# Logits in one chunk: 256 MB in float32. A smaller matrix is kept for the backward pass, larger ones are made
# again there.
MAX_LOGITS = 1 << 26


class TrainingLM(LMModel):
    """Moshi with a training forward. Parameters and their names are moshi's."""

    def __init__(self, **kwargs: Any):
        super().__init__(layer_class=TrainingLayer, depformer_layer_class=DepformerLayer, **kwargs)

    def forward(
        self,
        codes_BKT: torch.Tensor,
        text_rows: torch.Tensor,
        audio_rows: torch.Tensor,
        prepared_conditions: dict[str, Any] | None = None,
        position_BT: torch.Tensor | None = None,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihoods [B, 1 + dep_q, T] in nats, float32, zero outside the rows asked for.

        Args:
            codes_BKT: int64 codes before any delay; -1 is absent.
            text_rows: indices into the flattened [B, T] of delayed frames whose text is predicted.
            audio_rows: the same for the audio codebooks.
            prepared_conditions: what the condition provider's `prepare` returned.
            position_BT: positions inside the segments of packed rows; None where every row is one segment.
            attend: self-attention inside those segments; None means causal inside the model's context.
        """
        batch_size, _, num_frames = codes_BKT.shape
        start_BK1 = self._get_initial_token().expand(batch_size, -1, -1)
        delayed_BKT = delay_streams(self.delays, codes_BKT, start_BK1, position_BT)
        inputs_BKT = torch.cat([start_BK1, delayed_BKT[..., :-1]], dim=-1)
        if position_BT is not None:
            inputs_BKT = torch.where(position_BT[:, None] == 0, start_BK1, inputs_BKT)
        hidden_BTD = self._temporal(inputs_BKT, prepared_conditions, position_BT, attend)
        hidden_ND = hidden_BTD.flatten(0, 1)
        # Where a delay or an absent code leaves no target any valid one will do: it has no weight.
        targets_BKT = delay_streams(self.delays, codes_BKT, torch.zeros_like(start_BK1), position_BT)
        targets_KN = targets_BKT.transpose(0, 1).flatten(1).clamp(min=0)
        text_nll = token_nll(hidden_ND[text_rows], self.text_linear, targets_KN[0, text_rows])
        empty_KN = text_nll.new_zeros(1 + self.dep_q, len(hidden_ND))
        nll_KN = empty_KN[:1].index_copy(1, text_rows, text_nll[None])
        if self.dep_q > 0:
            audio_nll_KN = self._depth(hidden_ND[audio_rows], delayed_BKT, targets_KN, audio_rows)
            nll_KN = torch.cat([nll_KN, empty_KN[1:].index_copy(1, audio_rows, audio_nll_KN)])
        nll_BKT = nll_KN.unflatten(1, (batch_size, num_frames)).transpose(0, 1)
        return undelay_streams(self.delays[: 1 + self.dep_q], nll_BKT, position_BT)

    def forward_text(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """moshi's own, for streaming; outside it the layers want the positions that `forward` gives them."""
        if not self.is_streaming:
            raise RuntimeError("TrainingLM trains through forward() and generates through moshi's LMGen")
        return super().forward_text(*args, **kwargs)

    def _temporal(
        self,
        inputs_BKT: torch.Tensor,
        prepared_conditions: dict[str, Any] | None,
        position_BT: torch.Tensor | None,
        attend: Attend | None,
    ) -> torch.Tensor:
        """The temporal transformer's normalised output [B, T, D]."""
        x_BTD = self.text_emb(inputs_BKT[:, 0])
        for codebook, embedding in enumerate(self.emb):
            x_BTD = x_BTD + embedding(inputs_BKT[:, self.audio_offset + codebook])
        sum_condition, cross_attention_src = self._conditions(prepared_conditions)
        if sum_condition is not None:
            x_BTD = x_BTD + sum_condition.to(x_BTD)
        compute_dtype = self.text_linear.weight.dtype
        x_BTD = x_BTD.to(compute_dtype)
        if cross_attention_src is not None:
            cross_attention_src = cross_attention_src.to(compute_dtype)
        position = torch.arange(x_BTD.shape[1], device=x_BTD.device) if position_BT is None else position_BT
        x_BTD = add_positions(self.transformer, x_BTD, position)
        rotation = rotation_of(self.transformer, position)
        mask = window_mask(x_BTD.shape[1], self.context, x_BTD.device) if attend is None else None
        for layer in self.transformer.layers:
            x_BTD = layer(x_BTD, cross_attention_src, rotation, mask, attend)
        return apply_norm(self.out_norm, x_BTD)

    def _conditions(self, prepared: dict[str, Any] | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What is summed onto the input, and what cross-attention looks at."""
        if self.fuser is None:
            return None, None
        conditions: ConditionTensors = self.condition_provider(prepared)
        return self.fuser.get_sum(conditions), self.fuser.get_cross(conditions)

    def _depth(
        self,
        hidden_ND: torch.Tensor,
        delayed_BKT: torch.Tensor,
        targets_KN: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Negative log-likelihoods [dep_q, N] of the audio codebooks of some frames."""
        tokens_KN = delayed_BKT.transpose(0, 1).flatten(1)[: self.dep_q, rows]
        x_KND = torch.stack([self._depth_input(k, tokens, hidden_ND) for k, tokens in enumerate(tokens_KN)])
        x_KND = x_KND.to(hidden_ND.dtype)
        step_K = torch.arange(self.dep_q, device=x_KND.device)
        x_KND = add_positions(self.depformer, x_KND.transpose(0, 1), step_K).transpose(0, 1)
        rotation = rotation_of(self.depformer, step_K)
        for layer in self.depformer.layers:
            x_KND = layer(x_KND, rotation=rotation)
        nll = [
            token_nll(apply_norm(norm, x_ND), head, targets_KN[1 + k, rows], MAX_LOGITS // self.dep_q)
            for k, (x_ND, norm, head) in enumerate(zip(x_KND, self.depformer_norms, self.linears, strict=True))
        ]
        return torch.stack(nll)

    def _depth_input(self, step: int, tokens_N: torch.Tensor, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Input of one codebook step: the last token's embedding and the projected temporal output."""
        embedding = self.depformer_text_emb if step == 0 else self.depformer_emb[step - 1]
        schedule = self.depformer_weights_per_step_schedule
        index = 0 if not self.depformer_multi_linear else step if schedule is None else schedule[step]
        return embedding(tokens_N) + self.depformer_in[index](hidden_ND)


def delay_streams(
    delays: Sequence[int], x_BKT: torch.Tensor, start_BK1: torch.Tensor, position_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Each stream later by its delay, with `start` before the first frame of every row, or of every segment."""
    delayed_BKT = _delay_sequence(delays, x_BKT, start_BK1)
    if position_BT is None:
        return delayed_BKT
    return torch.where(_has_begun(delays, position_BT), delayed_BKT, start_BK1)


def undelay_streams(
    delays: Sequence[int], x_BKT: torch.Tensor, position_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Undo `delay_streams`, with 0 where the delay moved a frame past the end."""
    if position_BT is not None:
        x_BKT = torch.where(_has_begun(delays, position_BT), x_BKT, 0.0)
    undelayed_BKT, _ = _undelay_sequence(delays, x_BKT, fill_value=0.0)
    return undelayed_BKT


def _has_begun(delays: Sequence[int], position_BT: torch.Tensor) -> torch.Tensor:
    """Whether delayed streams [B, K, T] hold frames of their segment yet."""
    return torch.stack([position_BT >= delay for delay in delays], 1)


def token_nll(
    hidden_ND: torch.Tensor, head: nn.Linear, target_N: torch.Tensor, max_logits: int | None = None
) -> torch.Tensor:
    """Cross-entropy [N] in float32 of a head's predictions, by chunks of at most MAX_LOGITS logits."""
    rows_per_chunk = max(1, (max_logits or MAX_LOGITS) // head.out_features)

    def chunk_nll(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="none")

    if len(hidden_ND) <= rows_per_chunk:
        return chunk_nll(hidden_ND, target_N)
    chunks = zip(hidden_ND.split(rows_per_chunk), target_N.split(rows_per_chunk), strict=True)
    return torch.cat([checkpoint(chunk_nll, *chunk, use_reentrant=False) for chunk in chunks])


def add_positions(transformer: StreamingTransformer, x_BTD: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Sinusoidal positions, where a transformer has them; [T] of all rows or [B, T] of each."""
    if transformer.positional_embedding not in ("sin", "sin_rope"):
        return x_BTD
    position_BT1 = position.view(-1, x_BTD.shape[1], 1)
    embedding = create_sin_embedding(position_BT1, x_BTD.shape[2], max_period=transformer.max_period, dtype=x_BTD.dtype)
    return x_BTD + transformer.positional_scale * embedding


def rotation_of(transformer: StreamingTransformer, position: torch.Tensor) -> Rotation | None:
    """Rotary positions, where a transformer has them; [T] of all rows or [B, T] of each."""
    rope = transformer.rope
    if rope is None:
        return None
    attention = transformer.layers[0].self_attn
    head_dim = attention.embed_dim // attention.num_heads
    return Rotation(position, head_dim, rope.max_period, rope.interleave)
