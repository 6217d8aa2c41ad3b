"""The registry of model families. Strings are imported on use, so that optional packages stay optional."""

from importlib import import_module
from typing import Any

from finetune.errors import UserError
from finetune.families.base import Family

FAMILIES = {
    "moshi": "finetune.families.moshi:MoshiFamily",
    "csm": "finetune.families.csm.family:CsmFamily",
}


def family_class(name: str) -> type[Family]:
    """Import a family by name.

    Raises:
        UserError: there is no such family.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model.family: {name!r} is not one of {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)


def args_class(name: str) -> Any:
    """The dataclass of a family's `model` section."""
    return family_class(name).Args
