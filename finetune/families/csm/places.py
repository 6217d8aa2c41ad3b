"""Files in folders and on the hub, and one line for whatever the hub may answer."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from finetune.errors import UserError
from finetune.json_files import read_json

# Beside exported weights: what no other program's files say. Its keys are those of the `model` section.
NOTES_FILE = "parley.json"
_NO_ACCESS = (401, 403)


@dataclass(frozen=True)
class Place:
    """A folder or a hub repository."""

    address: str
    key: str
    """The YAML key that named it, for messages."""
    fetch: Callable[[str], Path]
    """The path of a file that must be there."""
    look: Callable[[str], Path | None]
    """The path of a file that may be there."""


@dataclass(frozen=True)
class Settings:
    """Settings of the `model` section that a model's folder hands on to whoever uses it next."""

    text_template: str
    bos_token: str
    eos_token: str
    mimi_path: str | None
    mimi_config_path: str | None
    tokenizer_path: str | None


def folder_place(folder: Path, key: str) -> Place:
    """A local folder."""

    def look(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    def fetch(name: str) -> Path:
        found = look(name)
        if found is None:
            raise UserError(f"{key}: {folder}: no {name} in it; give a CSM's whole folder")
        return found

    return Place(str(folder), key, fetch, look)


def hub_place(repo: str, key: str) -> Place:
    """A repository of the Hugging Face Hub, whose files come into one folder of the cache."""

    is_offline = False  # then the hub is not asked again: it takes half a minute to give up

    def fetch(name: str) -> Path:
        return from_hub(repo, name, key, local_files_only=is_offline)

    def look(name: str) -> Path | None:
        nonlocal is_offline
        try:
            return Path(hf_hub_download(repo, name, local_files_only=is_offline))
        except EntryNotFoundError as error:
            if _status(error) in _NO_ACCESS:
                raise _refusal(repo, key, error) from error
            is_offline = is_offline or isinstance(error, LocalEntryNotFoundError)
            return None  # also offline, where nobody can say; what must be there is asked for by `fetch`
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise _refusal(repo, key, error) from error

    return Place(repo, key, fetch, look)


def from_hub(repo: str, name: str, key: str, *, local_files_only: bool = False) -> Path:
    """A file of a hub repository, or of what is kept of it.

    Raises:
        UserError: the hub refuses or cannot be reached; names the key and the remedy.
    """
    try:
        return Path(hf_hub_download(repo, name, local_files_only=local_files_only))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _refusal(repo, key, error, name) from error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, which huggingface_hub may have wrapped."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return _status(error.__cause__)
    return getattr(response, "status_code", None)


def _refusal(repo: str, key: str, error: Exception, name: str = "its files") -> UserError:
    """One line for whatever the hub may answer."""
    if isinstance(error, GatedRepoError) or _status(error) in _NO_ACCESS:
        remedy = f"accept its terms on https://huggingface.co/{repo} and run `hf auth login`"
        return UserError(f"{key}: {repo}: the hub gives no access to it; check the name, {remedy}")
    if isinstance(error, HFValidationError):
        return UserError(f"{key}: {repo!r} is neither a hub repo nor a folder; a local folder goes to model.path")
    if isinstance(error, LocalEntryNotFoundError):
        remedy = "check the network, or download the files and set model.path"
        return UserError(f"{key}: {repo}: the hub cannot be reached and {name} is not cached; {remedy}")
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{key}: {repo}: no {name} in it; is it a CSM?")
    if isinstance(error, HfHubHTTPError):
        reason = str(error).strip().splitlines()[-1]
        return UserError(f"{key}: {repo}: the hub refuses ({reason}); check the name")
    remedy = "check the network, or download the files and set model.path"
    return UserError(f"{key}: {repo}: cannot be fetched ({error}); {remedy}")


def single_file(value: str, key: str) -> Path:
    """A local path, or `hf://owner/repo/file`."""
    if value.startswith("hf://"):
        owner, repo, name = [*value.removeprefix("hf://").split("/", 2), "", ""][:3]
        if not name:
            raise UserError(f"{key}: {value}: names no file; write hf://owner/repo/file")
        return from_hub(f"{owner}/{repo}", name, key)
    if not Path(value).is_file():
        raise UserError(f"{key}: {value}: no such file")
    return Path(value)


def read_notes(place: Place) -> dict[str, str]:
    """What the `parley.json` of a model's folder says; nothing where there is none.

    Raises:
        UserError: it holds something else than texts.
    """
    path = place.look(NOTES_FILE)
    notes = read_json(path) if path else {}
    known = {field.name for field in fields(Settings)}
    for key, value in notes.items():
        if key not in known or not isinstance(value, str):
            raise UserError(f"model: {path}: {key}: {value!r:.40} is not a text of {', '.join(sorted(known))}; mend it")
    return notes


def write_notes(folder: Path, settings: Settings, *, without: tuple[str, ...] = ()) -> None:
    """Hand settings on; local paths become absolute.

    Args:
        without: what the folder itself holds.
    """
    notes = {key: value for key, value in asdict(settings).items() if value is not None and key not in without}
    for key, value in notes.items():
        if key.endswith("_path") and not value.startswith("hf://"):
            notes[key] = str(Path(value).resolve())
    (folder / NOTES_FILE).write_text(json.dumps(notes, indent=2, ensure_ascii=False), encoding="utf-8")
