"""JSON objects in files, and one line for what is none."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError


def read_json(path: Path, where: str = "model: ", remedy: str = "mend it or download it again") -> dict[str, Any]:
    """A JSON object's file.

    Args:
        where: what the message begins with, in front of the path.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}{path}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}{path}: holds no JSON object; {remedy}")
    return value
