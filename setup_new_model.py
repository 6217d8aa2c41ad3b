"""Write the untrained model that a YAML describes: `torchrun --nproc-per-node 1 -m setup_new_model CONFIG`."""

import fire

from finetune import args as configuration
from finetune import distributed
from finetune.errors import UserError
from finetune.families import args_class, family_class


@fire.decorators.SetParseFn(str)
def main(config: str, **overrides: str) -> None:
    """Make the model of the YAML's `model` section in `model.path`.

    Args:
        config: path of the YAML file.
        overrides: any key of it, dotted: --model.path=models/mine
    """
    with distributed.process_group(), distributed.one_line_errors():
        distributed.set_up_logging()
        args = configuration.load(config, overrides, args_class)
        if not distributed.is_main():
            return
        made = family_class(args.model.family).prepare(args.model, args.seed)
        if made is None:
            raise UserError(f"{config}: describes no new model, or it is there; see model.path, model.architecture")
        print(f"made an untrained model in {made}")


if __name__ == "__main__":
    fire.Fire(main)
