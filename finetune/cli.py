"""How the top-level programs start: `program CONFIG [--key=value …]`, through fire."""

import sys
from collections.abc import Callable

import fire

from finetune import distributed
from finetune.errors import UserError


def launch(program: Callable[[str, dict[str, str]], None], usage: str) -> None:
    """Run `program(config, overrides)` inside a process group; a UserError ends it with one line and code 2."""

    # Values stay text: each field's type decides what they mean, and fire's own reading splits at commas.
    @fire.decorators.SetParseFn(str)
    def main(config: str, *unknown: str, **overrides: str) -> None:
        with distributed.one_line_errors(), distributed.process_group():
            distributed.set_up_logging()
            if unknown:  # fire would complain about it after the run
                raise UserError(f"{unknown[0]}: not a key; overrides are written --key=value")
            program(config, overrides)

    if {"--help", "-h"} & set(sys.argv[1:]) or len(sys.argv) == 1:
        print(usage)
        return
    fire.Fire(main)
