"""Rows of tables: CSV, SQLite, Parquet, HDF5 and Hugging Face datasets.

Columns are those of sesame-finetune's metadata (`text`, `path`, optional `start`, `end`, `speaker`; its pretokenize.py
selects from the SQLite table `data`), or `audio`, `text` and `source` or `speaker_id` in a Hugging Face dataset.
Only Parquet, HDF5 and datasets need packages, which are imported when such a file is met.
"""

import csv
import importlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.data.turn_records import (
    AudioRef,
    Entry,
    ListedConversation,
    ListedTurn,
    Place,
    is_missing,
    parse_speaker,
    parse_text,
)
from finetune.errors import UserError

HUB = "hf://"
_BATCH_ROWS = 1000
_DATASET_SPEAKER = "0"
_EMBEDDED_SHAPE = (
    "columns audio (a path or the bytes of a file) and text, and source or speaker_id if there are several"
)
_HUB_SHAPE = f"write {HUB}owner/name[/config][#split]"

Row = tuple[str, dict[str, Any]]
"""Where it stands in its file, such as `row 7`, and its cells by column."""


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "pip install 'parley-finetune[tables]'"
        raise UserError(f"{what}: needs the package {name}, which is not installed; {remedy}") from error


def csv_rows(lines: Iterator[str], path: Path, key: str) -> Iterator[Row]:
    """Rows of a CSV file with a line of names; `line` in their place is the file's."""
    reader = csv.DictReader(lines)
    _check_names(list(reader.fieldnames or ()), f"{key}: {path} line {reader.line_num}")
    for row in reader:
        yield f"line {reader.line_num}", row


def _check_names(names: list[str], place: str) -> None:
    """Refuse what other programs call CSV: cells would be taken for others without a word."""
    separator = next((each for each in (";", "\t", "|") if len(names) == 1 and each in names[0]), None)
    if separator is not None:
        raise UserError(f"{place}: columns are separated by {separator!r}; separate them by a comma, as in text,path")
    spaced = next((name for name in names if name != name.strip()), None)
    if spaced is not None:
        remedy = "write a comma and nothing else between columns, as in text,path"
        raise UserError(f"{place}: the column {spaced!r:.80} has spaces around its name; {remedy}")


def sqlite_rows(path: Path, key: str) -> Iterator[Row]:
    """Rows of the table `data` of an SQLite file."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            for number, row in enumerate(connection.execute("SELECT * FROM data"), 1):
                yield f"row {number}", dict(row)
    except sqlite3.Error as error:
        remedy = "keep the rows in a table called data"
        raise UserError(f"{key}: {path}: cannot be read as an SQLite file ({error}); {remedy}") from error


def hdf_rows(path: Path, key: str) -> Iterator[Row]:
    """Rows of the one table that pandas' `to_hdf` wrote. It may hold pickled columns: the file must be trusted."""
    pandas = _package("pandas", f"{key}: {path}")
    _package("tables", f"{key}: {path}")
    try:
        records = pandas.read_hdf(path).to_dict("records")
    except Exception as error:  # PyTables and pandas raise many kinds
        remedy = "write one table with pandas' DataFrame.to_hdf"
        raise UserError(f"{key}: {path}: cannot be read as HDF5 ({_in_line(error)}); {remedy}") from error
    for number, row in enumerate(records, 1):
        yield f"row {number}", row


def parquet_rows(path: Path, key: str) -> Iterator[Row] | None:
    """Rows of a Parquet file; None if it embeds audio, and so is a file of a Hugging Face dataset."""
    parquet = _package("pyarrow.parquet", f"{key}: {path}")
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        raise _unreadable_parquet(path, key, error) from error
    if "audio" in schema.names and str(schema.field("audio").type).startswith("struct"):
        return None
    return _parquet_batches(parquet, path, key)


def _parquet_batches(parquet: Any, path: Path, key: str) -> Iterator[Row]:
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own are kinds of these
        raise _unreadable_parquet(path, key, error) from error


def _unreadable_parquet(path: Path, key: str, error: Exception) -> UserError:
    return UserError(f"{key}: {path}: cannot be read as Parquet ({_in_line(error)}); write it anew")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the package datasets wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def dataset_entries(name: str, key: str) -> list[Entry]:
    """The rows of a Hugging Face dataset, each a conversation of one turn. Audio stays where it is.

    Args:
        name: as `open_dataset` takes it.
    """
    try:
        dataset = open_dataset(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    columns = [column for column in ("text", "source", "speaker_id") if column in dataset.column_names]
    if "text" not in columns or "audio" not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise UserError(f"{key}: {name}: has the columns {found}; wanted are {_EMBEDDED_SHAPE}")
    entries: list[Entry] = []
    for batch in dataset.select_columns(columns).with_format("arrow").iter(_BATCH_ROWS):
        for row in batch.to_pylist():
            place = Place(key, f"{name} row {len(entries) + 1}", "")
            audio = AudioRef(name, row=len(entries))
            turn = ListedTurn(parse_text(row["text"], place), _source(row, place), audio)
            entries.append(ListedConversation((turn,), place.name))
    return entries


def _source(row: dict[str, Any], place: Place) -> str:
    given = [row[name] for name in ("source", "speaker_id") if not is_missing(row.get(name))]
    return parse_speaker(given[0], place) if given else _DATASET_SPEAKER


@lru_cache(maxsize=64)
def open_dataset(name: str) -> Any:
    """A Hugging Face dataset whose rows give audio undecoded, as `{"bytes": …, "path": …}`.

    Args:
        name: a folder of `save_to_disk` with an optional `#split`, a Parquet file, or `hf://owner/name`, also with
            `/config` and `#split` (`train` if it is not given). A folder may stand behind `hf://` if it is laid
            out as a repository is.

    Raises:
        UserError: the package is missing, or there is no such dataset, or no such split.
    """
    datasets = _package("datasets", name)
    try:
        dataset = _load(datasets, name)
        return (
            dataset.cast_column("audio", datasets.Audio(decode=False)) if "audio" in dataset.column_names else dataset
        )
    except Exception as error:  # those of the hub, of the network, of pyarrow
        remedy = _HUB_SHAPE if name.startswith(HUB) else "mend its path or its split"
        raise UserError(f"{name}: cannot be loaded as a dataset ({_in_line(error)}); {remedy}") from error


def _load(datasets: Any, name: str) -> Any:
    location, _, split = name.partition("#")
    if location.startswith(HUB):
        repository, config = _hub_parts(location.removeprefix(HUB))
        return datasets.load_dataset(repository, config, split=split or "train")
    if Path(location).is_file():
        return datasets.load_dataset("parquet", data_files=location, split="train")
    saved = datasets.load_from_disk(location)
    return saved[split or "train"] if isinstance(saved, datasets.DatasetDict) else saved


def _hub_parts(name: str) -> tuple[str, str | None]:
    if name.startswith(("/", ".")):
        return name, None
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not repository:
        raise ValueError("no name behind the owner")
    return f"{owner}/{repository}", config or None


def _in_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
