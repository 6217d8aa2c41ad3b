"""What the benchmarks of all families share: contenders that take turns, their comparison, and what is printed.

Not a program of its own.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

LOSS_TOLERANCE, GRADIENT_RTOL, GRADIENT_ATOL = 1e-5, 1e-3, 1e-5


@dataclass(frozen=True)
class Load:
    """What one step works on, and how many steps make a round."""

    batch_size: int
    duration_sec: float
    num_steps: int


@dataclass
class Contender:
    """One way to train: its loss on the fixed batch, and what its step does after the backward pass."""

    name: str
    weights: dict[str, nn.Parameter]
    """What it trains, by names that all contenders share."""
    loss: Callable[[], torch.Tensor]
    """The loss, or its parts in one dimension."""
    clip: Callable[[], Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    """None: the weights stay as they are, and several contenders may hold the same memory."""
    step_sec: list[list[float]] = field(default_factory=list)
    """Seconds of every step, by round."""
    peak_bytes: int = 0

    def step(self) -> None:
        self.loss().sum().backward()
        if self.clip is not None:
            self.clip()
        if self.optimizer is not None:
            self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def resident_bytes(self) -> int:
        """What it holds between two steps beside shared weights: those that its optimizer steps, and the moments."""
        if self.optimizer is None:
            return 0
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.weights.values(), *states] if tensor.is_cuda)


@dataclass
class Race:
    """Contenders on one batch. The first is ours, the second must compute the same."""

    contenders: list[Contender]
    ratios: dict[str, tuple[str, str]]
    """Under each key two contenders: the step of the first in units of the second's."""
    num_frames: int
    audio_sec: float
    facts: dict[str, Any]
    """What else should stand beside the figures."""


def compare(ours: Contender, reference: Contender) -> dict[str, Any]:
    """Losses and gradients of both on the same values, and whether they are equal."""
    assert ours.weights.keys() == reference.weights.keys()
    losses = []
    for contender in (ours, reference):
        loss = contender.loss()
        loss.sum().backward()
        losses.append(loss.flatten().tolist())
    largest_error, largest_gradient, unequal = 0.0, 0.0, []
    squared_error, squared_norm = 0.0, 0.0
    for name, weight in ours.weights.items():
        twin = reference.weights[name]
        got, want = (torch.zeros_like(w) if w.grad is None else w.grad for w in (weight, twin))
        got, want = got.float(), want.float()
        if not torch.allclose(got, want, rtol=GRADIENT_RTOL, atol=GRADIENT_ATOL * want.abs().max().item()):
            unequal.append(name)
        error = got - want
        largest_error = max(largest_error, error.abs().max().item())
        largest_gradient = max(largest_gradient, want.abs().max().item())
        squared_error += error.square().sum().item()
        squared_norm += want.square().sum().item()
    for contender in (ours, reference):
        contender.drop_gradients()
    equal_losses = all(abs(a - b) <= LOSS_TOLERANCE * max(1.0, abs(b)) for a, b in zip(*losses, strict=True))
    return {
        f"loss_{ours.name}": sum(losses[0]),
        f"loss_{reference.name}": sum(losses[1]),
        f"loss_parts_{ours.name}": losses[0],
        f"loss_parts_{reference.name}": losses[1],
        "gradients_compared": len(ours.weights),
        "gradients_unequal": unequal,
        "gradient_largest": largest_gradient,
        "gradient_largest_error": largest_error,
        "gradient_relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm > 0 else float("nan"),
        "equal": equal_losses and squared_norm > 0 and not unequal,
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


def describe_machine(device: torch.device, package: str) -> dict[str, str]:
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
        package: version(package),
    }


def summarize(race: Race) -> dict[str, Any]:
    """Medians, rates and ratios, over all rounds and by round."""
    summary: dict[str, Any] = {}
    for contender in race.contenders:
        median_sec = statistics.median(second for seconds in contender.step_sec for second in seconds)
        summary[contender.name] = {
            "median_step_sec": median_sec,
            "frames_per_sec": race.num_frames / median_sec,
            "audio_sec_per_sec": race.audio_sec / median_sec,
            "peak_gib": contender.peak_bytes / 2**30 or None,
            "step_sec": contender.step_sec,
        }
    for key, (slow, fast) in race.ratios.items():
        by_round = ratio_by_round(summary[slow]["step_sec"], summary[fast]["step_sec"])
        summary |= {key: statistics.median(by_round), f"{key}_by_round": by_round}
    return summary


def ratio_by_round(slow_sec: list[list[float]], fast_sec: list[list[float]]) -> list[float]:
    """How much longer the first takes, in each round."""
    return [statistics.median(slow) / statistics.median(fast) for slow, fast in zip(slow_sec, fast_sec, strict=True)]


def print_check(check: dict[str, Any], ours: str, reference: str) -> None:
    parts = check[f"loss_parts_{ours}"], check[f"loss_parts_{reference}"]
    first, second = (" + ".join(f"{part:.6f}" for part in values) for values in parts)
    print(f"loss: {ours} {first}, {reference} {second}")
    print(f"gradients of {check['gradients_compared']} weights: ", end="")
    print(f"relative difference {check['gradient_relative_error']:.1e}, ", end="")
    print(f"largest {check['gradient_largest_error']:.1e} (largest gradient {check['gradient_largest']:.1e})")


def print_summary(summary: dict[str, Any], race: Race) -> None:
    width = 2 + max(len(contender.name) for contender in race.contenders)
    print(f"\n{'':{width}}{'s/step':>10}{'frames/s':>12}{'audio s/s':>12}{'peak GiB':>10}")
    for contender in race.contenders:
        row = summary[contender.name]
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"
        rates = f"{row['frames_per_sec']:>12.0f}{row['audio_sec_per_sec']:>12.1f}"
        print(f"{contender.name:{width}}{row['median_step_sec']:>10.4f}{rates}{peak:>10}")
    for key, (slow, fast) in race.ratios.items():
        by_round = summary[f"{key}_by_round"]
        print(f"{slow} / {fast}: {summary[key]:.2f} (by round: {min(by_round):.2f} to {max(by_round):.2f})")
