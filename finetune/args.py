"""The configuration every family shares. One YAML key is one field; its docstring says meaning and unit."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.config import CommandLineText, apply_overrides, decode, encode, read_yaml
from finetune.errors import UserError
from finetune.sampling import Sampling

# A question, a statement, and one with numbers and a name.
SENTENCES = (
    "Have you been waiting long?",
    "The weather turned, and we walked home along the river.",
    "Doctor Reyes has twenty-three letters to answer before noon.",
)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message); the decoder puts the section's name before it."""
    if not condition:
        raise ValueError(message)


@dataclass
class DataArgs:
    train_data: str
    """Training data, `path[:weight],path[:weight]`. Moshi: manifests (`.jsonl`, `.jsonl.gz`) or folders of them;
    CSM: these and the formats listed under "Data for CSM"."""
    eval_data: str | None = None
    """Evaluation data, in the same form; weights are ignored."""
    shuffle: bool = False
    """Draw the windows of each epoch in an order that depends on (seed, epoch) only."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a bad file does: stop the run with one line, or be reported once and left out."""
    num_workers: int = 4
    """Threads that read, resample and tokenise ahead of training, per rank."""
    prefetch_batches: int = 4
    """Batches kept ready ahead of the training step, per rank."""
    packing: Literal["pack", "bucket", "none"] | None = None
    """How samples share the rows of a batch. `pack`: several behind each other in one row, each attending to itself
    alone; `bucket`: one a row, those of like length together; `none`: one a row, as they come. Default: `pack` for
    conversations, `none` for windows."""
    max_frames: int = 2048
    """Conversations: positions in a row, and the longest window cut from a conversation. CSM's limit is 2,048."""
    context_turns: int = 4
    """Conversations: earlier turns that a later window of a long conversation keeps as context."""
    mask_speaker_ids: list[str] = field(default_factory=list)
    """Conversations: speakers whose turns are context, never trained."""
    max_audio_length_ms: float | None = None
    """Conversations: longer audio of a turn is cut off here, in milliseconds."""

    def __post_init__(self) -> None:
        require(bool(self.train_data), "train_data: empty; set it to a manifest (.jsonl) or a folder of them")
        require(self.num_workers >= 1, f"num_workers: {self.num_workers} is below 1")
        require(self.prefetch_batches >= 1, f"prefetch_batches: {self.prefetch_batches} is below 1")
        require(self.max_frames >= 2, f"max_frames: {self.max_frames} is below 2")
        require(self.context_turns >= 0, f"context_turns: {self.context_turns} is negative")
        limit = self.max_audio_length_ms
        require(limit is None or limit >= 80, f"max_audio_length_ms: {limit} is shorter than one frame (80 ms)")


@dataclass
class LoraArgs:
    rank: int = 64
    """Rank of the adapters."""
    scaling: float = 2.0
    """Factor on the adapters' output."""
    alpha: float | None = None
    """The factor in PEFT's spelling, which wins over `scaling`: alpha/rank."""
    rslora: bool = False
    """Rank-stabilised LoRA: the factor is alpha/√rank (https://arxiv.org/abs/2312.03732)."""
    dropout: float = 0.0
    """Dropout probability on the adapters' input."""
    ft_embed: bool = False
    """Also train the embedding tables, in full."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank: {self.rank} is below 1")
        require(self.alpha is not None or not self.rslora, "rslora: true needs alpha; set it")
        require(self.alpha is None or self.alpha > 0, f"alpha: {self.alpha} is not positive")
        if self.alpha is not None:
            self.scaling = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        require(self.scaling > 0, f"scaling: {self.scaling} is not positive")
        require(0 <= self.dropout < 1, f"dropout: {self.dropout} is not in [0, 1)")


@dataclass
class OptimArgs:
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps AdamW's state in 8 bits, a quarter of the memory (torchao, extra `lowbit`)."""
    lr: float = 1e-4
    """Highest learning rate."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
    pct_start: float = 0.05
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    """Shape of the learning rate. `one_cycle` is PyTorch's OneCycleLR: it starts at lr/25, ends at lr/250,000
    and also cycles AdamW's beta1 between 0.95 and 0.85. The others rise linearly from 0 and leave beta1 at 0.9."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr: {self.lr} is not positive")
        require(self.weight_decay >= 0, f"weight_decay: {self.weight_decay} is negative")
        require(0 <= self.pct_start <= 1, f"pct_start: {self.pct_start} is not in [0, 1]")


@dataclass
class ParallelArgs:
    strategy: Literal["auto", "fsdp", "hsdp", "ddp"] = "auto"
    """`fsdp` shards parameters over all ranks, `hsdp` inside groups of `shard_size` and replicates over groups,
    `ddp` replicates everything (needs that the frozen base fits). `auto`: `ddp` for LoRA where the base takes
    under half of a GPU, `fsdp` otherwise."""
    shard_size: int | None = None
    """Ranks in one sharding group of `hsdp`; default: the ranks of one node."""

    def __post_init__(self) -> None:
        require(self.shard_size is None or self.shard_size >= 1, f"shard_size: {self.shard_size} is below 1")


@dataclass
class GenerateArgs:
    freq: int = 0
    """Steps between spoken samples; below 1: none. For families that speak texts (CSM)."""
    sentences: list[str] = field(default_factory=lambda: list(SENTENCES))
    """What is said."""
    speaker: str = "0"
    """Who says it."""
    context_audio: str | None = None
    """A clip of a voice; each sentence is then also spoken after it."""
    context_text: str = ""
    """What is said in that clip."""
    max_sec: float = 10.0
    """Longest sample in seconds."""
    temperature: float = 0.9
    """Divides the logits; 0 takes the most probable code always."""
    top_k: int = 50
    """Codes to draw from, the most probable ones; 0 for all."""
    top_p: float = 1.0
    """Share of the probability to draw from, the most probable codes."""
    seed: int = 0
    """Seed of the drawing, the same at every check."""

    def __post_init__(self) -> None:
        require(self.freq < 1 or bool(self.sentences), "sentences: empty; give some or set freq: 0")
        require(all(text.strip() for text in self.sentences), "sentences: one of them is blank; write what to say")
        require(
            self.context_audio is None or bool(self.context_text.strip()),
            "context_text: empty; write what is said in context_audio",
        )
        require(self.max_sec >= 0.08, f"max_sec: {self.max_sec} is shorter than one frame (0.08 s)")
        Sampling(self.temperature, self.top_k, self.top_p, self.seed)  # checks them


@dataclass
class WandbArgs:
    project: str | None = None
    """Project on Weights & Biases; unset turns it off."""
    run_name: str | None = None
    """Name of the run; default: the name of `run_dir`."""
    offline: bool = False
    """Write the W&B files into `run_dir` only; `wandb sync` uploads them later."""
    key: str | None = field(default=None, repr=False)
    """API key. Better set WANDB_API_KEY or run `wandb login`; never written or logged."""


@dataclass
class TrainArgs:
    data: DataArgs
    """Where the data is and how it is read."""
    run_dir: str
    """Folder of everything the run writes."""
    model: Any
    """The family and its own settings; see the next table."""
    duration_sec: float = 10.0
    """Windows: length of a training window in seconds."""
    batch_size: int = 1
    """Rows per rank and microbatch: windows, conversations, or packs of them."""
    num_microbatches: int = 1
    """Microbatches whose gradients one step sums."""
    max_steps: int = 100
    """Optimiser steps."""
    finetuning: Literal["lora", "full"] = "lora"
    """Train adapters on every linear layer, or all weights."""
    lora: LoraArgs = field(default_factory=LoraArgs)
    """The adapters."""
    train_only: list[str] | None = None
    """Parts of the model to train, with adapters or in full; default: all. Moshi has `temporal`, `depformer` and
    `embeddings`; CSM has `backbone`, `decoder` and `embeddings`."""
    optim: OptimArgs = field(default_factory=OptimArgs)
    """The optimiser and its schedule."""
    max_norm: float = 1.0
    """Largest global norm of the gradients; 0 turns clipping off."""
    seed: int = 0
    """Seed of data order, new weights and dropout."""
    param_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the computation. `auto`: bfloat16 on GPUs that have it, float16 with loss scaling on others,
    float32 on CPUs. What is trained is kept in float32 always."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    """How the model spreads over ranks."""
    log_freq: int = 1
    """Steps between two lines of metrics; sums run over the steps between."""
    do_eval: bool = False
    """Evaluate on `data.eval_data`."""
    eval_freq: int = 0
    """Steps between evaluations; below 1: only after the last step."""
    eval_batches: int | None = None
    """Batches per rank of one evaluation; default: the whole evaluation data."""
    do_ckpt: bool = True
    """Save checkpoints."""
    ckpt_freq: int = 0
    """Steps between checkpoints; below 1: only after the last step."""
    num_ckpt_keep: int | None = 3
    """Newest checkpoints kept, besides the best one; null keeps all."""
    save_best: bool = True
    """Save a checkpoint, and keep it, when an evaluation finds the lowest loss so far."""
    save_adapters: bool = True
    """Under LoRA, save the adapters alone; false merges them into the base weights."""
    generate: GenerateArgs = field(default_factory=GenerateArgs)
    """Spoken samples while training, in `run_dir/samples`."""
    overwrite_run_dir: bool = False
    """Empty a used `run_dir` first; otherwise a used folder is refused."""
    tensorboard: bool = True
    """Write TensorBoard files into `run_dir/tensorboard`."""
    wandb: WandbArgs = field(default_factory=WandbArgs)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} is negative")
        require(bool(self.run_dir), "run_dir: empty; set it to the folder that the run may write")
        require(self.duration_sec > 0, f"duration_sec: {self.duration_sec} is not positive")
        for name in ("batch_size", "num_microbatches", "max_steps", "log_freq"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is below 1")
        require(self.max_norm >= 0, f"max_norm: {self.max_norm} is negative")
        for name in ("num_ckpt_keep", "eval_batches"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is below 1")
        require(
            not self.do_eval or self.data.eval_data is not None,
            "do_eval: true, but data.eval_data is empty; set it or turn do_eval off",
        )


def load(path: str | Path, overrides: dict[str, str], model_args: Any) -> TrainArgs:
    """Read a run's YAML; dotted overrides win over it.

    Args:
        model_args: gives a family's own dataclass by the family's name; raises UserError for an unknown one.

    Raises:
        UserError: anything in the file or the overrides is wrong.
    """
    raw = _read(path, overrides)
    args = decode(TrainArgs, raw)
    args.model = _decode_model(raw["model"], model_args)
    return args


def load_model(path: str | Path, overrides: dict[str, str], model_args: Any) -> tuple[Any, int]:
    """Read nothing but the `model` section and the seed. Arguments and errors are those of `load`."""
    raw = _read(path, overrides)
    seed = decode(_Seed, {"seed": raw["seed"]} if "seed" in raw else {}).seed
    return _decode_model(raw["model"], model_args), seed


@dataclass
class _Seed:
    seed: int = TrainArgs.seed


def _read(path: str | Path, overrides: dict[str, str]) -> dict[str, Any]:
    return from_moshi_finetune(apply_overrides(read_yaml(path), overrides))


def _decode_model(section: dict[str, Any], model_args: Any) -> Any:
    return decode(model_args(section.get("family", "moshi")), section, "model")


def without_secrets(args: TrainArgs) -> dict[str, Any]:
    """The resolved configuration as plain values, fit to be written and shown."""
    raw = encode(args)
    del raw["wandb"]["key"]
    return raw


def save(args: TrainArgs, path: Path) -> None:
    """Write the resolved configuration, without secrets; it can be run again as it is."""
    path.write_text(yaml.safe_dump(without_secrets(args), sort_keys=False, allow_unicode=True))


def from_moshi_finetune(raw: dict[str, Any]) -> dict[str, Any]:
    """Translate the keys that kyutai-labs/moshi-finetune spells otherwise (its `finetune/args.py`)."""
    model = dict(_section(raw, "model", "write `model: {family: moshi}`"))
    moved = dict(_section(raw, "moshi_paths", "write `moshi_paths: {hf_repo_id: …}`"))
    raw.pop("moshi_paths", None)
    for key in ("first_codebook_weight_multiplier", "text_padding_weight"):
        if key in raw:
            moved[key] = raw.pop(key)
    for key, value in moved.items():
        if key in model:
            raise UserError(f"model.{key}: set twice, here and in moshi-finetune's spelling; keep one")
        model[key] = value
    raw["model"] = model
    raw["lora"] = dict(_section(raw, "lora", "write `lora: {rank: 64}`; `finetuning: full` turns it off"))
    spellings = {
        name: _as_bool(section.pop(key), name)
        for name, section, key in (
            ("full_finetuning", raw, "full_finetuning"),
            ("lora.enable", raw["lora"], "enable"),
        )
        if key in section
    }
    if spellings:
        raw["finetuning"] = _one_choice(spellings, raw.get("finetuning"))
    return raw


def _section(raw: dict[str, Any], key: str, remedy: str) -> dict[str, Any]:
    section = raw.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{key}: {section!r} is not a section; {remedy}")
    return section or {}


def _as_bool(value: Any, name: str) -> bool:
    if isinstance(value, CommandLineText):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise UserError(f"{name}: {value!r} is not true or false")
    return value


def _one_choice(spellings: dict[str, bool], finetuning: Any) -> str:
    full = spellings.get("full_finetuning", finetuning == "full")
    lora = spellings.get("lora.enable", not full)
    said = ", ".join(f"{name}: {str(value).lower()}" for name, value in spellings.items())
    if full == lora:
        remedy = "set lora.enable: false" if full else "set one of them to true"
        raise UserError(f"{said}: exactly one of LoRA and full fine-tuning must be on; {remedy}")
    choice = "full" if full else "lora"
    if finetuning not in (None, choice):
        raise UserError(f"finetuning: {finetuning!r} contradicts {said}; keep `finetuning` alone")
    return choice
