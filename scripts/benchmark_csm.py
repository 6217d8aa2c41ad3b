"""CSM: the gradients of one batch, by ours and by transformers' `CsmForConditionalGeneration`.

All hold the same random weights in the same memory, train all of them, and see the same random codes: in every row
some text and the frames of audio behind it. transformers' model is given the shortest way that it has: embeddings of
ready codes in place of its codec, SDPA attention, no cache. "ours" learns every codebook of every frame, as that
does; the third contender is ours, too, with the decoder on one frame in `--amortization`. No optimizer runs, since it
would be the same for all.

Shape legend: B batch, K streams (row 0 text, then audio; transformers' audio alone), T positions.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CsmConfig as TheirConfig
from transformers import CsmForConditionalGeneration

from benchmark_tools import Contender, Load, Race
from finetune.data.types import ABSENT, Batch, send
from finetune.families.base import LossTerm
from finetune.families.csm.config import CsmConfig, TransformerConfig, to_transformers
from finetune.families.csm.family import batch_nll
from finetune.families.csm.frames import loss_weights
from finetune.families.csm.layouts import from_layout
from finetune.families.csm.model import CsmModel
from finetune.loss import denominators, local_loss

PACKAGE = "transformers"
NEEDS_GPU = {"csm_1b"}
FRAME_RATE_HZ = 12.5
# Text tokens for each frame, as in read speech: about 15 characters a second and four to a token.
TEXT_SHARE = 0.25
# The parts of the loss are compared one by one, so their weights do not matter.
TERMS = [LossTerm("semantic", slice(1, 2)), LossTerm("acoustic", slice(2, None))]
# transformers' model cannot be made without a codec; this one never runs.
CODEC = {
    "model_type": "mimi",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_filters": 4,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 16,
}


@dataclass(frozen=True)
class Size(Load):
    """A model and the batch it is measured on."""

    config: CsmConfig


def llamas(text_vocab_size: int, backbone: TransformerConfig, decoder: TransformerConfig) -> CsmConfig:
    return CsmConfig(text_vocab_size, backbone=backbone, decoder=decoder)


# In all but the first, decoding the codebooks of all frames costs 3.5 to 3.8 times as much as the backbone.
SIZES = {
    "tiny": Size(2, 1.6, 1, llamas(256, TransformerConfig(64, 256, 2, 4, 1), TransformerConfig(32, 128, 2, 2, 1))),
    "small": Size(
        2, 6.4, 1, llamas(4096, TransformerConfig(512, 2048, 10, 8, 2), TransformerConfig(256, 1024, 4, 4, 1))
    ),
    "middle": Size(
        2, 6.4, 1, llamas(16384, TransformerConfig(1024, 4096, 10, 16, 4), TransformerConfig(512, 2048, 4, 4, 1))
    ),
    "csm_1b": Size(2, 64.0, 3, CsmConfig()),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    amortization_help = "the third contender's decoder learns one in so many frames"
    parser.add_argument("--amortization", type=one_in, default=16, help=amortization_help)


def one_in(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def compilation(device: torch.device) -> AbstractContextManager[None]:
    """Nothing here is compiled."""
    return nullcontext()


def prepare(args: argparse.Namespace, folder: Path) -> Race:
    """Both models over the same weights, and their passes over one batch."""
    device = torch.device(args.device)
    config = SIZES[args.size].config
    theirs = their_model(config, device, getattr(torch, args.dtype))
    ours = our_model(theirs, config)
    num_frames = round(args.duration_sec * FRAME_RATE_HZ)
    codes_BKT = random_codes(config, args.batch_size, num_frames)
    all_frames, some_frames = (weigh(codes_BKT, amortization) for amortization in (1, args.amortization))
    amortized = f"ours 1/{args.amortization}"
    return Race(
        contenders=[
            build_ours("ours", ours, all_frames),
            build_theirs(theirs, codes_BKT.to(device), num_frames),
            build_ours(amortized, ours, some_frames),
        ],
        ratios={"ratio": ("transformers", "ours"), "amortization_ratio": ("ours", amortized)},
        num_frames=args.batch_size * num_frames,
        audio_sec=all_frames.audio_sec,
        facts={"text_share": TEXT_SHARE, "parameters": sum(weight.numel() for weight in ours.parameters())},
    )


def their_model(config: CsmConfig, device: torch.device, dtype: torch.dtype) -> CsmForConditionalGeneration:
    """transformers' model with random weights."""
    their_config = TheirConfig(**to_transformers(config), codec_config=CODEC)
    with device:
        model = CsmForConditionalGeneration._from_config(their_config, dtype=dtype, attn_implementation="sdpa")
    return model.train()


def our_model(theirs: CsmForConditionalGeneration, config: CsmConfig) -> CsmModel:
    """Our model over the memory of transformers' weights."""
    with torch.device("meta"):
        ours = CsmModel(config)
    weights = from_layout(theirs.state_dict(), "transformers", ours.state_dict(), config)
    ours.load_state_dict(weights, assign=True)
    return ours.train()


def random_codes(config: CsmConfig, batch_size: int, num_frames: int) -> torch.Tensor:
    """Codes [B, 1 + K, T] of text and the frames behind it."""
    num_text = max(1, round(num_frames * TEXT_SHARE))
    codes_BKT = torch.full((batch_size, 1 + config.num_codebooks, num_text + num_frames), ABSENT)
    codes_BKT[:, 0, :num_text] = torch.randint(config.text_vocab_size, (batch_size, num_text))
    audio_shape = (batch_size, config.num_codebooks, num_frames)
    codes_BKT[:, 1:, num_text:] = torch.randint(config.audio_vocab_size, audio_shape)
    return codes_BKT


def weigh(codes_BKT: torch.Tensor, amortization: int) -> Batch:
    """The batch with the loss weights that training gives it."""
    batch_size, _, num_positions = codes_BKT.shape
    is_trained_T = torch.ones(num_positions, dtype=torch.bool)
    rng = np.random.default_rng(0)
    weights = [loss_weights(codes_KT, is_trained_T, amortization, rng) for codes_KT in codes_BKT]
    segment_BT = torch.zeros(batch_size, num_positions, dtype=torch.int64)
    num_frames = int((codes_BKT[:, 1] != ABSENT).sum())
    return Batch(codes_BKT, torch.stack(weights), segment_BT, audio_sec=num_frames / FRAME_RATE_HZ)


def build_ours(name: str, model: CsmModel, batch: Batch) -> Contender:
    """What train.py computes for one microbatch on one rank."""

    def losses() -> torch.Tensor:
        term_denominators = denominators([batch], TERMS)
        nll_BKT = batch_nll(model, batch)
        loss_weight_BKT = send(batch.loss_weight_BKT, nll_BKT.device)
        parts = zip(TERMS, term_denominators, strict=True)
        return torch.stack([local_loss(nll_BKT, loss_weight_BKT, [term], [total]) for term, total in parts])

    return Contender(name, dict(model.named_parameters()), losses)


def build_theirs(model: CsmForConditionalGeneration, codes_BKT: torch.Tensor, num_frames: int) -> Contender:
    """transformers' own forward pass with labels for every frame, behind embeddings made as it makes them."""
    text_BT, audio_BKT = codes_BKT[:, 0, :-num_frames], codes_BKT[:, 1:, -num_frames:]
    audio_BTK = audio_BKT.transpose(1, 2).contiguous()
    labels_BTK = F.pad(audio_BTK, (0, 0, text_BT.shape[1], 0), value=-100)

    def losses() -> torch.Tensor:
        embedded = [model.embed_text_tokens(text_BT), model.backbone_model.embed_tokens(audio_BTK)]
        output = model(inputs_embeds=torch.cat(embedded, 1), labels=labels_BTK, use_cache=False)
        return torch.stack([output.backbone_loss, output.depth_decoder_loss])

    ours = {name: weight for name, weight in model.named_parameters() if not name.startswith("codec_model.")}
    return Contender("transformers", ours, losses)
