"""Merge a saved adapter into its base: `python scripts/merge_adapter.py CONSOLIDATED --output FOLDER`.

CONSOLIDATED is the folder that a run wrote: Moshi's with `lora.safetensors` and `config.json`, or CSM's with
`adapter_config.json`. The result loads where a whole model does, and training can start from it (`model.path`). Sums
are made in float32 and rounded once, to `--dtype`. Main memory: about 6 bytes per parameter.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file

from finetune.errors import UserError
from finetune.families.moshi import ADAPTER_FILE, MERGED_FILE
from finetune.generate import ADAPTER_CONFIG, base_of, open_model, refuse_files


def merge_csm(consolidated: Path, output: Path, dtype: torch.dtype) -> None:
    """Write a model's folder in transformers' layout."""
    family, model = open_model(str(consolidated), device=torch.device("cpu"), dtype=torch.float32)
    output.mkdir(parents=True, exist_ok=True)
    family.export(output, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, None)


def merge_moshi(consolidated: Path, output: Path, dtype: torch.dtype) -> None:
    """Write `output/consolidated.safetensors` and its config.json."""
    config = json.loads((consolidated / "config.json").read_text())
    info = CheckpointInfo.from_hf_repo(
        "", config_path=consolidated / "config.json", lora_weights=consolidated / ADAPTER_FILE
    )
    model = info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=True)
    output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, output / MERGED_FILE)
    for key in ("lora_rank", "lora_scaling"):
        config.pop(key, None)
    merged = config | {"lora": False, "moshi_name": MERGED_FILE}
    (output / "config.json").write_text(json.dumps(merged, indent=2))


def _check_output(consolidated: Path, output: Path) -> None:
    refuse_files(output)
    is_csm = (consolidated / ADAPTER_CONFIG).is_file()
    config = {} if is_csm else json.loads((consolidated / "config.json").read_text())
    base = Path(base_of(consolidated) if is_csm else config.get("moshi_name", consolidated))
    for name, folder in (("adapter", consolidated), ("base", base.parent if base.is_file() else base)):
        if output.exists() and folder.exists() and output.samefile(folder):
            raise UserError(f"--output: {output} is the {name}'s own folder; give another one")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consolidated", type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    merges = {ADAPTER_CONFIG: merge_csm, ADAPTER_FILE: merge_moshi}
    merge = next((merge for name, merge in merges.items() if (args.consolidated / name).is_file()), None)
    if merge is None or (merge is merge_moshi and not (args.consolidated / "config.json").is_file()):
        said = f"{args.consolidated}: no adapter in it"
        print(f"error: {said}; give the consolidated folder of a LoRA run's checkpoint", file=sys.stderr)
        return 2
    try:
        _check_output(args.consolidated, args.output)
        merge(args.consolidated, args.output, getattr(torch, args.dtype))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"merged into {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
