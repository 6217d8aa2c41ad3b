"""Moshi (https://arxiv.org/abs/2410.00037): full-duplex dialogue over two voices and a text stream.

Shape legend: B batch, K streams (row 0 text, 1..dep_q the model's voice, then the user's), T frames.
"""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from moshi.conditioners import ConditionAttributes
from moshi.models import loaders
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from finetune.codec import Codec
from finetune.data.types import ABSENT, SAMPLE_RATE_HZ, Batch, Clip, Sample, send
from finetune.errors import UserError
from finetune.families.base import Adapter, LossTerm, Weights, target_rows
from finetune.families.moshi_files import find_files, open_weights
from finetune.json_files import read_json
from finetune.segments import extend_last, is_packed, positions, segment_attention
from finetune.text_stream import TextStreamRules, build_text_stream, num_frames_of
from moshi_overrides.fsdp import allow_fully_shard
from moshi_overrides.training_lm import TrainingLM, delay_streams

# What evaluation counts a padding token, whatever the run trains with, so that runs compare: moshi-finetune's
# default.
EVAL_PADDING_WEIGHT = 0.5
ADAPTER_FILE = "lora.safetensors"
MERGED_FILE = "consolidated.safetensors"
# Keys of config.json that are not arguments of LMModel (moshi's CheckpointInfo takes them out).
_NOT_FOR_LM = ("lora", "lora_rank", "lora_scaling")


@dataclass
class MoshiArgs:
    family: Literal["moshi"] = "moshi"
    """Model family."""
    hf_repo_id: str | None = "kyutai/moshiko-pytorch-bf16"
    """Hub repository of the checkpoint; what the paths below do not give comes from it."""
    path: str | None = None
    """Local model folder with a `config.json`; wins over `hf_repo_id`."""
    moshi_path: str | None = None
    """Weights file, or `hf://owner/repo/file`; wins over `path`. So do the next four."""
    mimi_path: str | None = None
    """Codec file."""
    mimi_config_path: str | None = None
    """Codec architecture; default: Kyutai's Mimi."""
    tokenizer_path: str | None = None
    """SentencePiece model."""
    config_path: str | None = None
    """Model `config.json`."""
    architecture: dict[str, Any] | None = None
    """A model of one's own: keyword arguments of moshi's `LMModel`, over those of Moshi 7B. It is made untrained
    in `path` on first use, with the codec of `mimi_path` and the tokenizer of `tokenizer_path`."""
    first_codebook_weight_multiplier: float = 1.0
    """Loss weight of the first (semantic) codebook against 1 for the others."""
    text_padding_weight: float = 0.5
    """Loss weight of padding and end-of-padding tokens against 1 for words."""
    keep_main_only: bool = True
    """Text stream: the words of SPEAKER_MAIN alone."""
    keep_and_shift: bool = False
    """Text stream: a word that starts too early queues instead of cutting the last one off."""
    use_bos_eos: bool = False
    """Text stream: mark turns with BOS and EOS; needs `keep_main_only: false`."""
    audio_delay: float = 0.0
    """Text stream: seconds by which text leads the audio; negative: frames at the start without text."""
    in_word_padding: int | None = None
    """Text stream: token that fills the frames up to a word's end; default: the padding."""

    def __post_init__(self) -> None:
        for name in ("first_codebook_weight_multiplier", "text_padding_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if self.use_bos_eos and self.keep_main_only:
            raise ValueError("use_bos_eos: true needs keep_main_only: false, which it would mark the turns of")
        if self.architecture is not None and self.path is None:
            raise ValueError("architecture: the new model needs a folder; set model.path")


class MoshiFamily:
    """Moshi and its relatives (Hibiki, one-way and conditioned models): any LMModel of the moshi package."""

    Args = MoshiArgs
    unit = "window"
    can_speak = False
    max_positions = None

    def __init__(self, args: MoshiArgs, device: torch.device):
        self._args = args
        self._open_files = ExitStack()
        self._info, self._addresses = find_files(args)
        config = self._info.raw_config or loaders._lm_kwargs
        if config.get("lora"):
            remedy = "merge it first (scripts/merge_adapter.py) or start from its base"
            raise UserError(f"model: the config describes an adapter (lora: true); {remedy}")
        self._config: dict[str, Any] = {key: config[key] for key in config if key not in _NOT_FOR_LM}
        self._lm_kwargs = _lm_kwargs(self._info.lm_config or loaders._lm_kwargs)
        self._n_q, self._dep_q = self._lm_kwargs["n_q"], self._lm_kwargs["dep_q"]
        self._delays: list[int] = self._lm_kwargs["delays"]
        self._codec = Codec(self._load_mimi(device))
        self._tokenizer = _load_tokenizer(self._info.tokenizer)
        if self._tokenizer.vocab_size() > self._lm_kwargs["text_card"]:
            has, fits = self._tokenizer.vocab_size(), self._lm_kwargs["text_card"]
            raise UserError(f"model: the tokenizer has {has} pieces, the model {fits}; use the model's own tokenizer")
        self._conditioners = _text_conditioners(self._lm_kwargs)
        self.frame_size = self._codec.frame_size
        self.main_speaker_only = args.keep_main_only
        self.can_pack = not self._conditioners  # conditions hold for whole rows
        self.num_tail_frames = max(self._delays)
        self.min_channels = 2 if 0 < self._dep_q < self._n_q else 1
        self.terms = [LossTerm("text", slice(0, 1))]
        if self._dep_q:
            self.terms.append(LossTerm("audio", slice(1, 1 + self._dep_q)))
        self._rules = TextStreamRules(
            frame_rate_hz=SAMPLE_RATE_HZ / self.frame_size,
            padding_id=self._lm_kwargs.get("existing_text_padding_id", 3),
            end_of_padding_id=self._lm_kwargs.get("existing_text_end_padding_id", 0),
            keep_main_only=args.keep_main_only,
            keep_and_shift=args.keep_and_shift,
            use_bos_eos=args.use_bos_eos,
            audio_delay_sec=args.audio_delay,
            in_word_padding_id=args.in_word_padding,
        )

    @classmethod
    def prepare(cls, args: MoshiArgs, seed: int) -> Path | None:
        """Write an untrained model into `args.path`, if it describes one that is not there yet."""
        if args.architecture is None or args.path is None:
            return None
        config = Path(args.path) / "config.json"
        if not config.exists():
            return write_untrained(args, args.architecture, Path(args.path), seed)
        made = read_json(config)
        for key, value in args.architecture.items():
            if made.get(key) != value:
                said = f"model.architecture.{key}: {value}, but {args.path} was made with {made.get(key)}"
                raise UserError(f"{said}; choose another model.path or delete the folder")
        return None

    def create(self, device: torch.device) -> TrainingLM:
        """A TrainingLM in float32."""
        kwargs = copy.deepcopy(self._lm_kwargs)  # moshi's conditioner factories write into it
        if "conditioners" in kwargs:
            kwargs["condition_provider"] = loaders.get_conditioner_provider(kwargs["dim"], device, kwargs)
            del kwargs["conditioners"]
        if kwargs.get("fuser") is not None:
            kwargs["fuser"] = loaders.get_condition_fuser(kwargs)
        try:
            model = TrainingLM(device=device, dtype=torch.float32, **kwargs)
        except (TypeError, AssertionError, KeyError, ValueError) as error:
            raise UserError(f"model: moshi refuses this architecture ({error}); mend config.json") from error
        allow_fully_shard(model)
        return model

    def weights(self) -> Weights:
        """The base checkpoint."""
        steps = 1
        if self._lm_kwargs.get("depformer_weights_per_step"):
            schedule = self._lm_kwargs.get("depformer_weights_per_step_schedule")
            steps = max(schedule) + 1 if schedule else self._dep_q
        return open_weights(self._info.moshi_weights, steps, self._open_files)

    def count_text(self, speaker: str, text: str) -> int:
        """Moshi's text lies over its audio and takes no position of its own."""
        return 0

    def tokenize(
        self, clips: Sequence[Clip], generators: Sequence[np.random.Generator], *, evaluation: bool = False
    ) -> list[Sample]:
        """Codes of both voices below the text stream; the user's voice is heard, not predicted."""
        codes = self._codec.encode([wav for clip in clips for wav in self._voices(clip)])
        per_clip = len(codes) // len(clips)
        return [
            self._sample(clip, codes[index * per_clip : (index + 1) * per_clip], evaluation)
            for index, clip in enumerate(clips)
        ]

    def nll(self, model: TrainingLM, batch: Batch) -> torch.Tensor:
        """One forward pass over the frames that have a target."""
        device = model.device
        weight_BKT = batch.loss_weight_BKT
        segment_BT = extend_last(batch.segment_BT)  # delayed streams may end in the padding
        position_BT = positions(segment_BT) if is_packed(segment_BT) else None
        if position_BT is not None and not self.can_pack:
            raise UserError("data.packing: pack cannot keep the text conditions of a row's samples apart; use bucket")
        # A delayed stream's target of frame t stands at frame t + delay of the model's sequence.
        nowhere_BK1 = torch.zeros_like(weight_BKT[..., :1])
        has_target_BKT = delay_streams(self._delays, weight_BKT, nowhere_BK1, position_BT) > 0
        text_rows = target_rows(has_target_BKT[:, 0])
        audio_rows = target_rows(has_target_BKT[:, 1 : 1 + self._dep_q].any(1))
        nll_BKT = model(
            send(batch.codes_BKT, device),
            send(text_rows, device),
            send(audio_rows, device),
            self._prepare_conditions(model, batch),
            None if position_BT is None else send(position_BT, device),
            None if position_BT is None else segment_attention(segment_BT, device, model.context),
        )
        predicted_BKT = send(weight_BKT, device)[:, : nll_BKT.shape[1]] > 0
        nll_BKT = torch.where(predicted_BKT, nll_BKT, 0.0)
        return F.pad(nll_BKT, (0, 0, 0, weight_BKT.shape[1] - nll_BKT.shape[1]))

    def embeddings(self, model: TrainingLM) -> list[nn.Module]:
        """Input embeddings of both transformers."""
        tables = [model.text_emb, *model.emb]
        return [*tables, model.depformer_text_emb, *model.depformer_emb] if self._dep_q else tables

    def exact_modules(self, model: TrainingLM) -> list[nn.Module]:
        """The conditioners, which moshi keeps in float32."""
        return [] if model.condition_provider is None else [model.condition_provider]

    def param_groups(self, model: TrainingLM) -> list[dict[str, Any]]:
        """Everything, in one group, as in moshi-finetune."""
        return [{"params": list(model.parameters())}]

    def parts(self, model: TrainingLM) -> dict[str, list[nn.Module]]:
        """The transformer over time and the Depformer, each with its heads, and the embeddings of both."""
        temporal = [model.transformer, model.out_norm, model.text_linear, model.extra_heads]
        temporal += [module for module in (model.condition_provider, model.fuser) if module is not None]
        depth = [model.depformer_in, model.depformer, model.depformer_norms, model.linears] if self._dep_q else []
        return {"temporal": temporal, "depformer": depth, "embeddings": self.embeddings(model)}

    def blocks(self, model: TrainingLM) -> list[nn.Module]:
        """The layers of both transformers."""
        return [*model.transformer.layers, *(model.depformer.layers if self._dep_q else [])]

    def export(self, folder: Path, tensors: dict[str, torch.Tensor], adapter: Adapter | None) -> None:
        """What `python -m moshi.server --config-path` reads. Files outside the folder have full addresses."""
        file = MERGED_FILE if adapter is None else ADAPTER_FILE
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        config: dict[str, Any] = {**self._config, **self._addresses, "lora": adapter is not None}
        if adapter is None:
            config["moshi_name"] = file
        else:
            config |= {"lora_rank": adapter.rank, "lora_scaling": adapter.scaling}
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    def read_adapter(self, folder: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
        """Adapters that `export` wrote."""
        config = read_json(folder / "config.json")
        adapter = Adapter(config["lora_rank"], config["lora_scaling"], dropout=0.0, rslora=False)
        return adapter, load_file(folder / ADAPTER_FILE)

    def _load_mimi(self, device: torch.device) -> Any:
        num_codebooks = max(self._dep_q, self._n_q - self._dep_q)
        try:
            mimi = loaders.get_mimi(self._info.mimi_weights, self._info.mimi_config, device, num_codebooks)
        except Exception as error:  # whatever a wrong file or architecture makes moshi say
            where = f"model.mimi_path: {self._info.mimi_weights}"
            raise UserError(f"{where}: not the codec its config describes ({error}); check both files") from error
        if mimi.num_codebooks != num_codebooks or mimi.cardinality != self._lm_kwargs["card"]:
            has = f"{mimi.total_codebooks} codebooks of {mimi.cardinality}"
            needs = f"{num_codebooks} of {self._lm_kwargs['card']}"
            raise UserError(f"model: the codec has {has}, the model needs {needs}; use the model's own codec")
        return mimi

    def _voices(self, clip: Clip) -> list[np.ndarray]:
        """The channels that the model has codebooks for: its own voice (left), the user's (right)."""
        left, right = clip.wav_CS[0], clip.wav_CS[-1]
        if not self._dep_q:  # a listener: it writes down what the main speaker says
            return [left]
        return [left, right] if self._n_q > self._dep_q else [left]

    def _sample(self, clip: Clip, voices: Sequence[torch.Tensor], evaluation: bool) -> Sample:
        self._check_conditions(clip)
        num_frames = num_frames_of(round(clip.duration_sec * SAMPLE_RATE_HZ), self.frame_size)
        num_present = num_frames_of(clip.wav_CS.shape[-1], self.frame_size)
        codes_KT = torch.full((1 + self._n_q, num_frames), ABSENT)
        codes_KT[0, :num_present] = torch.tensor(
            build_text_stream(clip.words, num_present, self._tokenizer, self._rules), dtype=torch.int64
        )
        codes_KT[1 : 1 + self._dep_q, :num_present] = voices[0][: self._dep_q]
        codes_KT[1 + self._dep_q :, :num_present] = voices[-1][: self._n_q - self._dep_q]
        return Sample(
            codes_KT=codes_KT,
            loss_weight_KT=self._loss_weights(codes_KT, evaluation),
            audio_sec=clip.audio_sec,
            conditions=clip.conditions,
            path=clip.path,
        )

    def _loss_weights(self, codes_KT: torch.Tensor, evaluation: bool) -> torch.Tensor:
        args = self._args
        weight_KT = (codes_KT != ABSENT).float()
        weight_KT[1 + self._dep_q :] = 0.0  # the user's voice
        is_padding_T = torch.isin(codes_KT[0], torch.tensor(sorted(self._rules.padding_ids)))
        weight_KT[0, is_padding_T] *= EVAL_PADDING_WEIGHT if evaluation else args.text_padding_weight
        if self._dep_q and not evaluation:
            weight_KT[1] *= args.first_codebook_weight_multiplier
        num_frames = codes_KT.shape[1]
        for row, delay in enumerate(self._delays):
            weight_KT[row, max(0, num_frames - delay) :] = 0.0  # the delay moves them past the window's end
        return weight_KT

    def _check_conditions(self, clip: Clip) -> None:
        """Raise UserError for a text condition that the model does not know; models without any take none."""
        for name, value in clip.conditions.items() if self._conditioners else ():
            known = self._conditioners.get(name, {}).get("possible_values")
            if name not in self._conditioners:
                names = ", ".join(self._conditioners)
                raise UserError(f"data: {clip.path}: text_conditions.{name}: the model knows {names}; rename it")
            if known is not None and value not in known:
                raise UserError(
                    f"data: {clip.path}: text_conditions.{name}: {value!r} is not one of {', '.join(known)}"
                )

    def _prepare_conditions(self, model: TrainingLM, batch: Batch) -> dict[str, Any] | None:
        if model.condition_provider is None:
            return None
        names = model.condition_provider.text_conditions
        attributes = [
            ConditionAttributes(text={name: conditions.get(name) for name in names}) for conditions in batch.conditions
        ]
        return model.condition_provider.prepare(attributes)


def write_untrained(args: MoshiArgs, architecture: dict[str, Any], folder: Path, seed: int) -> Path:
    """Write a model folder: config.json, random weights in bfloat16, codec and tokenizer.

    Raises:
        UserError: a file is missing or the architecture is none.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"model.path: {folder} holds other files; give a new folder for the new model")
    for key in ("mimi_path", "tokenizer_path"):
        path = getattr(args, key)
        if path is None or not Path(path).is_file():
            raise UserError(f"model.{key}: {path}: no such file; a new model needs its codec and tokenizer")
    mimi_config = read_json(Path(args.mimi_config_path)) if args.mimi_config_path else None
    derived = {
        "card": (mimi_config or loaders._mimi_config)["quantizer"]["bins"],
        "text_card": _load_tokenizer(args.tokenizer_path).vocab_size(),
    }
    kwargs = {**loaders._lm_kwargs, **derived, **architecture}
    torch.manual_seed(seed)
    try:
        model = loaders.get_moshi_lm(None, copy.deepcopy(kwargs), dtype=torch.float32)
    except (TypeError, AssertionError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"model.architecture: moshi refuses it ({error}); see moshi's LMModel") from error
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = dict(kwargs)
    sources = {"mimi_name": args.mimi_path, "mimi_config_name": args.mimi_config_path}
    for key, source in {**sources, "tokenizer_name": args.tokenizer_path}.items():
        if source is not None:
            shutil.copyfile(source, temporary / Path(source).name)
            config[key] = Path(source).name
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()},
        temporary / loaders.MOSHI_NAME,
    )
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(temporary, folder)  # an empty folder of that name may be there
    return folder


def _lm_kwargs(config: dict[str, Any]) -> dict[str, Any]:
    """LMModel's arguments, out of a config that may hold adapters and older spellings (moshi's loader)."""
    kwargs = {key: value for key, value in config.items() if key not in _NOT_FOR_LM}
    kwargs.pop("depformer_causal", None)
    if "demux_second_stream" in kwargs:
        kwargs["demux_second_text_stream"] = kwargs.pop("demux_second_stream")
    return kwargs


def _text_conditioners(lm_kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the text conditioners by name; others have no place in the data and are refused."""
    conditioners = lm_kwargs.get("conditioners") or {}
    for name, settings in conditioners.items():
        if settings["type"] != "lut":
            said = f"conditioner {name} is of type {settings['type']}"
            raise UserError(f"model: {said}; only text conditions (lut) can be trained")
    return {name: settings["lut"] for name, settings in conditioners.items()}


def _load_tokenizer(path: Path | str | None) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"model.tokenizer_path: {path}: not a SentencePiece model ({error})") from error
