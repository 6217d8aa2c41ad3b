"""Print every configuration key as Markdown, from the dataclasses: `python scripts/config_table.py`."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from simple_parsing.docstring import get_attribute_docstring

from finetune.args import TrainArgs
from finetune.families import FAMILIES, args_class

BEGIN = "<!-- config table: begin -->"
END = "<!-- config table: end -->"
HEAD = "| key | default | meaning |\n| --- | --- | --- |\n"


def config_tables() -> str:
    """One table of the keys that all families share, then one of the `model` section of each family."""
    parts = [HEAD + "".join(rows(TrainArgs))]
    for name in FAMILIES:
        parts.append(f"With `model.family: {name}`:\n\n{HEAD}{''.join(rows(args_class(name), 'model.'))}")
    return "\n".join(parts)


def rows(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """The table rows of a dataclass, those of its sections below them."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        is_section = is_dataclass(hint) or hint is Any
        default = "section" if is_section else default_of(field)
        yield row(prefix + field.name, default, meaning_of(cls, field.name, hint))
        if is_dataclass(hint):
            yield from rows(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def row(key: str, default: str, meaning: str) -> str:
    """One line of Markdown; bars inside a cell would end it."""
    cells = (cell.replace("|", r"\|") for cell in (f"`{key}`", default, meaning))
    return f"| {' | '.join(cells)} |\n"


def default_of(field: Field[Any]) -> str:
    """A field's default as it would be written in YAML."""
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}`"


def meaning_of(cls: type[Any], name: str, hint: Any) -> str:
    """A field's docstring on one line, and the choices where there are some.

    Raises:
        SystemExit: the field has no docstring.
    """
    meaning = " ".join(get_attribute_docstring(cls, name).docstring_below.split())
    if not meaning:
        raise SystemExit(f"{cls.__module__}.{cls.__qualname__}.{name}: no docstring; write its meaning and unit")
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if len(choices) > 1:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return meaning


def replace_between_markers(text: str, tables: str) -> str:
    """`text` with everything between the two markers replaced.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise SystemExit(f"the file must hold the lines {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or put them into a file."""
    parser = argparse.ArgumentParser(description="Print every configuration key as a Markdown table.")
    parser.add_argument("--write", metavar="FILE", type=Path, help=f"put it into FILE between {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    if options.write is None:
        sys.stdout.write(config_tables())
    else:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_between_markers(text, config_tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
