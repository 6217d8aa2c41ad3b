"""Time one LoRA training step of ours against the plain recipe: `python scripts/benchmark.py --size tiny`.

The plain recipe (plain_recipe.py) is what the `moshi` package alone gives. Both train adapters with the same initial
values, over the same frozen weights (in the same memory) and on the same random codes. They take turns, so that a
machine that slows down slows both.

Before anything is timed the losses and the adapters' gradients are compared. In float32 a difference ends the
program with exit code 1; in bfloat16 it is printed, because the two round in different places. There the plain
recipe keeps its adapters in bfloat16, which costs it less time than the float32 masters of moshi-finetune.

Shape legend: B batch, K streams (row 0 text, then audio), T frames, V vocabulary.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.utils.compile import no_compile
from safetensors.torch import save_file
from torch import nn

import plain_recipe
from finetune.args import LoraArgs, OptimArgs
from finetune.data.types import SAMPLE_RATE_HZ, Batch
from finetune.families.moshi import MoshiArgs, MoshiFamily, write_untrained
from finetune.lora import adapted_layers, adapter_parameters, add_adapters, initial_adapter_weight
from finetune.loss import denominators, local_loss
from finetune.optim import BETAS, EPS, build_optimizer, clip_gradients
from finetune.parallel import prepare_blocks, set_param_dtypes
from moshi_overrides.training_lm import TrainingLM

QUICKSTART = Path(__file__).parent.parent / "example" / "quickstart"
OPTIM = OptimArgs()
FIRST_CODEBOOK_WEIGHT, TEXT_PADDING_WEIGHT = 100.0, 0.5
# About what https://arxiv.org/abs/2410.00037 (section 3.4.4) gives for English conversations.
PADDING_SHARE = 0.65
LOSS_TOLERANCE, GRADIENT_RTOL, GRADIENT_ATOL = 1e-5, 1e-3, 1e-5


@dataclass(frozen=True)
class Size:
    """A model and the batch it is measured on. `architecture` is laid over Moshi 7B's."""

    architecture: dict[str, Any]
    rank: int
    batch_size: int
    duration_sec: float
    num_steps: int


def layers(*sizes: int) -> dict[str, int]:
    """The part of an architecture that makes it large or small."""
    depth = ("depformer_dim", "depformer_dim_feedforward", "depformer_num_heads", "depformer_num_layers")
    return dict(zip(("dim", "num_heads", "num_layers", "context", *depth), sizes, strict=True))


SIZES = {
    # The model of example/quickstart.yaml.
    "tiny": Size(layers(192, 4, 4, 250, 96, 384, 4, 2), rank=16, batch_size=4, duration_sec=10.0, num_steps=3),
    "small": Size(layers(512, 8, 8, 500, 256, 1024, 8, 4), rank=32, batch_size=4, duration_sec=20.0, num_steps=2),
    "moshi_7b": Size({}, rank=128, batch_size=8, duration_sec=100.0, num_steps=3),
}


@dataclass
class Contender:
    """One way to train: its loss on the fixed batch, and what its step does after the backward pass."""

    name: str
    adapters: dict[str, nn.Parameter]
    """By names that both contenders share."""
    loss: Callable[[], torch.Tensor]
    clip: Callable[[], Any]
    optimizer: torch.optim.Optimizer
    step_sec: list[list[float]] = field(default_factory=list)
    """Seconds of every step, by round."""
    peak_bytes: int = 0

    def step(self) -> None:
        self.loss().backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def resident_bytes(self) -> int:
        """What it holds between two steps beside the shared weights: adapters and AdamW's moments."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.adapters.values(), *states] if tensor.is_cuda)


def write_model(size_name: str, folder: Path) -> tuple[MoshiFamily, dict[str, Any], Path | None]:
    """Write a model folder and open it; the family, LMModel's arguments, and the weights' file if there is one."""
    weights_path: Path | None = None
    if size_name == "moshi_7b":
        write_files_of_7b(folder)
    else:
        sources = MoshiArgs(
            mimi_path=str(QUICKSTART / "tiny_mimi.safetensors"),
            mimi_config_path=str(QUICKSTART / "tiny_mimi_config.json"),
            tokenizer_path=str(QUICKSTART / "tokenizer.model"),
        )
        write_untrained(sources, SIZES[size_name].architecture, folder, seed=0)
        weights_path = folder / loaders.MOSHI_NAME
    args = MoshiArgs(
        hf_repo_id=None,
        path=str(folder),
        first_codebook_weight_multiplier=FIRST_CODEBOOK_WEIGHT,
        text_padding_weight=TEXT_PADDING_WEIGHT,
    )
    config = json.loads((folder / "config.json").read_text())
    lm_kwargs = {key: value for key, value in config.items() if not key.endswith("_name")}
    return MoshiFamily(args, torch.device("cpu")), lm_kwargs, weights_path


def write_files_of_7b(folder: Path) -> None:
    """All that opening Moshi 7B asks for but its weights: the codec is a small random one that nothing encodes with."""
    folder.mkdir()
    mimi_config = json.loads((QUICKSTART / "tiny_mimi_config.json").read_text())
    mimi_config["quantizer"]["bins"] = loaders._lm_kwargs["card"]
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config))
    save_file(loaders.get_mimi(None, mimi_config).state_dict(), folder / "mimi.safetensors")
    shutil.copyfile(QUICKSTART / "tokenizer.model", folder / "tokenizer.model")
    (folder / loaders.MOSHI_NAME).touch()
    names = {
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
    }
    (folder / "config.json").write_text(json.dumps({**loaders._lm_kwargs, **names}))


def build_models(
    family: MoshiFamily,
    lm_kwargs: dict[str, Any],
    weights_path: Path | None,
    args: argparse.Namespace,
) -> tuple[TrainingLM, LMModel]:
    """Ours and moshi's, over the same frozen weights, with adapters of the same values."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    plain = plain_recipe.load(weights_path, lm_kwargs, device, dtype)
    ours = family.create(torch.device("meta"))
    ours.load_state_dict(plain.state_dict(), assign=True)
    lora = LoraArgs(rank=SIZES[args.size].rank)
    add_adapters(ours, lora)
    set_param_dtypes(ours, adapter_parameters(ours), family.exact_modules(ours), dtype)
    prepare_blocks(family.blocks(ours), compile=False, recompute=args.recompute)

    plain_recipe.add_adapters(plain, lora.rank, lora.scaling)
    for name, layer in adapted_layers(ours).items():
        twin = plain.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            weight = getattr(layer, half).weight
            value = initial_adapter_weight(f"{name}.{half}.weight", weight.shape, seed=0)
            if half == "lora_B":  # zeros, with which no gradient would reach lora_A
                value.normal_(std=0.02)
            weight.data.copy_(value.to(dtype))
            getattr(twin, half).weight.data.copy_(value)
    return ours.train(), plain.train()


def random_batch(family: MoshiFamily, lm_kwargs: dict[str, Any], batch_size: int, duration_sec: float) -> Batch:
    """Full windows of random codes, with the loss weights that training gives them."""
    num_frames = round(duration_sec * SAMPLE_RATE_HZ / family.frame_size)
    text_B1T = torch.randint(lm_kwargs["text_card"], (batch_size, 1, num_frames))
    text_B1T[torch.rand(text_B1T.shape) < PADDING_SHARE] = lm_kwargs["existing_text_padding_id"]
    audio_BKT = torch.randint(lm_kwargs["card"], (batch_size, lm_kwargs["n_q"], num_frames))
    codes_BKT = torch.cat([text_B1T, audio_BKT], 1)
    weight_BKT = torch.stack([family._loss_weights(codes_KT, evaluation=False) for codes_KT in codes_BKT])
    segment_BT = torch.zeros(batch_size, num_frames, dtype=torch.int64)
    return Batch(codes_BKT, weight_BKT, segment_BT, audio_sec=batch_size * duration_sec)


def build_ours(model: TrainingLM, family: MoshiFamily, batch: Batch, device: torch.device) -> Contender:
    """The step of train.py, for one microbatch on one rank."""
    parameters = adapter_parameters(model)

    def loss() -> torch.Tensor:
        term_denominators = denominators([batch], family.terms)
        loss_weight_BKT = batch.loss_weight_BKT.to(device, non_blocking=True)
        nll_BKT = family.nll(model, batch)
        return local_loss(nll_BKT, loss_weight_BKT, family.terms, term_denominators)

    return Contender(
        name="ours",
        adapters={name: p for name, p in model.named_parameters() if p.requires_grad},
        loss=loss,
        clip=lambda: clip_gradients(parameters, max_norm=1.0),
        optimizer=build_optimizer([{"params": parameters}], OPTIM),
    )


def build_plain(model: LMModel, batch: Batch, device: torch.device) -> Contender:
    """The same step, out of moshi's and torch's own parts."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Contender(
        name="plain",
        adapters=adapters,
        loss=lambda: plain_recipe.loss(model, batch.codes_BKT.to(device), FIRST_CODEBOOK_WEIGHT, TEXT_PADDING_WEIGHT),
        clip=lambda: nn.utils.clip_grad_norm_(adapters.values(), 1.0),
        optimizer=torch.optim.AdamW(
            adapters.values(), lr=OPTIM.lr, betas=BETAS, eps=EPS, weight_decay=OPTIM.weight_decay
        ),
    )


def compare(ours: Contender, plain: Contender) -> dict[str, Any]:
    """Losses and adapter gradients of both on the same values, and whether they are equal."""
    assert ours.adapters.keys() == plain.adapters.keys()
    losses = []
    for contender in (ours, plain):
        loss = contender.loss()
        loss.backward()
        losses.append(loss.item())
    largest_error, largest_gradient, unequal = 0.0, 0.0, []
    squared_error, squared_norm = 0.0, 0.0
    for name, parameter in ours.adapters.items():
        reference = plain.adapters[name]
        got, want = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, reference))
        got, want = got.float(), want.float()
        if not torch.allclose(got, want, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL):
            unequal.append(name)
        error = got - want
        largest_error = max(largest_error, error.abs().max().item())
        largest_gradient = max(largest_gradient, want.abs().max().item())
        squared_error += error.square().sum().item()
        squared_norm += want.square().sum().item()
    for contender in (ours, plain):
        contender.optimizer.zero_grad()
    loss_error = abs(losses[0] - losses[1])
    return {
        "loss_ours": losses[0],
        "loss_plain": losses[1],
        "gradients_compared": len(ours.adapters),
        "gradients_unequal": unequal,
        "gradient_largest": largest_gradient,
        "gradient_largest_error": largest_error,
        "gradient_relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm > 0 else float("nan"),
        "equal": loss_error <= LOSS_TOLERANCE * max(1.0, abs(losses[1])) and squared_norm > 0 and not unequal,
    }


def measure(contenders: list[Contender], num_rounds: int, num_steps: int, device: torch.device) -> None:
    """Let the contenders take turns; the first round warms up and is not counted."""
    for round_number in range(1 + num_rounds):
        for contender in contenders:
            others_bytes = sum(other.resident_bytes() for other in contenders if other is not contender)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = [time_step(contender, device) for _ in range(num_steps)]
            if round_number == 0:
                continue
            contender.step_sec.append(seconds)
            if device.type == "cuda":
                peak_bytes = torch.cuda.max_memory_allocated(device) - others_bytes
                contender.peak_bytes = max(contender.peak_bytes, peak_bytes)


def time_step(contender: Contender, device: torch.device) -> float:
    """Seconds of one step, until the device has finished it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    synchronize(device)
    start_sec = time.perf_counter()
    contender.step()
    synchronize(device)
    return time.perf_counter() - start_sec


def describe_machine(device: torch.device) -> dict[str, str]:
    """Where and with what this was measured."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.partition(":")[2].strip() for line in cpu_info.open() if line.startswith("model name")]
        processor = next(iter(names), processor)
    machine = f"{processor}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moshi": version("moshi"),
    }


def summarize(contenders: list[Contender], batch: Batch) -> dict[str, Any]:
    """Medians, rates and the ratio plain / ours, over all rounds and by round."""
    num_frames = batch.codes_BKT.shape[0] * batch.codes_BKT.shape[2]
    summary: dict[str, Any] = {}
    for contender in contenders:
        median_sec = statistics.median(second for seconds in contender.step_sec for second in seconds)
        summary[contender.name] = {
            "median_step_sec": median_sec,
            "frames_per_sec": num_frames / median_sec,
            "audio_sec_per_sec": batch.audio_sec / median_sec,
            "peak_gib": contender.peak_bytes / 2**30 or None,
            "step_sec": contender.step_sec,
        }
    summary["ratio"] = summary["plain"]["median_step_sec"] / summary["ours"]["median_step_sec"]
    summary["ratio_by_round"] = [
        statistics.median(plain) / statistics.median(ours)
        for ours, plain in zip(summary["ours"]["step_sec"], summary["plain"]["step_sec"], strict=True)
    ]
    return summary


def print_check(check: dict[str, Any]) -> None:
    print(f"loss: ours {check['loss_ours']:.6f}, plain {check['loss_plain']:.6f}")
    print(f"gradients of {check['gradients_compared']} adapter weights: ", end="")
    print(f"relative difference {check['gradient_relative_error']:.1e}, ", end="")
    print(f"largest {check['gradient_largest_error']:.1e} (largest gradient {check['gradient_largest']:.1e})")


def print_summary(summary: dict[str, Any]) -> None:
    print(f"\n{'':8}{'s/step':>10}{'frames/s':>12}{'audio s/s':>12}{'peak GiB':>10}")
    for name in ("ours", "plain"):
        row = summary[name]
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"
        rates = f"{row['frames_per_sec']:>12.0f}{row['audio_sec_per_sec']:>12.1f}"
        print(f"{name:8}{row['median_step_sec']:>10.4f}{rates}{peak:>10}")
    by_round = summary["ratio_by_round"]
    print(f"plain / ours: {summary['ratio']:.2f} (by round: {min(by_round):.2f} to {max(by_round):.2f})")


def parse_args() -> argparse.Namespace:
    """The command line, with what it leaves open filled from the size and the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument("--steps", type=int, help="steps in one round of each; default: by size")
    parser.add_argument("--batch-size", type=int, help="windows in the batch; default: by size")
    parser.add_argument("--duration-sec", type=float, help="length of a window in seconds; default: by size")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where it works")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    recompute_help = "our activation checkpointing; the plain recipe keeps its own"
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help=recompute_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured here")
    args = parser.parse_args()
    size = SIZES[args.size]
    args.steps = size.num_steps if args.steps is None else args.steps
    args.batch_size = size.batch_size if args.batch_size is None else args.batch_size
    args.duration_sec = size.duration_sec if args.duration_sec is None else args.duration_sec
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    if min(args.rounds, args.steps, args.batch_size) < 1:
        parser.error("--rounds, --steps and --batch-size must be at least 1")
    if args.size == "moshi_7b" and not on_gpu:
        parser.error("--size moshi_7b needs a GPU; take small or tiny")
    return args


def compilation(device: torch.device) -> AbstractContextManager[None]:
    """moshi compiles norms and rotations on first use; on a CPU its layers decline that, and here so does the rest."""
    return nullcontext() if device.type == "cuda" else no_compile()


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, compilation(device):
        family, lm_kwargs, weights_path = write_model(args.size, Path(folder) / "model")
        ours_model, plain_model = build_models(family, lm_kwargs, weights_path, args)
        batch = random_batch(family, lm_kwargs, args.batch_size, args.duration_sec)
        ours, plain = build_ours(ours_model, family, batch, device), build_plain(plain_model, batch, device)
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        result: dict[str, Any] = {**describe_machine(device), **settings, "rank": SIZES[args.size].rank}
        print(", ".join(f"{key} {value}" for key, value in result.items()))
        result["check"] = compare(ours, plain)
        print_check(result["check"])
        if args.dtype == "float32" and not result["check"]["equal"]:
            unequal = result["check"]["gradients_unequal"]
            where = f"{len(unequal)} gradients, the first of {unequal[0]}" if unequal else "the losses"
            print(f"error: ours and plain differ in {where}; nothing was timed", file=sys.stderr)
            return 1
        measure([ours, plain], args.rounds, args.steps, device)
    result |= summarize([ours, plain], batch)
    print_summary(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
