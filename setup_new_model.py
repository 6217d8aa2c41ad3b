"""Write the untrained model that a YAML describes.

    torchrun --nproc-per-node 1 -m setup_new_model CONFIG [--model.path=models/mine …]

CONFIG is a run's YAML, or one with a `model` section alone. The model goes into `model.path`.
"""

from finetune import args as configuration
from finetune import distributed
from finetune.cli import launch
from finetune.errors import UserError
from finetune.families import args_class, family_class


def setup(config: str, overrides: dict[str, str]) -> None:
    """Make the model of the `model` section."""
    model, seed = configuration.load_model(config, overrides, args_class)
    if getattr(model, "architecture", None) is None:
        raise UserError(f"{config}: describes no new model; set model.architecture and model.path")
    made = distributed.on_main_rank(family_class(model.family).prepare, model, seed)
    if distributed.is_main():
        print(f"made an untrained model in {made}" if made else f"{model.path} holds this model already")


if __name__ == "__main__":
    launch(setup, str(__doc__))
