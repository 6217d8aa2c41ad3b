"""Every format of conversations, in files made as its own project makes them; what wrong ones are told."""

import gzip
import json
import logging
import sqlite3
import sys
from pathlib import Path

import pytest

from finetune.data.conversations import ConversationDataset
from finetune.data.turn_formats import read_source
from finetune.data.turn_records import ListedConversation
from finetune.data.types import Turn
from finetune.errors import UserError
from test_data import write_audio

KEY = "data.train_data"
HUGE = "1" + "0" * 400


@pytest.fixture
def folder(tmp_path) -> Path:
    """clips/a.wav lasts 1 s, clips/b.wav 2 s."""
    (tmp_path / "clips").mkdir()
    write_audio(tmp_path / "clips" / "a.wav", 1.0, volumes=(0.5,))
    write_audio(tmp_path / "clips" / "b.wav", 2.0, volumes=(0.5,))
    return tmp_path


def write_json(path: Path, *entries, lines: bool = False) -> str:
    text = "\n".join(map(json.dumps, entries)) + "\n" if lines else json.dumps(entries[0], indent=1)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read_turns(spec: str, **changes) -> list[list[Turn]]:
    """The turns of every conversation."""
    settings = {"max_frames": 2048, "context_turns": 0, "mask_speaker_ids": [], "max_audio_sec": None, **changes}
    settings = {"frame_sec": 0.08, "on_error": "fail", "num_workers": 2, "count_text": lambda _, text: 3, **settings}
    dataset = ConversationDataset.open(spec, KEY, **settings)
    return [list(dataset.read(window).turns) for window in dataset.windows[0]]


def told(turns: list[Turn]) -> list[tuple[str, str, float, bool]]:
    return [(turn.speaker, turn.text, len(turn.wav_S) / 24_000, turn.is_trained) for turn in turns]


def message(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


# Messages


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.jsonl.gz", "talks.txt"])
def test_messages_of_csm_hf(name, folder):
    messages = [
        message("speaker_0", said("Hi."), {"type": "audio", "url": "clips/a.wav"}),
        message("narrator", said("They left.")),
        message("speaker_1", said("Oh,"), said("hello."), {"type": "audio", "path": "clips/b.wav", "url": None}),
    ]
    masked = {"messages": messages, "training_mask": [False, True, True]}
    spec = write_json(folder / name, masked, {"messages": messages}, lines=True)
    first, second = read_turns(spec)
    assert told(first) == [
        ("0", "Hi.", 1.0, False),
        ("narrator", "They left.", 0, False),
        ("1", "Oh, hello.", 2.0, True),
    ]
    assert [turn.is_trained for turn in second] == [True, False, True]


def test_messages_may_hold_plain_text_and_two_paths_of_one_file(folder):
    audio = {"type": "audio", "url": str(folder / "clips" / "a.wav"), "path": "other/a.wav"}
    messages = [{"role": 3, "content": "a"}, message("speaker_7", said("b"), audio)]
    (turns,) = read_turns(write_json(folder / "m.jsonl", {"messages": messages}, lines=True))
    assert told(turns) == [("3", "a", 0, False), ("7", "b", 1.0, True)]


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.json.gz"])
def test_one_conversation_or_a_list_over_several_lines(name, folder):
    talk = {"messages": [message("speaker_0", said("b"), {"type": "audio", "path": "clips/a.wav"})]}
    for whole, num_talks in ((talk, 1), ([talk, talk], 2)):
        turns = read_turns(write_json(folder / name, whole))
        assert [told(each) for each in turns] == [[("0", "b", 1.0, True)]] * num_talks


@pytest.mark.parametrize("untold", ["", " \n", None])
def test_audio_without_words_is_context(untold, folder):
    write_audio(folder / "talk.wav", 2.0)
    audio = [{"type": "audio", "path": f"clips/{name}.wav"} for name in "ab"]
    messages = [message("0", said(untold), audio[0]), message("0", audio[0]), message("1", said("b"), audio[1])]
    turns = [{"text": "b" if who else untold, "speaker": who, "start": 0, "end": 1} for who in (0, 1)]
    mlx = [{"text": untold, "path": "clips/a.wav"}, {"text": "b", "path": "clips/b.wav"}]
    for talk in ({"messages": messages}, {"audio": "talk.wav", "turns": turns}, {"turns": mlx}):
        *context, last = read_turns(write_json(folder / "m.json", talk))[0]
        assert {(turn.text, len(turn.wav_S), turn.is_trained) for turn in context} == {("", 24_000, False)}
        assert last.is_trained


# csm-mlx


@pytest.mark.parametrize("spelling", ["speaker", "speaker_id"])
def test_conversations_of_csm_mlx(spelling, folder):
    turns = [
        {"text": "Yes?", "audio_path": str(folder / "clips" / "b.wav")},
        {"text": "No audio.", spelling: 4},
        {"text": "Hi.", "audio_path": "clips/a.wav", spelling: 4},
    ]
    first, second = read_turns(write_json(folder / "data.json", [turns, turns[2:]]), mask_speaker_ids=["0"])
    assert told(first) == [("0", "Yes?", 2.0, False), ("4", "No audio.", 0, False), ("4", "Hi.", 1.0, True)]
    assert told(second) == [("4", "Hi.", 1.0, True)]


def test_preference_data_trains_what_was_preferred(folder, caplog):
    good, bad = ([{"text": text, "audio_path": "clips/a.wav", "speaker": 0}] for text in ("good", "bad"))
    pairs = [{"chosen": good, "rejected": bad}] * 3
    points = [{"segments": good, "preference": 1}, {"segments": bad, "preference": -1}]
    for data, num_rejected in ((pairs, 3), (points, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "parley"):
            conversations = read_turns(write_json(folder / "data.json", data))
        assert {turn.text for turns in conversations for turn in turns} == {"good"}
        assert len(conversations) == len(data) - (data is points)
        (warning,) = caplog.messages
        assert f"data.json: preference data: {num_rejected} rejected conversations are left out" in warning


# Rows


ROWS = [
    {"text": "One, and more.", "path": "clips/a.wav", "start": None, "end": None, "speaker": None},
    {"text": 'Two "quoted"', "path": "clips/b.wav", "start": 0.5, "end": 1.25, "speaker": 30},
]
TOLD_ROWS = [[("999", "One, and more.", 1.0, True)], [("30", 'Two "quoted"', 0.75, True)]]


def write_table(path: Path) -> None:
    """As pandas, which sesame-finetune reads its metadata with, writes it."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    if path.suffix == ".json":
        frame.to_json(path, orient="records")
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    elif path.suffix == ".sql":
        with sqlite3.connect(path) as connection:
            frame.to_sql("data", connection)
    else:
        pytest.importorskip("tables")
        frame.to_hdf(path, key="data", format="table" if path.stem == "table" else "fixed")


@pytest.mark.filterwarnings("ignore::Warning:pandas", "ignore::Warning:tables")
@pytest.mark.parametrize("name", ["m.json", "m.csv", "m.parquet", "m.sql", "fixed.hdf5", "table.hdf5"])
def test_rows_of_sesame_finetune(name, folder):
    write_table(folder / name)
    renamed = (folder / name).rename(folder / "anything")  # by content, not by name
    assert [told(turns) for turns in read_turns(str(renamed))] == TOLD_ROWS
    assert [entry.place for entry in read_source(str(renamed), KEY)][1].split()[-1] in ("2", "3")


def test_csv_without_pandas_and_with_a_byte_order_mark(folder):
    text = '\ufeffpath,text,end\r\nclips/a.wav,"Hello,\nyou",\r\nclips/b.wav,Bye,1.5\r\n'
    (folder / "m.csv").write_text(text, newline="")
    assert [told(turns) for turns in read_turns(str(folder / "m.csv"))] == [
        [("999", "Hello,\nyou", 1.0, True)],
        [("999", "Bye", 1.5, True)],
    ]
    assert [entry.place for entry in read_source(str(folder / "m.csv"), KEY)] == [
        f"{folder}/m.csv line 3",
        f"{folder}/m.csv line 4",
    ]


def test_sqlite_without_pandas(folder):
    with sqlite3.connect(folder / "m.sql") as connection:
        connection.execute("CREATE TABLE data (text TEXT, path TEXT, speaker INTEGER)")
        connection.execute("INSERT INTO data VALUES ('Hi', 'clips/a.wav', 2)")
    connection.close()
    assert [told(turns) for turns in read_turns(str(folder / "m.sql"))] == [[("2", "Hi", 1.0, True)]]


def test_metadata_with_durations(folder):
    """A duration alone describes the file; behind a start it says where the cut ends."""
    rows = [
        {"path": "clips/a.wav", "text": "a", "duration": 0.999, "speaker": 0},
        {"path": "clips/b.wav", "text": "b", "start": 0.5, "duration": 0.5, "speaker": "Ann"},
    ]
    turns = read_turns(write_json(folder / "metadata.json", rows))
    assert [told(each) for each in turns] == [[("0", "a", 1.0, True)], [("Ann", "b", 0.5, True)]]


def test_paths_from_the_working_folder_are_taken_and_said(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(folder)
    spec = write_json(tmp_path / "lists" / "m.jsonl", *ROWS, lines=True)
    with caplog.at_level(logging.WARNING, "parley"):
        assert [told(turns) for turns in read_turns(spec)] == TOLD_ROWS
    (warning,) = caplog.messages
    assert "taken from the working folder, such as clips/a.wav" in warning


# Hugging Face datasets


def make_dataset(folder: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    audio = [{"bytes": (folder / "clips" / f"{name}.wav").read_bytes(), "path": f"{name}.wav"} for name in "ab"]
    dataset = datasets.Dataset.from_dict({"audio": audio, "text": ["Hi", "Bye"], "source": [0, 5]})
    return dataset.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())


@pytest.mark.parametrize("kind", ["saved", "dict", "dict#test", "parquet", "hub", "hub#test", "hub#train:3"])
def test_hugging_face_datasets(kind, folder, tmp_path, monkeypatch):
    dataset = make_dataset(folder)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = str(tmp_path / "set")
    if kind == "saved":
        dataset.save_to_disk(spec)
    elif kind.startswith("dict"):
        splits = {"train": dataset, "test": dataset.select([1])}
        datasets.DatasetDict(splits).save_to_disk(spec)
    elif kind == "parquet":
        spec += ".parquet"
        dataset.to_parquet(spec)
    else:
        (tmp_path / "set").mkdir()
        dataset.to_parquet(f"{spec}/train-00000-of-00001.parquet")
        dataset.select([1]).to_parquet(f"{spec}/test-00000-of-00001.parquet")
        spec = f"hf://{spec}"
    turns = [told(turns) for turns in read_turns(spec + "".join(kind.partition("#")[1:]))]
    assert turns == [[("0", "Hi", 1.0, True)], [("5", "Bye", 2.0, True)]][kind.endswith("#test") :]


def test_datasets_of_paths_and_without_speakers(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    paths = [str(folder / "clips" / "a.wav")]
    datasets.Dataset.from_dict({"audio": paths, "text": ["Hi"]}).save_to_disk(str(tmp_path / "set"))
    assert [told(turns) for turns in read_turns(str(tmp_path / "set"))] == [[("0", "Hi", 1.0, True)]]


def test_datasets_with_other_columns_or_splits_are_named(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    wrong = datasets.Dataset.from_dict({"sound": ["a.wav"], "text": ["Hi"]})
    datasets.DatasetDict(train=wrong).save_to_disk(str(tmp_path / "set"))
    for spec, says in (
        (f"{tmp_path}/set", "has the columns sound, text; wanted are columns audio"),
        (f"{tmp_path}/set#dev", "cannot be loaded as a dataset (KeyError: 'dev'); mend its path or its split"),
        (f"hf://{tmp_path}/none", "write hf://owner/name[/config][#split]"),
        ("hf://owner", "no name behind the owner); write hf://owner/name"),
    ):
        with pytest.raises(UserError) as refused:
            read_source(spec, KEY)
        assert str(refused.value).startswith(f"{KEY}: {spec}: ")
        assert says in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("package", "head"), [("pyarrow.parquet", b"PAR1"), ("pandas", b"\x89HDF\r\n\x1a\n"), ("datasets", b"")]
)
def test_a_missing_package_is_named_with_its_extra(package, head, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "m").write_bytes(head)
    with pytest.raises(UserError, match=rf"^{KEY}: .*needs the package {package}.*'parley-finetune\[tables\]'"):
        read_source(str(tmp_path / "m") if head else "hf://owner/missing-package", KEY)


# Sources and errors


def test_a_folder_gives_its_data_but_no_transcripts(folder):
    write_json(folder / "clips" / "a.json", {"alignments": []})
    write_json(folder / "one.jsonl", {"text": "1", "path": "clips/a.wav"}, lines=True)
    (folder / "two.csv.gz").write_bytes(gzip.compress(b"text,path\n2,clips/b.wav\n"))
    write_json(folder / "three.json.gz", [{"text": "3", "path": "clips/a.wav"}])
    (folder / "notes.txt").write_text("no data")
    assert [turn.text for turns in read_turns(str(folder)) for turn in turns] == ["1", "3", "2"]
    assert all(isinstance(entry, ListedConversation) for entry in read_source(str(folder), KEY))


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("m.jsonl", '{"text": "a", "path": "a.wav"}\n{broken\n', ["m.jsonl line 2: not a JSON object", "one object a"]),
        ("m.json", '[\n {"text": "a"},\n {broken}\n]', ["m.json line 3: not JSON", "mend the line"]),
        ("m.json", "[3]", ["m.json item 1: 3 is no conversation; write messages"]),
        ("m.json", '[[{"text": "a"}, 7]]', ["m.json item 1 turn 2: not a turn: 7; write"]),
        ("m.json", '[[{"text": null}]]', ["item 1 turn 1: text is None; write the words"]),
        ("m.json", '[{"text": "a", "path": "a.wav", "start": "x"}]', ["item 1: start is 'x'; write seconds"]),
        ("m.json", '[{"text": "a", "path": "a.wav", "end": -1}]', ["item 1: end is -1; write seconds"]),
        ("m.json", '[{"text": "a", "path": "a.wav", "speaker": [1]}]', ["item 1: speaker is [1]; write a number"]),
        ("m.json", '[{"text": "a", "path": 7}]', ["item 1: path 7 is not text; write the path"]),
        ("m.json", '[{"segments": [], "preference": 0.5}]', ["item 1: preference is 0.5; write 1 or -1"]),
        ("m.jsonl", '{"text": "a"}', ["m.jsonl line 1: has text; a conversation has messages"]),
        ("m.jsonl", '{"path": "a.wav", "duration": 0}', ["line 1: duration is 0"]),
        ("m.jsonl", '{"messages": {}}', ["line 1: messages is {}; write a list"]),
        ("m.jsonl", '{"messages": [3]}', ["line 1 message 1: 3 is no message; write"]),
        ("m.jsonl", '{"messages": [{"role": "a"}]}', ["line 1 message 1: content is None; write a list"]),
        ("m.jsonl", '{"messages": [{"role": "a", "content": [{"type": "text"}]}]}', ["message 1: text is None; write"]),
        ("m.jsonl", '{"messages": [], "training_mask": [true]}', ["training_mask is [True]; write true or false for"]),
        ("m.jsonl", '{"audio": "a.wav", "turns": [{"text": "a", "speaker": 2}]}', ["turn 1: speaker is '2'; write 0"]),
        ("m.jsonl", '{"audio": "a.wav", "turns": [{"text": "a", "speaker": 1}]}', ["turn 1: no end; write start and"]),
        ("m.csv", "path,text\na.flac,\n", ["m.csv line 2: text is ''; write the words of the turn as text"]),
        ("m.jsonl", '{"text": "  ", "path": "a.wav"}', ["line 1: text is '  '; write the words of the turn as text"]),
        ("m.jsonl", r'{"text": "a\ud800b", "path": "a"}', [r"line 1: text holds '\ud800', half of a character"]),
        ("m.jsonl", r'{"messages": [{"role": "a", "content": "\udc00"}]}', [r"message 1: text holds '\udc00', half"]),
        ("m.jsonl", r'{"messages": [{"role": "\ud800", "content": ""}]}', [r"speaker holds '\ud800', half of"]),
        ("m.jsonl", r'{"text": "a", "path": "\ud800"}', [r"line 1: path holds '\ud800', half of a character"]),
        ("m.jsonl", r'{"path": "\ud800", "duration": 1}', [r"line 1: path holds '\ud800', half of a character"]),
        ("m.jsonl", f'{{"path": "a", "duration": {HUGE}}}', ["line 1: duration is 1000", "; write seconds"]),
        ("m.json", f'[{{"path": "a", "text": "a", "speaker": {HUGE}}}]', ["speaker is 1000", "; write a number"]),
        ("m.jsonl", f'{{"path": "a", "text": "a", "end": {HUGE}}}', ["line 1: end is 1000", "; write seconds"]),
        ("m.jsonl", '{\n"messages": []\n}\n{\n}', ["line 4: more JSON behind the first object; write one object a"]),
        ("m.jsonl", "[{}]\n[]", ["line 2: more JSON behind the first list; write one object a line, such as {"]),
        ("m.jsonl", "[" * 100_000, ["m.jsonl: cannot be read as JSON", "write one object a line"]),
        ("m.jsonl", '{"messages": [{"role": 1, "content": [{"type": "x"}]}]}', ["item has the type 'x'; write text"]),
        ("m.jsonl", '{"messages": [{"role": 1, "content": [{"text": "x"}]}]}', ["item has the type None; write"]),
        ("m.jsonl", '{"messages": [{"role": 1, "content": [{"type": "audio"}]}]}', ["an audio item has no path;"]),
        ("m.csv", "text;path\na;b\n", ["m.csv line 1: columns are separated by ';'; separate them by a comma"]),
        ("m.csv", "text\tpath\na\tb\n", [r"m.csv line 1: columns are separated by '\t'; separate them by a comma"]),
        ("m.csv", "text, path\na, b\n", ["line 1: the column ' path' has spaces around its name; write a comma and"]),
        ("m.flac", "", ["m.flac: is an audio file, without the words", "a CSV file with the columns text,path"]),
        ("take", b"RIFF\0\0", ["take: is an audio file, without the words", "a CSV file with the columns text,path"]),
        ("m" * 300, None, ["m: cannot be read (File name too long); mend the path"]),
        ("m.csv", "file,words\na.wav,hi\n", ["m.csv line 2: has file, words; a conversation has"]),
        ("m.sql", "SQLite format 3\0 and nothing", ["m.sql: cannot be read as an SQLite file", "a table called data"]),
        ("m.jsonl", "\n", ["m.jsonl: lists no conversation; each has"]),
        ("m.jsonl", b"\xff\xfe\x00", ["m.jsonl: cannot be read", "UTF-8"]),
        ("m.jsonl.gz", b"\x1f\x8b nothing", ["m.jsonl.gz: cannot be read", "anew"]),
        ("m.wav", None, ["m.wav: no such file or folder; give a file"]),
    ],
)
def test_what_is_wrong_is_one_line(name, text, parts, tmp_path):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        read_source(str(tmp_path / name), KEY)
    for part in [f"{KEY}: {tmp_path}/", *parts]:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_with_a_broken_body(folder):
    write_table(folder / "m.parquet")
    whole = (folder / "m.parquet").read_bytes()
    (folder / "m.parquet").write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    with pytest.raises(UserError, match=rf"^{KEY}: {folder}/m\.parquet: cannot be read as Parquet .*; write it anew$"):
        read_source(str(folder / "m.parquet"), KEY)


def test_an_sqlite_file_with_another_table(tmp_path):
    with sqlite3.connect(tmp_path / "m.sql") as connection:
        connection.execute("CREATE TABLE rows (text TEXT)")
    connection.close()
    with pytest.raises(UserError, match=r"m\.sql: .*no such table: data.*keep the rows in a table called data"):
        read_source(str(tmp_path / "m.sql"), KEY)


def test_a_folder_without_data(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"no data file below this folder; wanted are \.jsonl"):
        read_source(str(tmp_path), KEY)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=rf"holds a saved Hugging Face dataset; give .* folder {tmp_path}/set$"):
        read_source(str(tmp_path), KEY)
