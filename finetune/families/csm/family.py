"""CSM (SesameAILabs/csm): conversations of turns, each its text and then its audio, at one position a frame.

Shape legend: B batch, K streams (row 0 text, then the audio codebooks), T positions.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from moshi.models import MimiModel
from torch import nn

from finetune.codec import Codec
from finetune.data.types import ABSENT, SAMPLE_RATE_HZ, Batch, Conversation, Sample, send
from finetune.errors import UserError
from finetune.families.base import Adapter, Line, SpeechChunk, Weights, target_rows
from finetune.families.csm.config import MAX_POSITIONS
from finetune.families.csm.export import read_adapter, write_adapter, write_sesame, write_transformers
from finetune.families.csm.files import find_files, load_mimi, open_weights
from finetune.families.csm.frames import loss_terms, loss_weights, turn_codes
from finetune.families.csm.model import CsmModel
from finetune.families.csm.speaking import generate_codes, prompt_codes, stream_audio
from finetune.families.csm.text import TurnTokenizer, check_template
from finetune.families.csm.untrained import prepare_untrained
from finetune.sampling import Sampling
from finetune.segments import attend_causally, positions, segment_attention


@dataclass
class CsmArgs:
    family: Literal["csm"] = "csm"
    """Model family."""
    hf_repo_id: str | None = "sesame/csm-1b"
    """Hub repository of the checkpoint; its terms must be accepted on its page."""
    path: str | None = None
    """Local model folder, in Sesame's, transformers' or csm-hf's layout; wins over `hf_repo_id`."""
    mimi_path: str | None = None
    """Codec file in moshi's layout; default: the checkpoint's own, or Kyutai's Mimi from the hub."""
    mimi_config_path: str | None = None
    """Codec architecture; default: Kyutai's Mimi."""
    tokenizer_path: str | None = None
    """A `tokenizer.json` or its folder; default: the checkpoint's own, or Llama 3's from the hub."""
    text_template: str | None = None
    """How a turn's text is written for the tokenizer; default: the checkpoint's own, or `[{speaker}]{text}`."""
    bos_token: str | None = None
    """The tokenizer's token before a turn's text; default: the checkpoint's own, or `<|begin_of_text|>`."""
    eos_token: str | None = None
    """The tokenizer's token behind a turn's text; default: the checkpoint's own, or `<|end_of_text|>`."""
    amortization: int = 16
    """The decoder learns from one in so many frames, drawn anew each time; 1 takes all."""
    first_codebook_weight_multiplier: float | None = None
    """Weight m of the first codebook in the loss (m·c0 + 31·depth)/(m + 31). Default: 31, both halves alike."""
    decoder_loss_weight: float | None = None
    """The same in sesame-finetune's spelling, w in (1 - w)·c0 + w·depth: w = 31/(m + 31), so 0.5 is m = 31."""
    export_layout: Literal["transformers", "sesame"] = "transformers"
    """Layout of whole models in checkpoints. Adapters are in PEFT's."""
    architecture: dict[str, Any] | None = None
    """A model of one's own: `backbone` and `decoder` with sizes over CSM-1B's, and `num_codebooks`. It is made
    untrained in `path` on first use, with the codec of `mimi_path` and the tokenizer of `tokenizer_path`."""

    def __post_init__(self) -> None:
        if self.text_template is not None:
            check_template(self.text_template)
        if self.amortization < 1:
            raise ValueError(f"amortization: {self.amortization} is below 1")
        multiplier, weight = self.first_codebook_weight_multiplier, self.decoder_loss_weight
        if multiplier is not None and weight is not None:
            raise ValueError("decoder_loss_weight: set beside first_codebook_weight_multiplier; keep one")
        if multiplier is not None and multiplier < 0:
            raise ValueError(f"first_codebook_weight_multiplier: {multiplier} is negative")
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"decoder_loss_weight: {weight} is not in [0, 1]")
        if self.architecture is not None and self.path is None:
            raise ValueError("architecture: the new model needs a folder; set model.path")


class CsmFamily:
    """CSM of any size."""

    Args = CsmArgs
    unit = "conversation"
    min_channels = 1
    main_speaker_only = False
    can_pack = True
    can_speak = True
    num_tail_frames = 0
    max_positions = MAX_POSITIONS

    def __init__(self, args: CsmArgs, device: torch.device):
        self._args = args
        self._open_files = ExitStack()
        self._files = find_files(args)
        self._config = self._files.config
        self._num_codebooks = self._config.num_codebooks
        self._tokenizer = TurnTokenizer.of(self._files.tokenizer_path, self._files.settings)
        if self._tokenizer.vocab_size > self._config.text_vocab_size:
            has, fits = self._tokenizer.vocab_size, self._config.text_vocab_size
            raise UserError(f"model: the tokenizer has {has} tokens, the model {fits}; use the model's own tokenizer")
        self._mimi = load_mimi(self._files, self._num_codebooks, device)
        self._codec = Codec(self._mimi)
        self.frame_size = self._codec.frame_size
        self.terms = loss_terms(self._num_codebooks, args.first_codebook_weight_multiplier, args.decoder_loss_weight)

    @classmethod
    def prepare(cls, args: CsmArgs, seed: int) -> Path | None:
        """Write an untrained model into `args.path`, if it describes one that is not there yet."""
        if args.architecture is None or args.path is None:
            return None
        return prepare_untrained(args, args.architecture, Path(args.path), seed)

    def create(self, device: torch.device) -> CsmModel:
        """A CsmModel in float32."""
        with device:
            return CsmModel(self._config)

    def weights(self) -> Weights:
        """The base checkpoint."""
        return open_weights(self._files, self._open_files)

    def count_text(self, speaker: str, text: str) -> int:
        """Positions of a turn's text."""
        return len(self._tokenizer.encode(speaker, text))

    def tokenize(
        self, clips: Sequence[Conversation], generators: Sequence[np.random.Generator], *, evaluation: bool = False
    ) -> list[Sample]:
        """Each turn's text, its audio frames, and a frame of zeros where the speaker ends."""
        codes = iter(self._codec.encode([turn.wav_S for clip in clips for turn in clip.turns]))
        return [
            self._sample(clip, [next(codes) for _ in clip.turns], 1 if evaluation else self._args.amortization, rng)
            for clip, rng in zip(clips, generators, strict=True)
        ]

    def nll(self, model: CsmModel, batch: Batch) -> torch.Tensor:
        """One pass of the backbone, and of the decoder over the frames that it learns from."""
        return batch_nll(model, batch)

    def embeddings(self, model: CsmModel) -> list[nn.Module]:
        """The tables of text and of audio, which both transformers read."""
        return [model.embed_text_tokens, model.audio_embedding]

    def exact_modules(self, model: CsmModel) -> list[nn.Module]:
        """None."""
        return []

    def param_groups(self, model: CsmModel) -> list[dict[str, Any]]:
        """Everything, in one group."""
        return [{"params": list(model.parameters())}]

    def parts(self, model: CsmModel) -> dict[str, list[nn.Module]]:
        """Both transformers with their heads, and the embeddings that they share."""
        backbone = model.backbone_model
        return {
            "backbone": [backbone.layers, backbone.norm, model.lm_head],
            "decoder": [model.depth_decoder],
            "embeddings": self.embeddings(model),
        }

    def blocks(self, model: CsmModel) -> list[nn.Module]:
        """The layers of both transformers."""
        return [*model.backbone_model.layers, *model.depth_decoder.model.layers]

    def export(self, folder: Path, tensors: dict[str, torch.Tensor], adapter: Adapter | None) -> None:
        """A PEFT adapter, or the whole model in the layout that the configuration asks for."""
        if adapter is not None:
            write_adapter(folder, tensors, adapter, self._files)
        elif self._args.export_layout == "sesame":
            write_sesame(folder, tensors, self._config, self._files.tokenizer_path, self._files.settings)
        else:
            write_transformers(folder, tensors, self._config, self._mimi, self._files)

    def read_adapter(self, folder: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
        """A PEFT adapter."""
        return read_adapter(folder)

    def speak(
        self, model: CsmModel, lines: Sequence[Line], sampling: Sampling, max_sec: float
    ) -> Iterator[SpeechChunk]:
        """Speak several texts at once, each after its context."""
        wavs = iter(self._codec.encode([turn.wav_S for line in lines for turn in line.context]))
        prompts = [self._prompt(line, [next(wavs) for _ in line.context]) for line in lines]
        frames = generate_codes(
            model,
            prompts,
            max_frames=max(1, round(max_sec * SAMPLE_RATE_HZ / self.frame_size)),
            sampling=sampling,
            num_entries=self._codec.num_entries,
        )
        return stream_audio(self._voice, frames)

    @cached_property
    def _voice(self) -> MimiModel:
        """A codec of its own to speak with: streaming is a state of the module, and the loader's thread encodes."""
        return copy.deepcopy(self._mimi)

    def _prompt(self, line: Line, audio: list[torch.Tensor]) -> torch.Tensor:
        said = [
            (self._tokenizer.encode(turn.speaker, turn.text), audio_KT)
            for turn, audio_KT in zip(line.context, audio, strict=True)
        ]
        return prompt_codes(said, self._tokenizer.encode(line.speaker, line.text), self._num_codebooks)

    def _sample(
        self, conversation: Conversation, audio: list[torch.Tensor], amortization: int, rng: np.random.Generator
    ) -> Sample:
        pieces = [torch.full((1 + self._num_codebooks, 0), ABSENT)]
        is_trained = [torch.zeros(0, dtype=torch.bool)]
        for turn, audio_KT in zip(conversation.turns, audio, strict=True):
            text_ids = self._tokenizer.encode(turn.speaker, turn.text)
            pieces.append(turn_codes(text_ids, audio_KT, is_cut=turn.is_cut))
            is_trained.append(torch.full((pieces[-1].shape[1],), turn.is_trained))
        codes_KT = torch.cat(pieces, 1)
        return Sample(
            codes_KT=codes_KT,
            loss_weight_KT=loss_weights(codes_KT, torch.cat(is_trained), amortization, rng),
            audio_sec=sum(turn.wav_S.shape[-1] for turn in conversation.turns) / SAMPLE_RATE_HZ,
            path=conversation.path,
        )


def batch_nll(model: CsmModel, batch: Batch) -> torch.Tensor:
    """What `CsmFamily.nll` gives, which needs nothing of the family."""
    device = model.lm_head.weight.device
    weight_BKT = batch.loss_weight_BKT
    semantic_rows = target_rows(weight_BKT[:, 1] > 0)
    acoustic_rows = target_rows((weight_BKT[:, 2:] > 0).any(1))
    nll_BKT = model(
        send(batch.codes_BKT, device),
        send(semantic_rows, device),
        send(acoustic_rows, device),
        send(positions(batch.segment_BT), device),
        segment_attention(batch.segment_BT, device) or attend_causally,
    )
    return torch.where(send(weight_BKT, device) > 0, nll_BKT, 0.0)
