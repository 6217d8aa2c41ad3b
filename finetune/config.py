"""Strict decoding: a YAML file and command-line overrides become dataclasses, or one clear line says why not."""

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from finetune.errors import UserError

T = TypeVar("T")
_SECRET = re.compile("wandb|key|token$|secret|password", re.IGNORECASE)


class CommandLineText(str):
    """A value as typed on the command line: it becomes whatever type its field has."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not YAML: not UTF-8 text ({error.reason}); give a YAML file") from error
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f" line {mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else "cannot be read"
        raise UserError(f"config {path}{place}: not YAML: {problem}") from error
    if not isinstance(raw, dict):
        raise UserError(f"config {path}: holds {_kind(raw)}, not keys and values; see example/quickstart.yaml")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Set dotted keys (`data.train_data`) in a nested mapping; missing sections are made."""
    for dotted, text in overrides.items():
        section = raw
        *parents, last = dotted.split(".")
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"--{dotted}={_shown(text, dotted)}: {parent!r} is a value, not a section")
        section[last] = CommandLineText(text)
    return raw


def decode(cls: type[T], raw: Any, where: str = "") -> T:
    """Build a dataclass from a mapping, recursively.

    Raises:
        UserError: an unknown or missing key, or a value that its field's type does not admit.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(raw, Mapping):
        raise _mismatch(where, raw, "a section with keys and values")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            close = _closest(str(key), cls)
            remedy = f"did you mean {prefix}{close}?" if close else f"known keys: {', '.join(known)}"
            raise UserError(f"{prefix}{key}: unknown key (value {_shown(raw[key], f'{prefix}{key}')}); {remedy}")
    values = {}
    for name, field in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{prefix}{name}: not set; add it to the YAML or pass --{prefix}{name}=…")
    try:
        return cls(**values)
    except ValueError as error:  # raised by the dataclass' own checks, which name the key without its section
        raise UserError(f"{prefix}{error}") from error


def _closest(key: str, cls: type) -> str | None:
    """The key that was probably meant, here or in a section below: `lr` gives `optim.lr`."""
    dotted = {name.rpartition(".")[2]: name for name in reversed(list(_dotted_keys(cls)))}
    close = difflib.get_close_matches(key, dotted, n=1)
    inside = [leaf for leaf in dotted if key.endswith(f"_{leaf}")]
    return next((dotted[leaf] for leaf in [key, *close, *inside] if leaf in dotted), None)


def _dotted_keys(cls: type) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield name
        if is_dataclass(hint):
            yield from (f"{name}.{inner}" for inner in _dotted_keys(hint))  # type: ignore[arg-type]


def encode(config: Any) -> Any:
    """The inverse of `decode`: plain mappings and values, ready for YAML."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: encode(getattr(config, field.name)) for field in fields(config)}
    return config


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return _plain(value, where)
    if origin in (Union, types.UnionType):
        return _convert_optional(hint, value, where)
    if origin is Literal:
        return _convert_literal(get_args(hint), value, where)
    if is_dataclass(hint):
        return decode(hint, {} if value is None else value, where)  # type: ignore[arg-type]
    if hint is str:
        return _convert_str(value, where)
    value = _plain(value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _mismatch(where, value, "a list")
        (item,) = get_args(hint)
        return [_convert(item, element, f"{where}[{index}]") for index, element in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, value, "a mapping")
        return value
    return _convert_scalar(hint, value, where)


def _plain(value: Any, where: str) -> Any:
    """A value with what the command line set, itself or inside it, read as YAML."""
    if isinstance(value, dict):
        return {key: _plain(element, f"{where}.{key}") for key, element in value.items()}
    if not isinstance(value, CommandLineText):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {_shown(value, where)} is not a YAML value; quote it or mend it") from error


def _convert_optional(hint: Any, value: Any, where: str) -> Any:
    (inner,) = [arm for arm in get_args(hint) if arm is not type(None)]
    # moshi-finetune's own example leaves unused keys as empty strings.
    if value is None or value == "" or (isinstance(value, CommandLineText) and value in ("null", "None")):
        return None
    return _convert(inner, value, where)


def _convert_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        if value == choice and type(value) in (type(choice), CommandLineText):
            return choice
    raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")


def _convert_str(value: Any, where: str) -> str:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise _mismatch(where, value, "text")


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and (number := _as_float(value)) is not None:
        return number
    expected = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
    if hint is int and (number := _as_float(value)) is not None and number.is_integer():
        expected += f", written {int(number)}"
    raise _mismatch(where, value, expected)


def _as_float(value: Any) -> float | None:
    """The number that is meant, also by "2e-6", which PyYAML reads as text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _mismatch(where: str, value: Any, expected: str) -> UserError:
    return UserError(f"{where}: {_shown(value, where)} is {_kind(value)}; expected {expected}")


def _shown(value: Any, where: str) -> str:
    """A value as messages show it, unless it may be a secret, perhaps under a misspelt key."""
    return "hidden" if _SECRET.search(where) else f"{value!r:.60}"


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "text", bool: "true/false", int: "a whole number"}
    return "empty" if value is None else names.get(type(value), f"a {type(value).__name__}")
