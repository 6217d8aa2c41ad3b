"""Time one training step of ours against the reference implementation: `python scripts/benchmark.py --size tiny`.

`--family moshi` compares LoRA steps with the plain recipe of the `moshi` package (benchmark_moshi.py), `--family csm`
full steps without the optimizer with transformers' CSM (benchmark_csm.py). All contenders take turns in one process,
so that a machine that slows down slows all.

Before anything is timed losses and gradients are compared. In float32 a difference ends the program with exit code 1;
in bfloat16 it is printed, because the two round in different places.
"""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmark_tools import compare, describe_machine, measure, print_check, print_summary, summarize

FAMILIES = ("moshi", "csm")


def parse_args() -> tuple[argparse.Namespace, Any]:
    """The command line, with what it leaves open filled from the size and the machine, and the family's module."""
    family_option = argparse.ArgumentParser(add_help=False)
    family_option.add_argument("--family", choices=FAMILIES, default="moshi", help="see --family csm --help, too")
    # Each family has packages of its own, of which the other should work without.
    module = importlib.import_module(f"benchmark_{family_option.parse_known_args()[0].family}")

    description, layout = f"{__doc__}\n{module.__doc__}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout, parents=[family_option])
    parser.add_argument("--size", choices=module.SIZES, default="tiny", help="the model")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; one more warms up")
    parser.add_argument("--steps", type=int, help="steps in one round of each; default: by size")
    parser.add_argument("--batch-size", type=int, help="windows in the batch; default: by size")
    parser.add_argument("--duration-sec", type=float, help="length of a window in seconds; default: by size")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where it works")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    module.add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured here")
    args = parser.parse_args()
    size = module.SIZES[args.size]
    args.steps = size.num_steps if args.steps is None else args.steps
    args.batch_size = size.batch_size if args.batch_size is None else args.batch_size
    args.duration_sec = size.duration_sec if args.duration_sec is None else args.duration_sec
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    if min(args.rounds, args.steps, args.batch_size) < 1:
        parser.error("--rounds, --steps and --batch-size must be at least 1")
    if args.size in module.NEEDS_GPU and not on_gpu:
        parser.error(f"--size {args.size} needs a GPU; take small or tiny")
    return args, module


def main() -> int:
    args, module = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, module.compilation(device):
        race = module.prepare(args, Path(folder))
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        result: dict[str, Any] = {**describe_machine(device, module.PACKAGE), **settings, **race.facts}
        print(", ".join(f"{key} {value}" for key, value in result.items()))
        ours, reference = race.contenders[:2]
        result["check"] = compare(ours, reference)
        print_check(result["check"], ours.name, reference.name)
        if args.dtype == "float32" and not result["check"]["equal"]:
            unequal = result["check"]["gradients_unequal"]
            where = f"{len(unequal)} gradients, the first of {unequal[0]}" if unequal else "the losses"
            print(f"error: {ours.name} and {reference.name} differ in {where}; nothing was timed", file=sys.stderr)
            return 1
        measure(race.contenders, args.rounds, args.steps, device)
    result |= summarize(race)
    print_summary(result, race)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
