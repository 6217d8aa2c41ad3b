"""The configuration: strict decoding, dotted overrides, the round trip through args.yaml, moshi-finetune's YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from conftest import ROOT
from finetune import args as configuration
from finetune.config import CommandLineText, apply_overrides, decode, encode, read_yaml
from finetune.errors import UserError
from finetune.families import args_class

SECRET = "0123456789abcdef0123456789abcdef01234567"
# kyutai-labs/moshi-finetune's example/moshi_7B.yaml, with every key that its `TrainArgs` knows.
MOSHI_FINETUNE = """
# data
data:
  eval_data: '' # Optional Fill
  shuffle: true
  train_data: 'DailyTalkContiguous/dailytalk.jsonl:2,other:1.5' # Fill

# model
moshi_paths:
  hf_repo_id: "kyutai/moshika-pytorch-bf16"

full_finetuning: false # Activate lora.enable if partial finetuning
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false

# training hyperparameters
first_codebook_weight_multiplier: 100.
text_padding_weight: .5

# tokens per training steps = batch_size x num_GPUs x duration_sec
# we recommend a sequence duration of 300 seconds
# If you run into memory error, you can try reduce the sequence length
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true # Activate checkpointing of layers
num_microbatches: 2
max_norm: 0.5

# optim
optim:
  lr: 2e-6
  weight_decay: 0.2
  pct_start: 0.07

# other
seed: 7
log_freq: 2
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 50
num_ckpt_keep: 5
param_dtype: bfloat16
overwrite_run_dir: true

save_adapters: false
run_dir: "runs/upstream"

# This part is optional and can be left blank
wandb:
  project: "" # your wandb project name
  run_name: "" # your wandb run name
  key: "" # your wandb api key
  offline: False
"""


@dataclass
class Inner:
    rate: float = 1.0
    kind: Literal["wide", "narrow"] = "wide"


@dataclass
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    limit: int | None = 3
    note: str | None = "n"
    sizes: list[int] = field(default_factory=list)
    table: dict[str, Any] | None = None
    inner: Inner = field(default_factory=Inner)


def minimal(**changes) -> dict[str, Any]:
    return {"data": {"train_data": "talks.jsonl"}, "run_dir": "runs/a", **changes}


def load(folder: Path, raw: dict[str, Any] | str, **overrides: str) -> configuration.TrainArgs:
    """What train.py makes of a YAML and a command line; in `overrides`, `__` stands for a dot."""
    path = folder / "config.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return configuration.load(path, dotted, args_class)


def refusal(folder: Path, raw: dict[str, Any] | str, **overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load(folder, raw, **overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"name": "a", "cuont": 2}, ["cuont: unknown key", "did you mean count?"]),
        ({"name": "a", "inner": {"rtae": 2}}, ["inner.rtae: unknown key", "did you mean inner.rate?"]),
        ({"name": "a", "zzzz": 2}, ["zzzz: unknown key", "known keys: name, count"]),
        ({"name": "a", 7: 2}, ["7: unknown key"]),
        ({"name": "a", "inner": {"kind": "broad"}}, ["inner.kind: 'broad'", "wide, narrow"]),
        ({"name": "a", "inner": {"kind": 3}}, ["inner.kind: 3", "wide, narrow"]),
        ({"name": "a", "count": 1.7}, ["count: 1.7", "a whole number"]),
        ({"name": "a", "count": 2.0}, ["count: 2.0", "a whole number"]),
        ({"name": "a", "count": True}, ["count: True", "a whole number"]),
        ({"name": "a", "count": "4"}, ["count: '4'", "a whole number"]),
        ({"name": "a", "count": None}, ["count: None", "a whole number"]),
        ({"name": "a", "limit": 1.5}, ["limit: 1.5", "a whole number"]),
        ({"name": "a", "flag": 1}, ["flag: 1", "true or false"]),
        ({"name": "a", "flag": "true"}, ["flag: 'true'", "true or false"]),
        ({"name": "a", "inner": {"rate": True}}, ["inner.rate: True", "a number"]),
        ({"name": "a", "inner": {"rate": "fast"}}, ["inner.rate: 'fast'", "a number"]),
        ({"name": True}, ["name: True", "text"]),
        ({"name": ["a"]}, ["name: ['a']", "text"]),
        ({"name": "a", "inner": [1]}, ["inner: [1]", "section"]),
        ({"name": "a", "inner": False}, ["inner: False", "section"]),
        ({"name": "a", "inner": ""}, ["inner: ''", "section"]),
        ({"name": "a", "sizes": 3}, ["sizes: 3", "a list"]),
        ({"name": "a", "sizes": [1, 2.5]}, ["sizes[1]: 2.5", "a whole number"]),
        ({"name": "a", "table": [1]}, ["table: [1]", "a mapping"]),
        ({"count": 2}, ["name: not set", "--name="]),
    ],
)
def test_what_does_not_fit_is_refused_with_key_value_and_remedy(raw, parts):
    with pytest.raises(UserError) as refused:
        decode(Outer, raw)
    for part in parts:
        assert part in str(refused.value)


def test_values_that_fit():
    raw = {"name": 12, "count": 2, "flag": True, "limit": "", "note": "", "sizes": [3, 4], "inner": {"rate": "2e-6"}}
    expected = Outer("12", 2, True, None, None, [3, 4], None, Inner(2e-6))
    assert decode(Outer, raw) == expected
    assert decode(Outer, {"name": "a", "inner": {"rate": 3}}).inner.rate == 3.0
    assert decode(Outer, {"name": "a", "limit": None, "inner": None}) == Outer("a", limit=None)
    assert decode(Outer, encode(expected)) == expected


def test_overrides_make_sections_and_take_the_fields_type():
    overrides = {
        "name": "3",
        "count": "12",
        "flag": "true",
        "limit": "null",
        "note": "",
        "sizes": "[5, 6]",
        "inner.rate": "2e-6",
        "inner.kind": "narrow",
        "table.depth.width": "64",
        "table.title": "old",
    }
    decoded = decode(Outer, apply_overrides({"inner": None, "count": 1}, overrides))
    table = {"depth": {"width": 64}, "title": "old"}
    assert decoded == Outer("3", 12, True, None, None, [5, 6], table, Inner(2e-6, "narrow"))
    assert type(decoded.name) is str
    assert yaml.safe_load(yaml.safe_dump(encode(decoded))) == encode(decoded)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"count": "1.7"}, ["count: 1.7", "a whole number"]),
        ({"count": "[1"}, ["count", "[1"]),
        ({"flag": "3"}, ["flag: 3", "true or false"]),
        ({"inner.kind": "broad"}, ["inner.kind: 'broad'", "wide, narrow"]),
        ({"inner.rtae": "2"}, ["inner.rtae: unknown key", "did you mean inner.rate?"]),
        ({"name.first": "x"}, ["--name.first=", "'name' is a value"]),
    ],
)
def test_wrong_overrides_are_refused(overrides, parts):
    with pytest.raises(UserError) as refused:
        decode(Outer, apply_overrides({"name": "a"}, overrides))
    for part in parts:
        assert part in str(refused.value)


def test_sources_pass_the_command_line_untouched(tmp_path):
    spec = "/data/a:b/talks.jsonl:2.5,/data/more,c.jsonl.gz:1"
    args = load(tmp_path, minimal(), data__train_data=spec, run_dir="2024", optim__lr="1e-5", wandb__project="42")
    assert args.data.train_data == spec
    assert (args.run_dir, args.optim.lr, args.wandb.project) == ("2024", 1e-5, "42")
    assert load(tmp_path, {"run_dir": "r"}, data__train_data="x").data.train_data == "x"


def test_overrides_reach_the_familys_section(tmp_path):
    raw = minimal(model={"path": "m", "architecture": {"dim": 8, "norm": "rms_norm"}})
    overrides = {"model__architecture__dim": "64", "model__text_padding_weight": "0.25"}
    args = load(tmp_path, raw, **overrides)
    assert args.model.architecture == {"dim": 64, "norm": "rms_norm"}
    assert args.model.text_padding_weight == 0.25
    configuration.save(args, tmp_path / "args.yaml")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("data: [1\nrun_dir: x\n", ["config.yaml line 2", "not YAML"]),
        ("- a\n- b\n", ["config.yaml", "a list"]),
        ("", ["config.yaml", "empty"]),
        (b"run_dir: \xff\xfe\x80\n", ["config.yaml", "not YAML"]),
    ],
)
def test_files_that_hold_no_configuration(content, parts, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    for part in parts:
        assert part in str(refused.value)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=f"config {path}: .*give the path of a YAML file"):
            read_yaml(path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"run_dir": ""}, ["run_dir: empty", "set it"]),
        ({"data": {"train_data": ""}}, ["data.train_data: empty", "set it"]),
        ({"data": None}, ["data.train_data: not set", "--data.train_data="]),
        ({"do_eval": True}, ["do_eval: true", "data.eval_data is empty"]),
        ({"batch_size": 0}, ["batch_size: 0 is below 1"]),
        ({"max_norm": -1.0}, ["max_norm: -1.0 is negative"]),
        ({"duration_sec": float("inf")}, ["duration_sec: inf"]),
        ({"duration_sec": float("nan")}, ["duration_sec: nan"]),
        ({"seed": -1}, ["seed: -1"]),
        ({"optim": {"pct_start": 2}}, ["optim.pct_start: 2.0"]),
        ({"lora": {"dropout": 1.0}}, ["lora.dropout: 1.0"]),
        ({"lora": True}, ["lora: True", "section"]),
        ({"lora": False}, ["lora: False", "section"]),
        ({"model": "moshi"}, ["model: 'moshi'", "family: moshi"]),
        ({"model": "moshi", "moshi_paths": {"hf_repo_id": "a/b"}}, ["model: 'moshi'", "family: moshi"]),
        ({"moshi_paths": "a/b"}, ["moshi_paths: 'a/b'", "section"]),
        ({"model": {"family": "moshy"}}, ["model.family: 'moshy'", "moshi"]),
        ({"model": {"family": ["moshi"]}}, ["model.family: ['moshi']", "moshi"]),
        ({"model": {"hf_repo": "a/b"}}, ["model.hf_repo: unknown key", "did you mean model.hf_repo_id?"]),
        ({"model": {"use_bos_eos": True}}, ["model.use_bos_eos: true", "keep_main_only: false"]),
        ({"model": {"text_padding_weight": 1.0}, "text_padding_weight": 0.5}, ["model.text_padding_weight", "twice"]),
    ],
)
def test_wrong_settings_name_their_key(changes, parts, tmp_path):
    line = refusal(tmp_path, minimal(**changes))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("changes", "choice"),
    [
        ({}, "lora"),
        ({"finetuning": "full"}, "full"),
        ({"full_finetuning": False, "lora": {"enable": True}}, "lora"),
        ({"full_finetuning": True, "lora": {"enable": False}}, "full"),
        ({"full_finetuning": True}, "full"),
        ({"lora": {"enable": True}}, "lora"),
        ({"finetuning": "lora", "lora": {"enable": True}}, "lora"),
        ({"finetuning": "full", "lora": {"enable": False}}, "full"),
        ({"full_finetuning": True, "lora": {"enable": True}}, "refused"),
        ({"full_finetuning": False, "lora": {"enable": False}}, "refused"),
        ({"finetuning": "full", "lora": {"enable": True}}, "refused"),
        ({"finetuning": "lora", "full_finetuning": True}, "refused"),
        ({"full_finetuning": "maybe"}, "refused"),
    ],
)
def test_upstreams_booleans_become_one_choice(changes, choice, tmp_path):
    if choice == "refused":
        line = refusal(tmp_path, minimal(**changes))
        assert "full_finetuning: " in line or "lora.enable: " in line
    else:
        assert load(tmp_path, minimal(**changes)).finetuning == choice


def test_a_moshi_finetune_yaml_means_the_same(tmp_path):
    args = load(tmp_path, MOSHI_FINETUNE)
    got = encode(args)
    sections = {name: got.pop(name) for name in ("data", "model", "lora", "optim", "wandb")}
    expected = {key: value for key, value in yaml.safe_load(MOSHI_FINETUNE).items() if key in got}
    assert len(expected) == 17
    assert {key: got[key] for key in expected} == expected
    assert args.finetuning == "lora"
    assert args.data.train_data == "DailyTalkContiguous/dailytalk.jsonl:2,other:1.5"
    assert (args.data.eval_data, args.data.shuffle) == (None, True)
    lora = {"rank": 128, "scaling": 2.0, "alpha": None, "rslora": False, "dropout": 0.0, "ft_embed": False}
    assert sections["lora"] == lora
    optim = {"name": "adamw", "lr": 2e-6, "weight_decay": 0.2, "pct_start": 0.07, "schedule": "one_cycle"}
    assert sections["optim"] == optim
    assert sections["wandb"] == {"project": None, "run_name": None, "offline": False, "key": None}
    assert (args.model.family, args.model.hf_repo_id) == ("moshi", "kyutai/moshika-pytorch-bf16")
    assert (args.model.first_codebook_weight_multiplier, args.model.text_padding_weight) == (100.0, 0.5)


def test_upstreams_spellings_work_on_the_command_line(tmp_path):
    spellings = {"full_finetuning": "true", "lora__enable": "false", "moshi_paths__mimi_path": "m.safetensors"}
    args = load(tmp_path, MOSHI_FINETUNE, text_padding_weight="0.3", **spellings)
    assert args.finetuning == "full"
    assert (args.model.mimi_path, args.model.text_padding_weight) == ("m.safetensors", 0.3)


@pytest.mark.parametrize(
    "raw",
    [
        MOSHI_FINETUNE,
        minimal(),
        minimal(model={"path": "m", "architecture": {"dim": 8, "delays": [0, 0, 1]}}, num_ckpt_keep=None),
        minimal(run_dir="läufe/ä: b", wandb={"project": "talks"}, optim={"lr": 1e-30}),
    ],
)
def test_args_yaml_gives_the_same_configuration(raw, tmp_path):
    args = load(tmp_path, raw)
    configuration.save(args, tmp_path / "args.yaml")
    assert configuration.load(tmp_path / "args.yaml", {}, args_class) == args


def test_the_wandb_key_is_never_written_or_shown(tmp_path):
    args = load(tmp_path, minimal(wandb={"project": "p", "key": SECRET}))
    assert args.wandb.key == SECRET
    assert load(tmp_path, minimal(), wandb__key=SECRET).wandb.key == SECRET
    configuration.save(args, tmp_path / "args.yaml")
    written = (tmp_path / "args.yaml").read_text()
    for text in (written, repr(args), str(configuration.without_secrets(args))):
        assert SECRET not in text
    again = configuration.load(tmp_path / "args.yaml", {}, args_class)
    args.wandb.key = None
    assert again == args


@pytest.mark.parametrize("section", [{"kye": SECRET}, {"key": [SECRET]}, {"key": {"x": SECRET}}, SECRET, [SECRET]])
def test_a_misplaced_wandb_key_is_not_repeated_in_the_error(section, tmp_path):
    line = refusal(tmp_path, minimal(wandb=section))
    assert "wandb" in line
    assert SECRET not in line


def test_a_wandb_key_on_the_command_line_is_not_repeated_in_the_error(tmp_path):
    assert SECRET not in refusal(tmp_path, minimal(wandb="talks"), wandb__key=SECRET)
    assert SECRET not in refusal(tmp_path, minimal(), wandb__kye=SECRET)


@pytest.mark.parametrize("path", sorted((ROOT / "example").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_decodes(path):
    raw = read_yaml(path)
    given = {"run_dir": raw.get("run_dir"), "data.train_data": (raw.get("data") or {}).get("train_data")}
    args = configuration.load(path, {key: "filled_in" for key, value in given.items() if not value}, args_class)
    assert args.run_dir
    assert args.data.train_data


def test_command_line_text_is_text():
    assert CommandLineText("a") == "a"
