"""The pages people read: the table of keys is the generated one, and what they name exists."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import numpy as np
import pytest
import sphn
from simple_parsing.docstring import get_attribute_docstring

from conftest import ROOT, write_config
from finetune import args as configuration
from finetune.args import TrainArgs
from finetune.data.conversations import ConversationDataset
from finetune.data.types import SAMPLE_RATE_HZ
from finetune.families import FAMILIES, args_class

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "example" / "quickstart" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = "\n".join(TEXT.values())


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


config_table = load_script("config_table")


def all_fields(cls: type, prefix: str = "") -> dict[str, tuple[type, str]]:
    """Class and field name behind every dotted key."""
    found = {}
    for field in fields(cls):
        found[prefix + field.name] = (cls, field.name)
        hint = get_type_hints(cls)[field.name]
        if is_dataclass(hint):
            found |= all_fields(hint, f"{prefix}{field.name}.")
    return found


FIELDS = {name: all_fields(args_class(name), "model.") for name in FAMILIES}
KEYS = {key: owner for owners in [all_fields(TrainArgs), *FIELDS.values()] for key, owner in owners.items()}


def test_the_table_is_the_generated_one():
    current = config_table.replace_between_markers(TEXT[README], config_table.config_tables())
    assert current == TEXT[README], "run: python scripts/config_table.py --write README.md"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_docstring_and_a_row(key):
    cls, name = KEYS[key]
    assert get_attribute_docstring(cls, name).docstring_below, f"{cls.__name__}.{name} has no docstring"
    families_with_it = sum(key in fields for fields in FIELDS.values())
    assert TEXT[README].count(f"\n| `{key}` |") == max(1, families_with_it)


def test_the_table_shows_defaults_and_choices():
    rows = {line.split("`")[1]: line for line in config_table.config_tables().splitlines() if line.startswith("| `")}
    assert "| required |" in rows["run_dir"]
    assert "| `0.0001` |" in rows["optim.lr"]
    assert "| `null` |" in rows["data.eval_data"]
    assert "| `true` |" in rows["do_ckpt"]
    assert "One of `lora`, `full`." in rows["finetuning"]


def test_writing_replaces_only_what_is_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{config_table.BEGIN}\nold\n{config_table.END}\nafter\n")
    config_table.main(["--write", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{config_table.BEGIN}\n")
    assert text.endswith(f"{config_table.END}\nafter\n")
    assert "\nold\n" not in text
    assert config_table.config_tables() in text


@pytest.mark.parametrize("text", ["", "{begin} only", "{end} {begin}", "{begin} {end} {end}"])
def test_a_page_without_markers_is_refused(text):
    with pytest.raises(SystemExit, match="once each"):
        config_table.replace_between_markers(text.format(begin=config_table.BEGIN, end=config_table.END), "")


@pytest.mark.parametrize("module", sorted(set(re.findall(r"-m ([\w.]+)", EVERYTHING)) - {"slow"}))
def test_modules_that_are_run_exist(module):
    ours = ROOT / f"{module.replace('.', '/')}.py"
    assert ours.is_file() or importlib.util.find_spec(module) is not None


def test_the_two_commands_are_there():
    assert "pip install uv && uv run torchrun --nproc-per-node 1 -m train example/quickstart.yaml" in TEXT[README]
    assert "\nuv run pytest\n" in TEXT[README]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:example|scripts|tests)/[\w/]+\.\w+", EVERYTHING))))
def test_files_that_are_named_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("key", sorted(set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)=", TEXT[README]))))
def test_overrides_are_keys(key):
    assert key in KEYS


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT[README], re.DOTALL))
def test_yaml_in_the_readme_decodes(block, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block)
    configuration.load(path, {"run_dir": str(tmp_path)}, args_class)


@pytest.mark.parametrize(
    ("spelling", "finetuning"), [("full_finetuning: true", "full"), ("full_finetuning: false", "lora")]
)
def test_spellings_of_moshi_finetune_in_the_readme_are_accepted(spelling, finetuning, config, tmp_path):
    assert f"`{spelling}`" in TEXT[README]
    key, value = spelling.split(": ")
    args = configuration.load(write_config(tmp_path, config), {key: value}, args_class)
    assert args.finetuning == finetuning


def links(page: Path) -> list[tuple[Path, str]]:
    return [(page, target) for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) if "://" not in target]


@pytest.mark.parametrize(("page", "target"), [link for page in PAGES for link in links(page)])
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    assert linked.exists(), f"{page.name}: {target}"
    if anchor:
        assert anchor in anchors(linked)


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings: lower case, punctuation dropped, a dash for every space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FORMATS = re.findall(
    r"```json\n(.*?)```", TEXT[README].partition("### Data for CSM")[2].partition("### Packing")[0], re.DOTALL
)


@pytest.mark.parametrize("example", FORMATS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_the_data_shown_for_csm_is_read(example, ending, tmp_path):
    """Each example, saved as it stands, names conversations that can be trained on."""
    noise_CS = 0.1 * np.random.default_rng(0).standard_normal((2, 15 * SAMPLE_RATE_HZ), dtype=np.float32)
    for name in re.findall(r"[\w.]+\.(?:wav|flac)", example):
        sphn.write_wav(str(tmp_path / name), noise_CS, SAMPLE_RATE_HZ)
    (tmp_path / f"data.{ending}").write_text(example)
    dataset = ConversationDataset.open(
        str(tmp_path / f"data.{ending}"),
        "data.train_data",
        max_frames=2048,
        context_turns=0,
        mask_speaker_ids=[],
        max_audio_sec=None,
        count_text=lambda speaker, text: len(text),
        frame_sec=0.08,
        on_error="fail",
        num_workers=1,
    )
    turns = [turn for windows in dataset.windows for window in windows for turn in dataset.read(window).turns]
    assert len(turns) == 2
    assert [turn.speaker for turn in turns] == ["0", "1"]
    assert turns[-1].is_trained


def test_there_are_examples_of_csms_data():
    assert len(FORMATS) == 4
