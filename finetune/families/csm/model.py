"""CSM (SesameAILabs/csm): a backbone that reads text and audio frames, and a decoder over the codebooks of a frame.

Plain PyTorch. Parameters bear the names of transformers' `CsmForConditionalGeneration`, and rotary positions turn
halves, as there; `layouts.py` goes to and from the other layouts.

Shape legend: B batch, K codebooks, T positions, D width, H heads, N rows (positions that have a target),
V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetune.families.csm.config import CsmConfig, RopeScaling, TransformerConfig
from finetune.segments import Attend, attend_causally

# Logits in one chunk: 256 MB in float32. A smaller matrix is kept for the backward pass, larger ones are made
# again there.
MAX_LOGITS = 1 << 26


def rotary_rates(config: TransformerConfig, device: torch.device) -> torch.Tensor:
    """Angles per position [D/2] in radians, stretched as in Llama 3 (transformers' `_compute_llama3_parameters`)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    rates = config.rope_base**-exponents
    scaling = config.rope_scaling
    return rates if scaling is None else _stretched(rates, scaling)


def _stretched(rates: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = scaling.original_context * rates / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return rates * (kept + (1 - kept) / scaling.factor)


def rotary_tables(config: TransformerConfig, position_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, 1, T, D/2] of positions, in float32."""
    angles = position_BT[:, None, :, None] * rotary_rates(config, position_BT.device)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (i, i + D/2), in float32."""
    return _Rotation.apply(x_BHTD, *tables)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, for which nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BHTD, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient_BHTD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient_BHTD, cos, -sin), None, None


def _turn(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # The products of a narrower type with the tables are in float32 without a copy of it all.
    first, second = x_BHTD.chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([half.to(x_BHTD.dtype) for half in turned], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm, which torch computes in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of the last dimension, in the input's type."""
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    """Attention with grouped keys and values."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """[B, T, D]."""
        q, k, v = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHTD = attend(rotate(q, tables), rotate(k, tables), v)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The last dimension through the gated layer."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer of a Llama."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_BTD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """One layer over whole sequences."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), tables, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Transformer(nn.Module):
    """The layers and the last norm of a Llama; embeddings are its owner's."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def run(self, x_BTD: torch.Tensor, position_BT: torch.Tensor, attend: Attend = attend_causally) -> torch.Tensor:
        """Normalised output [B, T, D]."""
        tables = rotary_tables(self.config, position_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tables, attend)
        return self.norm(x_BTD)


class AudioEmbedding(nn.Module):
    """The table of all codebooks, codebook-major."""

    def __init__(self, num_entries: int, width: int):
        super().__init__()
        self.embed_audio_tokens = nn.Embedding(num_entries, width)


class Backbone(Transformer):
    """The transformer over positions; it owns the audio table."""

    def __init__(self, config: CsmConfig):
        super().__init__(config.backbone)
        self.embed_tokens = AudioEmbedding(config.num_codebooks * config.audio_vocab_size, config.backbone.hidden_size)


class DepthTransformer(Transformer):
    """The transformer over the codebooks of one frame, behind a projection of the backbone's width."""

    def __init__(self, config: CsmConfig):
        super().__init__(config.decoder)
        self.inputs_embeds_projector = nn.Linear(config.backbone.hidden_size, config.decoder.hidden_size, bias=False)


class CodebooksHead(nn.Module):
    """One prediction head a codebook, but the first."""

    def __init__(self, num_heads: int, width: int, vocabulary: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width, vocabulary).normal_(std=width**-0.5))

    def forward(self, x_KND: torch.Tensor) -> torch.Tensor:
        """Logits [K, N, V] of all codebooks in one batched product."""
        return torch.bmm(x_KND, self.weight)


class DepthDecoder(nn.Module):
    """Codebooks 1.. of a frame from the backbone's output and the codebooks before."""

    def __init__(self, config: CsmConfig):
        super().__init__()
        self.model = DepthTransformer(config)
        self.codebooks_head = CodebooksHead(
            config.num_codebooks - 1, config.decoder.hidden_size, config.audio_vocab_size
        )

    def forward(self, x_NKD: torch.Tensor) -> torch.Tensor:
        """Logits [K - 1, N, V] of what follows each of the inputs [N, K, D] but the first."""
        return self.codebooks_head(self.hidden_states(x_NKD).transpose(0, 1))

    def hidden_states(self, x_NKD: torch.Tensor) -> torch.Tensor:
        """What the heads read [N, K - 1, D]: the normalised output of all inputs [N, K, D] but the first."""
        position_1K = torch.arange(x_NKD.shape[1], device=x_NKD.device)[None]
        return self.model.run(self.model.inputs_embeds_projector(x_NKD), position_1K)[:, 1:]


class CsmModel(nn.Module):
    """Backbone, decoder, embeddings and heads.

    Codes are [B, 1 + K, T]: row 0 text, then the audio codebooks; -1 is absent.
    """

    def __init__(self, config: CsmConfig):
        super().__init__()
        self.config = config
        width = config.backbone.hidden_size
        self.embed_text_tokens = nn.Embedding(config.text_vocab_size, width)
        self.backbone_model = Backbone(config)
        self.lm_head = nn.Linear(width, config.audio_vocab_size, bias=False)
        self.depth_decoder = DepthDecoder(config)

    @property
    def audio_embedding(self) -> nn.Embedding:
        """The table of all codebooks, codebook-major, that both transformers read."""
        return self.backbone_model.embed_tokens.embed_audio_tokens

    def forward(
        self,
        codes_BKT: torch.Tensor,
        semantic_rows: torch.Tensor,
        acoustic_rows: torch.Tensor,
        position_BT: torch.Tensor,
        attend: Attend = attend_causally,
    ) -> torch.Tensor:
        """Negative log-likelihoods [B, 1 + K, T] in nats, float32, zero outside the rows asked for.

        Args:
            semantic_rows: indices into the flattened [B, T] of frames whose first codebook is predicted, each
                from the position before it.
            acoustic_rows: the same for the other codebooks, which the decoder predicts.
            position_BT: positions inside each segment, for the rotary embedding.
            attend: attention of the backbone; packed rows keep it inside their segments.
        """
        hidden_ND = self.hidden_states(codes_BKT, position_BT, attend).flatten(0, 1)
        # A batch without targets asks for a row that has no code; any valid one will do, for it has no weight.
        codes_KN = codes_BKT.transpose(0, 1).flatten(1).clamp(min=0)
        semantic_nll = self._semantic_nll(hidden_ND[semantic_rows - 1], codes_KN[1, semantic_rows])
        acoustic_nll_KN = self._acoustic_nll(hidden_ND[acoustic_rows - 1], codes_KN[1:, acoustic_rows])
        empty_KN = semantic_nll.new_zeros(len(codes_KN), len(hidden_ND))
        nll_KN = torch.cat(
            [
                empty_KN[:1],
                empty_KN[1:2].index_copy(1, semantic_rows, semantic_nll[None]),
                empty_KN[2:].index_copy(1, acoustic_rows, acoustic_nll_KN),
            ]
        )
        return nll_KN.unflatten(1, (codes_BKT.shape[0], -1)).transpose(0, 1)

    def hidden_states(
        self, codes_BKT: torch.Tensor, position_BT: torch.Tensor, attend: Attend = attend_causally
    ) -> torch.Tensor:
        """The backbone's normalised output [B, T, D]."""
        return self.backbone_model.run(self._embed(codes_BKT), position_BT, attend)

    def depth_logits(self, hidden_ND: torch.Tensor, codes_KN: torch.Tensor) -> torch.Tensor:
        """Logits [K - 1, N, V] of codebooks 1.. given the backbone's output and codebooks 0..K-2 of each frame."""
        return self.depth_decoder(self._depth_inputs(hidden_ND, codes_KN))

    def _depth_inputs(self, hidden_ND: torch.Tensor, codes_KN: torch.Tensor) -> torch.Tensor:
        offsets_K = torch.arange(len(codes_KN), device=codes_KN.device) * self.config.audio_vocab_size
        embedded_NKD = self.audio_embedding((codes_KN + offsets_K[:, None]).T)
        return torch.cat([hidden_ND[:, None], embedded_NKD.to(hidden_ND.dtype)], 1)

    def _embed(self, codes_BKT: torch.Tensor) -> torch.Tensor:
        """The sum of the embeddings present at each position, without one [B, T, K, D] tensor."""
        batch_size, _, num_positions = codes_BKT.shape
        text_BT, audio_BTK = codes_BKT[:, 0], codes_BKT[:, 1:].transpose(1, 2)
        x_BTD = self.embed_text_tokens(text_BT.clamp(min=0)) * (text_BT >= 0)[..., None]
        offsets_K = torch.arange(audio_BTK.shape[-1], device=codes_BKT.device) * self.config.audio_vocab_size
        present_NK = (audio_BTK >= 0).flatten(0, 1)
        audio_ND = F.embedding_bag(
            (audio_BTK.clamp(min=0) + offsets_K).flatten(0, 1),
            self.audio_embedding.weight,
            mode="sum",
            per_sample_weights=present_NK.to(self.audio_embedding.weight.dtype),
        )
        x_BTD = x_BTD + audio_ND.unflatten(0, (batch_size, num_positions))
        return x_BTD.to(self.lm_head.weight.dtype)  # trained tables are float32 beside frozen layers of less

    def _semantic_nll(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        def chunk_nll(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return _cross_entropy(self.lm_head(hidden), target)

        return _by_chunks(chunk_nll, self.config.audio_vocab_size, hidden_ND, target_N)

    def _acoustic_nll(self, hidden_ND: torch.Tensor, codes_KN: torch.Tensor) -> torch.Tensor:
        """[K - 1, N]. One pass of the decoder: under FSDP all ranks run each layer equally often."""

        def chunk_nll(out_NKD: torch.Tensor, target_NK: torch.Tensor) -> torch.Tensor:
            logits_KNV = self.depth_decoder.codebooks_head(out_NKD.transpose(0, 1))
            return _cross_entropy(logits_KNV.flatten(0, 1), target_NK.T.flatten()).unflatten(0, target_NK.T.shape).T

        out_NKD = self.depth_decoder.hidden_states(self._depth_inputs(hidden_ND, codes_KN[:-1]))
        per_frame = (self.config.num_codebooks - 1) * self.config.audio_vocab_size
        return _by_chunks(chunk_nll, per_frame, out_NKD, codes_KN[1:].T).T


def _cross_entropy(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """[N] in float32."""
    return F.nll_loss(F.log_softmax(logits_NV, -1, dtype=torch.float32), target_N, reduction="none")


def _by_chunks(
    nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits_per_row: int,
    hidden: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Apply heads and loss to chunks of rows with at most MAX_LOGITS logits each."""
    per_chunk = max(1, MAX_LOGITS // logits_per_row)
    if len(hidden) <= per_chunk:
        return nll(hidden, target)
    chunks = zip(hidden.split(per_chunk), target.split(per_chunk), strict=True)
    return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks])
