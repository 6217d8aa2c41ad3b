"""Convert a CSM between layouts: `python scripts/convert_csm.py SOURCE --to LAYOUT --output FOLDER`.

  transformers  `CsmForConditionalGeneration` and `AutoProcessor`: with codec, tokenizer and generation settings
  sesame        SesameAILabs/csm, csm-streaming, csm-mlx
  csm_hf        thomasgauthier/csm-hf

SOURCE is a folder, a weights file with its config.json beside it, or a hub repository. Its layout is recognised.
Values are moved, never computed with, unless --dtype asks for another type. Main memory: the size of the weights.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.families.csm.export import write_csm_hf, write_sesame, write_transformers
from finetune.families.csm.files import (
    CsmFiles,
    find_checkpoint,
    find_files,
    find_tokenizer,
    load_mimi,
    read_state,
    settle,
)
from finetune.families.csm.text import BOS_TOKEN, EOS_TOKEN, TEXT_TEMPLATE, TurnTokenizer, check_template
from finetune.generate import refuse_files

# What the messages of the library call these options.
_OPTIONS = {
    "model.mimi_config_path": "--mimi-config",
    "model.mimi_path": "--mimi",
    "model.tokenizer_path": "--tokenizer",
    "model.bos_token": "--bos-token",
    "model.eos_token": "--eos-token",
    "model.hf_repo_id": "SOURCE",
    "model.path": "SOURCE",
}


@dataclass
class Source:
    """The command line, as the library asks where files are."""

    hf_repo_id: str | None
    path: str | None
    mimi_path: str | None = None
    mimi_config_path: str | None = None
    tokenizer_path: str | None = None
    text_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None


def convert(source: Source, layout: str, output: Path, dtype: torch.dtype | None) -> None:
    """Write the model of `source` into the folder `output`.

    Args:
        dtype: of the weights there; None keeps that of the source. The codec is float32 always.

    Raises:
        UserError: a file or an option is missing or wrong.
    """
    _check_options(source, output)
    checkpoint = find_files(source) if layout == "transformers" else find_checkpoint(source)
    settings = settle(source, checkpoint.place)
    tokenizer_path = (
        checkpoint.tokenizer_path if isinstance(checkpoint, CsmFiles) else find_tokenizer(source, checkpoint.place)
    )
    if tokenizer_path is not None:
        TurnTokenizer.of(tokenizer_path, settings)  # checks the tokens
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in read_state(checkpoint).items()}
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, CsmFiles):
        mimi = load_mimi(checkpoint, checkpoint.config.num_codebooks, torch.device("cpu"))
        write_transformers(output, state, checkpoint.config, mimi, checkpoint)
        return
    write = write_sesame if layout == "sesame" else write_csm_hf
    write(output, state, checkpoint.config, tokenizer_path, settings)


def _check_options(source: Source, output: Path) -> None:
    refuse_files(output)
    if source.path is not None and output.exists():
        path = Path(source.path)
        if output.samefile(path.parent if path.is_file() else path):
            raise UserError(f"--output: {output} is the source itself; give another folder")
    if source.text_template is not None:
        try:
            check_template(source.text_template)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, weights file or hub repository, such as sesame/csm-1b")
    parser.add_argument("--to", choices=["transformers", "sesame", "csm_hf"], required=True, help="layout to write")
    parser.add_argument("--output", type=Path, required=True, help="folder of the converted model")
    parser.add_argument(
        "--mimi", metavar="FILE", help="codec in moshi's layout; default: the source's, or Kyutai's from the hub"
    )
    parser.add_argument("--mimi-config", metavar="JSON", help="its architecture; default: Kyutai's Mimi")
    parser.add_argument(
        "--tokenizer", metavar="JSON", help="tokenizer.json or its folder; default: the source's, or Llama 3's"
    )
    parser.add_argument(
        "--dtype", choices=["keep", "float32", "bfloat16"], default="keep", help="type of the weights (default: keep)"
    )
    own = "default: the source's own, or"
    parser.add_argument("--text-template", help=f"how turns are written ({own} {TEXT_TEMPLATE})")
    parser.add_argument("--bos-token", help=f"token before a turn's text ({own} {BOS_TOKEN})")
    parser.add_argument("--eos-token", help=f"token behind a turn's text ({own} {EOS_TOKEN})")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    is_local = Path(args.source).exists()
    source = Source(
        hf_repo_id=None if is_local else args.source,
        path=args.source if is_local else None,
        mimi_path=args.mimi,
        mimi_config_path=args.mimi_config,
        tokenizer_path=args.tokenizer,
        text_template=args.text_template,
        bos_token=args.bos_token,
        eos_token=args.eos_token,
    )
    try:
        convert(source, args.to, args.output, None if args.dtype == "keep" else getattr(torch, args.dtype))
    except UserError as error:
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(key, option)
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
