"""Merge a saved Moshi adapter into its base: `python scripts/merge_adapter.py CONSOLIDATED --output FOLDER`.

CONSOLIDATED is the folder with `lora.safetensors` and `config.json`. The result loads with `--moshi-weight`, and
training can start from it (`model.path`). moshi merges in float32; the sum is rounded once, to `--dtype`. Main
memory: about 6 bytes per parameter.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file

from finetune.families.moshi import ADAPTER_FILE, MERGED_FILE


def merge(consolidated: Path, output: Path, dtype: torch.dtype) -> None:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consolidated", type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    for name in (ADAPTER_FILE, "config.json"):
        if not (args.consolidated / name).is_file():
            print(
                f"error: {args.consolidated}: no {name} in it; give a checkpoint's consolidated folder", file=sys.stderr
            )
            return 2
    merge(args.consolidated, args.output, getattr(torch, args.dtype))
    print(f"merged into {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
