"""`scripts/convert_csm.py` between any two layouts, and CSM's files from folders and from a hub of our own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

import convert_csm
from conftest import QUICKSTART, ROOT
from fake_hub import serve
from finetune.families.csm.files import TOKENIZER_REPO, find_checkpoint, find_files, load_mimi, read_state
from test_csm_export import assert_equal_states, assert_same, their_logits
from test_csm_model import CODEC, SIZES, rope

transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

LAYOUTS = ["transformers", "sesame", "csm_hf"]
TOKENIZER = ["--tokenizer", str(QUICKSTART / "tokenizer.json")]


def random_model(size: str):
    """A model of transformers' own making."""
    sizes = SIZES[size]
    shared = {
        "num_codebooks": sizes["num_codebooks"],
        "vocab_size": sizes["vocabulary"],
        "num_hidden_layers": 2,
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "intermediate_size": 96,
    }
    depth = {"hidden_size": sizes["depth_width"], "backbone_hidden_size": sizes["width"]}
    positions = {"max_position_embeddings": sizes["num_codebooks"] + 1, "rope_scaling": rope(4)}
    config = transformers.CsmConfig(
        **shared,
        hidden_size=sizes["width"],
        text_vocab_size=512,
        rope_scaling=rope(1024),
        depth_decoder_config={**shared, **depth, **positions},
        codec_config=CODEC,
    )
    return transformers.CsmForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=SIZES)
def original(request, tmp_path_factory) -> Path:
    """The folder that transformers writes of a random model, in bfloat16 where it is wider."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    dtype = torch.bfloat16 if request.param == "wider" else torch.float32
    random_model(request.param).to(dtype).save_pretrained(folder)
    return folder


def run(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_csm.py", *map(str, arguments)])
    return convert_csm.main()


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(find_checkpoint(convert_csm.Source(None, str(folder))))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_any_layout_to_any_other_and_back(original, tmp_path, monkeypatch, first, second):
    """The bytes stay, and transformers' logits with them."""
    codec = ["--mimi-config", str(tmp_path / "codec.json"), "--mimi", str(tmp_path / "codec.safetensors")]
    write_codec_of(original, tmp_path)
    steps = [original, *(tmp_path / name for name in ("a", "b", "c", "back"))]
    for before, after, layout in zip(steps, steps[1:], [first, second, first, "transformers"], strict=False):
        options = [*TOKENIZER, *codec] if layout == "transformers" else []
        assert run(monkeypatch, before, "--to", layout, "--output", after, *options) == 0
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "c"))
    assert_equal_states(a, c)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "c/config.json").read_text())
    assert_equal_states(state_of(original), state_of(tmp_path / "back"))
    size = transformers.CsmConfig.from_pretrained(original)
    codes_BKT = torch.randint(0, size.vocab_size, (2, 1 + size.num_codebooks, 12))
    before, after = (
        transformers.CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (original, tmp_path / "back")
    )
    assert_same(their_logits(after, codes_BKT), their_logits(before, codes_BKT), 1e-6)


def write_codec_of(original: Path, folder: Path) -> None:
    """The codec in moshi's layout, as a file of its own."""

    files = find_files(convert_csm.Source(None, str(original), tokenizer_path=TOKENIZER[1]))
    mimi = load_mimi(files, files.config.num_codebooks, torch.device("cpu"))
    save_file(mimi.state_dict(), folder / "codec.safetensors")
    (folder / "codec.json").write_text(json.dumps(files.mimi_config))


def test_the_codec_goes_along(original, tmp_path, monkeypatch):
    assert run(monkeypatch, original, "--to", "transformers", "--output", tmp_path, *TOKENIZER) == 0
    num_codebooks = json.loads((original / "config.json").read_text())["num_codebooks"]
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path))
    beyond = [f"acoustic_residual_vector_quantizer.layers.{index}." for index in range(num_codebooks - 1, 7)]
    kept = {
        name: tensor.float()
        for name, tensor in before.items()
        if name.startswith("codec_model") and not any(part in name for part in beyond)
    }
    assert_equal_states(kept, {name: tensor for name, tensor in after.items() if name.startswith("codec_model")})


def test_types(original, tmp_path, monkeypatch):
    assert run(monkeypatch, original, "--to", "sesame", "--output", tmp_path, "--dtype", "bfloat16") == 0
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in state_of(original).items()}
    assert_equal_states(state_of(tmp_path), expected)


def test_one_weights_file_is_enough_of_a_source(original, tmp_path, monkeypatch):
    file = original / "model.safetensors"
    assert run(monkeypatch, file, "--to", "csm_hf", "--output", tmp_path) == 0
    assert_equal_states(state_of(tmp_path), state_of(original))


def break_nothing(folder: Path) -> None: ...


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_to(key: str, value: object) -> Callable[[Path], None]:
    """Write a value, null included, into config.json."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return damage


def drop_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["num_codebooks"]
    (folder / "config.json").write_text(json.dumps(config))


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def another_model(folder: Path) -> None:
    save_file({"model.layers.0.weight": torch.zeros(1)}, folder / "model.safetensors")


def code_in_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": Path("/")}, folder / "ckpt.pt")


@pytest.mark.parametrize(
    ("damage", "options", "says"),
    [
        (break_nothing, ["--mimi", "nothing.safetensors"], "--mimi: nothing.safetensors: no such file"),
        (break_nothing, ["--tokenizer", "nothing.json"], "--tokenizer: nothing.json: no such file"),
        (break_nothing, ["--tokenizer", "hf://someone"], "write hf://owner/repo/file"),
        (break_nothing, ["--mimi", str(QUICKSTART / "tiny_mimi.safetensors")], "the codec has 2048 entries"),
        (write("config.json", "{"), [], "config.json: cannot be read as JSON"),
        (drop("config.json"), [], "no config.json in it"),
        (write("config.json", "{}"), [], "has none of depth_decoder_config"),
        (drop_a_key, [], "lacks num_codebooks"),
        (set_to("intermediate_size", 32), [], "by config.json [32,"),
        (set_to("num_hidden_layers", 1), [], "backbone_model.layers.1.input_layernorm.weight is of no model"),
        (set_to("hidden_size", "abc"), [], "hidden_size: 'abc' of config.json is not a whole number"),
        (set_to("hidden_size", None), [], "hidden_size: None of config.json is not a whole number"),
        (set_to("num_attention_heads", 0), [], "num_attention_heads: 0 of config.json is not a whole number"),
        (set_to("num_attention_heads", 5), [], "with 5 heads over 2 is no transformer of CSM's"),
        (set_to("rms_norm_eps", "x"), [], "rms_norm_eps: 'x' of config.json is not a number"),
        (set_to("depth_decoder_config", None), [], "depth_decoder_config: None of config.json is not a section"),
        (set_to("rope_scaling", "x"), [], "rope_scaling: 'x' of config.json is not a section"),
        (set_to("transformers_weights", 3), [], "transformers_weights: 3 of config.json names no file"),
        (write("model.safetensors.index.json", '{"weight_map": ["a"]}'), [], "weight_map names no files"),
        (break_nothing, ["--text-template", "{speaker}"], "--text-template: '{speaker}' must hold {text}"),
        (break_nothing, ["--text-template", "{text!x}"], "--text-template: '{text!x}' must hold plain {text}"),
        (break_nothing, ["--bos-token", "<s>"], "--bos-token: '<s>' is not a token of"),
        (break_nothing, ["--eos-token", "<s>"], "--eos-token: '<s>' is not a token of"),
        (write("model.safetensors", "no tensors"), [], "not a safetensors file"),
        (drop_a_tensor, [], "lack lm_head.weight"),
        (another_model, [], "not a CSM"),
        (code_in_a_pickle, [], "not a file of plain tensors"),
        (drop("model.safetensors"), [], "no model.safetensors in it"),
    ],
)
def test_an_error_is_one_line(tmp_path, monkeypatch, capsys, exported_tiny, damage, options, says):
    source = tmp_path / "source"
    source.mkdir()
    for path in exported_tiny.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    damage(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, source, "--to", "transformers", "--output", tmp_path / "there", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "there" / "config.json").exists()


@pytest.mark.parametrize("layout", ["sesame", "csm_hf"])
def test_tokens_are_checked_wherever_a_tokenizer_is_written(exported_tiny, tmp_path, monkeypatch, capsys, layout):
    options = ["--to", layout, "--output", tmp_path / "there"]
    assert run(monkeypatch, exported_tiny, *options, "--bos-token", "<s>") == 2
    assert "--bos-token: '<s>' is not a token of" in capsys.readouterr().err
    assert run(monkeypatch, exported_tiny, *options, "--text-template", "{speaker}: {text}") == 0
    assert json.loads((tmp_path / "there" / "parley.json").read_text())["text_template"] == "{speaker}: {text}"


def test_an_output_must_be_a_folder(exported_tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(monkeypatch, exported_tiny, "--to", "sesame", "--output", output) == 2
        assert "file is a file; give a folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported_tiny(tmp_path_factory) -> Path:
    """A folder in transformers' layout with everything in it."""
    torch.manual_seed(0)
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("whole")
    random_model("tiny").save_pretrained(raw)
    source = convert_csm.Source(None, str(raw), tokenizer_path=TOKENIZER[1])
    convert_csm.convert(source, "transformers", folder, None)
    return folder


def test_the_source_is_never_written_over(original, monkeypatch, capsys):
    for source in (original, original / "model.safetensors"):
        assert run(monkeypatch, source, "--to", "sesame", "--output", original) == 2
        assert "is the source itself" in capsys.readouterr().err


# The hub

REFUSALS = {"someone/gated": (403, "GatedRepo"), TOKENIZER_REPO: (403, "GatedRepo"), "someone/closed": (403, None)}
FIND = """
import json, sys
from convert_csm import Source
from finetune.errors import UserError
from finetune.families.csm.files import find_files
for case in json.loads(sys.argv[1]):
    try:
        files = find_files(Source(path=None, **case))
        beside = sorted(path.name for path in files.tokenizer_path.parent.iterdir())
        print(json.dumps([files.layout, files.place.address, str(files.mimi_weights[0].name), beside]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path, exported_tiny):
    """Repositories as sesame/csm-1b (two layouts side by side), an old one without tokenizer, and Kyutai's codec."""
    both, old, codec = (tmp_path / name for name in ("both", "old", "codec"))
    for folder in (both, old, codec):
        folder.mkdir()
    for path in exported_tiny.iterdir():
        (both / path.name.replace("model.safetensors", "transformers.safetensors")).write_bytes(path.read_bytes())
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps(config | {"transformers_weights": "transformers.safetensors"}))
    convert_csm.convert(convert_csm.Source(None, str(exported_tiny)), "sesame", old, None)
    (both / "model.safetensors").write_bytes((old / "model.safetensors").read_bytes())
    for path in old.glob("*token*"):
        path.unlink()
    (codec / loaders.MIMI_NAME).write_bytes((QUICKSTART / "tiny_mimi.safetensors").read_bytes())
    yield from serve({"someone/csm": both, "someone/old": old, loaders.DEFAULT_REPO: codec}, REFUSALS)


def find(endpoint: str, home: Path, *cases: dict, **environment: str) -> list:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    result = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(cases)],
        env=os.environ | settings | paths,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_files_come_from_the_hub_and_refusals_say_what_to_do(hub, tmp_path):
    config, tokenizer = str(QUICKSTART / "tiny_mimi_config.json"), TOKENIZER[1]
    whole, no_tokenizer, kyutais, no_access, closed, unknown, no_name = find(
        hub,
        tmp_path / "home",
        {"hf_repo_id": "someone/csm"},
        {"hf_repo_id": "someone/old", "mimi_path": str(QUICKSTART / "tiny_mimi.safetensors")},
        {"hf_repo_id": "someone/csm", "mimi_path": f"hf://{loaders.DEFAULT_REPO}/{loaders.MIMI_NAME}"},
        {"hf_repo_id": "someone/gated"},
        {"hf_repo_id": "someone/closed"},
        {"hf_repo_id": "someone/nothing"},
        {"hf_repo_id": "not a repo id"},
    )
    layout, address, codec, beside = whole
    assert (layout, address, codec) == ("transformers", "someone/csm", "transformers.safetensors")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"} <= {*beside}
    page = f"https://huggingface.co/{TOKENIZER_REPO}"
    assert no_tokenizer.startswith("model.tokenizer_path: ")
    assert page in no_tokenizer
    assert "hf auth login" in no_tokenizer
    assert "the codec has 2048 entries" in kyutais  # found, and found not to fit
    for line, repo in ((no_access, "someone/gated"), (closed, "someone/closed")):
        assert line.startswith(f"model.hf_repo_id: {repo}: ")
        assert f"https://huggingface.co/{repo} and run `hf auth login`" in line
    assert "check the name" in unknown
    assert "model.path" in no_name
    assert not any("\n" in line for line in (no_tokenizer, kyutais, no_access, closed, unknown, no_name))
    old = {"hf_repo_id": "someone/old", "tokenizer_path": tokenizer, "mimi_config_path": config}
    cached, offline, uncached = find(
        "http://127.0.0.1:9",
        tmp_path / "home",
        {"hf_repo_id": "someone/csm"},
        old | {"hf_repo_id": "someone/else"},
        old | {"mimi_path": "hf://someone/codec/mimi.safetensors"},
        HF_HUB_OFFLINE="1",
    )
    assert cached[0] == "transformers"
    assert "model.safetensors is not cached" in offline
    assert uncached.startswith("model.mimi_path: someone/codec: ")


def test_every_option_has_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in [*LAYOUTS, "--mimi", "--tokenizer", "--dtype", "hub repository"])
