"""Speak texts with a model: a run's, an exported one, or one from the hub.

    python -m finetune.generate runs/mine --text "Good morning." --output morning.wav

SOURCE is a run's folder (its best checkpoint is taken, or the newest), an adapter's or a model's folder, or a hub
repository. Several `--text` are spoken at once, each into its own file. `--context-audio` gives the voice to speak in.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from finetune import args as configuration
from finetune.data.audio import read_header, read_span
from finetune.data.types import SAMPLE_RATE_HZ, BadRecording, Turn
from finetune.errors import UserError
from finetune.families import args_class, family_class
from finetune.families.base import Family, Line, SpeechChunk
from finetune.json_files import read_json
from finetune.judge import judge
from finetune.lora import merge_into
from finetune.parallel import compute_dtype, materialize, set_param_dtypes
from finetune.sampling import Sampling

# peft's; it names the base.
ADAPTER_CONFIG = "adapter_config.json"
# How `read_json` words what is wrong with an adapter's files.
_OF_ADAPTERS = ("", "save the adapter again")
# Ours, beside it: keys of the `model` section that the base's folder does not know.
NOTES_FILE = "parley.json"


@dataclass(frozen=True)
class Speech:
    """What was said for one line."""

    wav_S: np.ndarray
    """Mono float32 at 24 kHz."""
    ended: bool
    """Whether the model ended by itself; otherwise it was cut off."""


def stream(
    family: Family, model: nn.Module, lines: Sequence[Line], sampling: Sampling, max_sec: float
) -> Iterator[SpeechChunk]:
    """The lines spoken side by side, a frame at a time as they are made."""
    return family.speak(model, lines, sampling, max_sec)


def speak(family: Family, model: nn.Module, lines: Sequence[Line], sampling: Sampling, max_sec: float) -> list[Speech]:
    """All of what `stream` gives, by line."""
    pieces: list[list[np.ndarray]] = [[] for _ in lines]
    ended = [False] * len(lines)
    for chunk in stream(family, model, lines, sampling, max_sec):
        ended = list(chunk.ended)
        for piece, wav_S in zip(pieces, chunk.wavs, strict=True):
            piece.append(wav_S)
    nothing = np.zeros(0, dtype=np.float32)
    return [Speech(np.concatenate([nothing, *piece]), end) for piece, end in zip(pieces, ended, strict=True)]


def read_context(path: Path, text: str, speaker: str) -> Turn:
    """A clip whose voice is to be spoken in, with what is said in it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        wav_CS = read_span(path, 0, read_header(path).num_samples)
    except BadRecording as problem:
        raise UserError(f"generate.context_audio: {path}: {problem}") from problem
    return Turn(text, speaker, wav_CS.mean(0), is_trained=False)


def open_model(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    checkpoint: str | None = None,
    family_name: str = "csm",
) -> tuple[Family, nn.Module]:
    """The family and the model, with adapters merged, of a run, an adapter, a model's folder or a hub repository.

    Args:
        dtype: of the weights; default: what the device computes best in.
        checkpoint: of a run; default: the best one, or the newest.
        family_name: of what is not a run.

    Raises:
        UserError: there is no such thing.
    """
    section, adapter = _describe(Path(source), source, checkpoint, family_name)
    family = family_class(section.family)(section, device)
    model = family.create(torch.device("meta"))
    set_param_dtypes(model, [], family.exact_modules(model), dtype or compute_dtype("auto", device))
    materialize(model, family.weights(), device, seed=0)
    if adapter is not None:
        settings, tensors = family.read_adapter(adapter)
        merge_into(model, tensors, settings.scaling)
    return family, model.eval()


def _describe(path: Path, source: str, checkpoint: str | None, family_name: str) -> tuple[Any, Path | None]:
    """The model section that leads to the weights, and the folder of an adapter to be merged into them."""
    if (path / "args.yaml").exists():
        section = configuration.load(path / "args.yaml", {}, args_class).model
        folder = _consolidated(path, checkpoint)
        if (folder / ADAPTER_CONFIG).exists():
            return section, folder
        return replace(section, path=str(folder), architecture=None), None
    if checkpoint is not None:
        raise UserError(f"--checkpoint: {source} is not a run's folder (no args.yaml in it); leave --checkpoint out")
    if (path / ADAPTER_CONFIG).exists():
        base = base_of(path)
        notes = read_json(path / NOTES_FILE, *_OF_ADAPTERS) if (path / NOTES_FILE).exists() else {}
        said = f"{source}: its base {base} is not there; put it back, or name another in {ADAPTER_CONFIG}"
        return _section(family_name, notes | _location(base, said)), path
    said = f"{source}: neither a folder nor the name of a hub repository; check the path"
    return _section(family_name, _location(source, said)), None


def base_of(adapter: Path) -> str:
    """The folder or the hub repository of an adapter's base.

    Raises:
        UserError: the adapter does not tell.
    """
    base = read_json(adapter / ADAPTER_CONFIG, *_OF_ADAPTERS).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path: {base!r} names no base; write it there")
    return base


def _location(address: str, otherwise: str) -> dict[str, str]:
    """The key of the model section for a folder or a repository."""
    if Path(address).exists():
        return {"path": address}
    try:
        validate_repo_id(address)
    except HFValidationError as error:
        raise UserError(otherwise) from error
    return {"hf_repo_id": address}


def _section(family_name: str, settings: dict[str, Any]) -> Any:
    return configuration.decode(args_class(family_name), settings, "model")


def _consolidated(run_dir: Path, checkpoint: str | None) -> Path:
    """The folder of the checkpoint asked for, else of the best one, else of the newest."""
    checkpoints = run_dir / "checkpoints"
    saved = sorted(checkpoints.glob("checkpoint_*"), key=lambda each: int(each.name.split("_")[1]))
    for chosen in [checkpoints / checkpoint] if checkpoint else [checkpoints / "best", *reversed(saved)]:
        if (chosen / "consolidated").is_dir():
            return chosen / "consolidated"
    if not saved:
        raise UserError(f"{run_dir}: no checkpoint in it; train with do_ckpt: true")
    names = ", ".join(each.name for each in saved)
    raise UserError(f"--checkpoint: {run_dir} has no {checkpoint} with weights; it has {names}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a run, an adapter or a model, or hub repository")
    parser.add_argument("--text", action="append", required=True, help="what to say; give it several times for several")
    parser.add_argument("--output", type=Path, default=Path("speech.wav"), help="a WAV file; several are numbered")
    parser.add_argument("--checkpoint", help="name of a run's checkpoint, such as checkpoint_000100")
    parser.add_argument("--family", default="csm", help="of a model folder or a repository")
    parser.add_argument("--speaker", default="0")
    parser.add_argument("--context-audio", type=Path, help="a clip of the voice to speak in")
    parser.add_argument("--context-text", default="", help="what is said in it")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help="0 is all")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    parser.add_argument("--max-sec", type=float, default=20.0, help="longest speech in seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def _check(args: argparse.Namespace) -> None:
    if not all(text.strip() for text in args.text):
        raise UserError("--text: one of them is blank; write what to say")
    if bool(args.context_audio) != bool(args.context_text.strip()):
        raise UserError(
            "--context-audio and --context-text: one without the other; give the clip and what is said in it"
        )
    if not 0 < args.max_sec < math.inf:
        raise UserError(f"--max-sec: {args.max_sec} is not a number of seconds above 0")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown device and for an absent one
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {args.device}: no device of this machine ({reason}); give cpu or cuda") from error


def _outputs(output: Path, count: int) -> list[Path]:
    """A WAV file for each text."""
    if output.suffix.lower() != ".wav":
        raise UserError(f"--output: {output} does not end in .wav; only WAV files are written")
    refuse_files(output.parent)
    outputs = [output] if count == 1 else [output.with_stem(f"{output.stem}_{n}") for n in range(1, count + 1)]
    for path in (output, *outputs):
        if path.is_dir():
            raise UserError(f"--output: {path} is a folder; give a file")
    return outputs


def refuse_files(folder: Path) -> None:
    """Raise UserError unless this is a folder or can be made one."""
    for path in (folder, *folder.parents):
        if path.exists():
            if path.is_dir():
                return
            raise UserError(f"--output: {path} is a file; give a folder")


def run(args: argparse.Namespace) -> None:
    """Speak what the command line says, and tell what came of it."""
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error
    _check(args)
    outputs = _outputs(args.output, len(args.text))
    context = [read_context(args.context_audio, args.context_text, args.speaker)] if args.context_audio else []
    device = torch.device(args.device)
    family, model = open_model(args.source, device=device, checkpoint=args.checkpoint, family_name=args.family)
    if not family.can_speak:
        raise UserError(f"{args.source}: its family does not speak texts; use moshi.run_inference")
    if (Path(args.source) / "args.yaml").exists():
        print(f"checkpoint: {_consolidated(Path(args.source), args.checkpoint).resolve().parent.name}")
    lines = [Line(text, args.speaker, context) for text in args.text]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for output, speech in zip(outputs, speak(family, model, lines, sampling, args.max_sec), strict=True):
        sphn.write_wav(str(output), speech.wav_S, SAMPLE_RATE_HZ)
        figures = judge(speech.wav_S, speech.ended)
        how = "ended by itself" if speech.ended else "cut off"
        print(f"{output}: {figures['length_sec']:.2f} s, {figures['silent_share']:.0%} silent, {how}")


def main() -> int:
    try:
        run(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
