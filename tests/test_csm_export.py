"""What leaves CSM training gives the same numbers in transformers and under peft, and says what the next run needs."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sphn
import torch
from moshi.models import loaders
from safetensors.torch import save_file
from torch import nn

from conftest import CPU, QUICKSTART
from finetune.args import LoraArgs
from finetune.errors import UserError
from finetune.families.base import Adapter
from finetune.families.csm import codec_names
from finetune.families.csm.config import CsmConfig, TransformerConfig
from finetune.families.csm.export import read_adapter, write_adapter, write_sesame, write_transformers
from finetune.families.csm.files import find_companions, find_files, load_mimi, read_state, settle
from finetune.families.csm.model import CsmModel
from finetune.families.csm.places import folder_place
from finetune.families.csm.text import TurnTokenizer
from finetune.lora import add_adapters, merge_into

transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

MIMI, MIMI_CONFIG = QUICKSTART / "tiny_mimi.safetensors", QUICKSTART / "tiny_mimi_config.json"
TINY = CsmConfig(512, 515, 4, TransformerConfig(64, 96, 2, 4, 2), TransformerConfig(32, 64, 2, 4, 2))
AUDIO_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
FRAME = 1920
OWN_TURNS = {"text_template": "<{speaker}> {text}", "bos_token": "<|end_of_text|>", "eos_token": "<|begin_of_text|>"}


@dataclass
class Paths:
    """The part of the configuration that says where files are."""

    path: str | None = None
    hf_repo_id: str | None = None
    mimi_path: str | None = str(MIMI)
    mimi_config_path: str | None = str(MIMI_CONFIG)
    tokenizer_path: str | None = str(QUICKSTART / "tokenizer.json")
    text_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None


@pytest.fixture(scope="module")
def model() -> CsmModel:
    torch.manual_seed(0)
    return CsmModel(TINY).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    """The model in transformers' layout."""
    folder = tmp_path_factory.mktemp("exported")
    companions = find_companions(Paths())
    write_transformers(folder, model.state_dict(), TINY, load_mimi(companions, 4, CPU), companions)
    return folder


@pytest.fixture
def theirs(exported):
    return transformers.CsmForConditionalGeneration.from_pretrained(exported).eval()


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    """Some seconds [1, 1, S] of whole frames."""
    wav_CS, rate = sphn.read(sorted((QUICKSTART / "dialogues" / "audio").glob("*.flac"))[0])
    assert rate == 24_000
    return torch.from_numpy(wav_CS)[None, :1, : 60 * FRAME]


def random_codes(num_frames: int = 12) -> torch.Tensor:
    """Codes [2, 1 + K, T] of audio alone."""
    codes_BKT = torch.randint(0, TINY.audio_vocab_size, (2, 1 + TINY.num_codebooks, num_frames))
    codes_BKT[:, 0] = -1
    return codes_BKT


@torch.no_grad()
def logits_of(model: CsmModel, codes_BKT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first codebook [B, T, V], and of the others at frame 5 [B, K - 1, V]."""
    hidden_BTD = model.hidden_states(codes_BKT, torch.arange(codes_BKT.shape[-1]).expand(len(codes_BKT), -1))
    depth_KBV = model.depth_logits(hidden_BTD[:, 4], codes_BKT[:, 1:-1, 5].T)
    return model.lm_head(hidden_BTD), depth_KBV.transpose(0, 1)


@torch.no_grad()
def their_logits(theirs, codes_BKT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = theirs(input_ids=codes_BKT[:, 1:].transpose(1, 2), output_hidden_states=True)
    frame_BK = codes_BKT[:, 1:, 5]
    shifted_BK = torch.cat([torch.zeros_like(frame_BK[:, :1]), frame_BK[:, :-1]], 1)
    depth = theirs.depth_decoder(input_ids=shifted_BK, backbone_last_hidden_state=out.hidden_states[-1][:, 4])
    return out.logits, depth.logits


def assert_same(ours, expected, tolerance: float = 1e-4) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_equal_states(one, other) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# transformers


def test_transformers_loads_the_folder_with_nothing_missing(exported, model, caplog, recwarn):
    theirs, report = transformers.CsmForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    assert [str(warning.message) for warning in recwarn if "rope" in str(warning.message).lower()] == []
    assert "rope" not in caplog.text.lower()
    assert theirs.generation_config.temperature == theirs.depth_decoder.generation_config.temperature == 0.9
    assert theirs.generation_config.suppress_tokens == [512, 513, 514]
    codes_BKT = random_codes()
    assert_same(their_logits(theirs.eval(), codes_BKT), logits_of(model, codes_BKT))


def turn_codes(tokenizer: TurnTokenizer, speaker: str, text: str, audio_KT: torch.Tensor | None) -> torch.Tensor:
    ids = tokenizer.encode(speaker, text)
    codes_KT = torch.full((1 + TINY.num_codebooks, len(ids)), -1)
    codes_KT[0] = torch.tensor(ids)
    if audio_KT is None:
        return codes_KT
    audio_KT = nn.functional.pad(nn.functional.pad(audio_KT, (0, 1)), (0, 0, 1, 0), value=-1)
    return torch.cat([codes_KT, audio_KT], 1)


def test_the_export_of_csm_1b_has_the_tensors_of_sesames(monkeypatch, tmp_path):
    """sesame/csm-1b holds 538 tensors in transformers' layout, 7.13 GB in float32."""
    saved = {}
    monkeypatch.setattr("finetune.families.csm.export._save", lambda tensors, path: saved.update(tensors))
    with torch.device("meta"):
        state = CsmModel(CsmConfig()).state_dict()
    companions = replace(find_companions(Paths()), mimi_config=codec_names.MIMI_CONFIG)
    mimi = loaders.get_mimi(None, num_codebooks=32)
    write_transformers(tmp_path, state, CsmConfig(), mimi, companions)
    assert len(saved) == 538
    assert round(sum(tensor.nbytes for tensor in saved.values()) / 1e9, 2) == 7.13
    rope = json.loads((tmp_path / "config.json").read_text())["depth_decoder_config"]["rope_scaling"]
    assert (rope["original_max_position_embeddings"], rope["low_freq_factor"]) == (16, 0.001953125)


def test_the_processor_writes_turns_as_training_does(exported, theirs, model, speech):
    """From messages to logits, text and audio: all of the export at once."""
    processor = transformers.AutoProcessor.from_pretrained(exported)
    wav = speech[..., : 12 * FRAME]
    messages = [
        {
            "role": "0",
            "content": [{"type": "text", "text": "Hello there."}, {"type": "audio", "path": wav[0, 0].numpy()}],
        },
        {"role": "1", "content": [{"type": "text", "text": "Good day, it's\nfine: {ok}"}]},
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    companions = find_companions(Paths())
    tokenizer = TurnTokenizer.of(companions.tokenizer_path, companions.settings)
    mimi = load_mimi(companions, 4, CPU)
    with torch.no_grad():
        codes_KT = torch.cat(
            [
                turn_codes(tokenizer, "0", "Hello there.", mimi.encode(wav)[0]),
                turn_codes(tokenizer, "1", "Good day, it's\nfine: {ok}", None),
            ],
            1,
        )
        hidden = model.hidden_states(codes_KT[None], torch.arange(codes_KT.shape[1])[None])
        assert_same([theirs(**inputs).logits], [model.lm_head(hidden)])
    alone = processor("[0]Hello", add_special_tokens=True)["input_ids"]
    assert alone.tolist() == [tokenizer.encode("0", "Hello")]


def test_the_export_speaks(exported, theirs):
    processor = transformers.AutoProcessor.from_pretrained(exported)
    inputs = processor("[0]Hello.", add_special_tokens=True)
    (wav,) = theirs.generate(**inputs, output_audio=True, max_new_tokens=5)
    assert wav.shape[-1] % FRAME == 0
    assert len(wav) > 0


def test_an_export_trains_on_with_nothing_else(exported, model, speech, tmp_path):
    """Codec, tokenizer and processor come from the folder alone, and go on into the next export."""
    paths = Paths(str(exported), mimi_path=None, mimi_config_path=None, tokenizer_path=None)
    files = find_files(paths)
    assert (files.config, files.layout) == (TINY, "transformers")
    assert_equal_states(read_state(files), model.state_dict())
    mimi, original = load_mimi(files, 4, CPU), load_mimi(find_companions(Paths()), 4, CPU)
    with torch.no_grad():
        assert torch.equal(mimi.encode(speech), original.encode(speech))
    write_transformers(tmp_path, read_state(files), files.config, mimi, files)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in exported.iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_is_read(exported, model, tmp_path, dtype):
    theirs = transformers.CsmForConditionalGeneration.from_pretrained(exported, dtype=dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    files = find_files(Paths(str(tmp_path), mimi_path=None, mimi_config_path=None))
    assert files.config == TINY
    assert_equal_states(read_state(files), {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    assert load_mimi(files, 4, CPU).num_codebooks == 4


def test_another_tokenizer_brings_its_ids(exported, tmp_path):
    paths = Paths(str(exported), mimi_path=None, mimi_config_path=None)
    files = find_files(replace(paths, bos_token="<|end_of_text|>", eos_token="<|begin_of_text|>"))
    write_transformers(tmp_path, read_state(files), files.config, load_mimi(files, 4, CPU), files)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / name).read_text())
        assert (written["bos_token_id"], written["pad_token_id"]) == (509, 508)


def edited_tokenizer(folder: Path, change: Callable[[dict], None]) -> Path:
    content = json.loads((QUICKSTART / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def rename_as_llama(content: dict) -> None:
    """Llama 3's tokenizer has no names for audio, but tokens to spare."""
    for one in content["added_tokens"][2:]:
        one["content"] = f"<|reserved_special_token_{one['id'] - 510}|>"


def drop_spare(content: dict) -> None:
    del content["added_tokens"][2:]


@pytest.mark.parametrize(("change", "ids"), [(rename_as_llama, [510, 511]), (drop_spare, [510, 511])])
def test_a_tokenizer_without_audio_gets_it(model, tmp_path, change, ids):
    (tmp_path / "base").mkdir()
    paths = Paths(tokenizer_path=str(edited_tokenizer(tmp_path / "base", change)), **OWN_TURNS)
    companions = find_companions(paths)
    write_transformers(tmp_path, model.state_dict(), TINY, load_mimi(companions, 4, CPU), companions)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config["audio_token_id"], config["audio_eos_token_id"]] == ids
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "text", "text": "Hi"}, {"type": "audio"}]
    text = processor.apply_chat_template([{"role": "5", "content": content}])
    assert text == "<|end_of_text|><5> Hi<|begin_of_text|><|AUDIO|><|audio_eos|>"
    assert processor.tokenizer.convert_tokens_to_ids(["<|AUDIO|>", "<|audio_eos|>"]) == ids


def test_no_room_for_audio_is_said_and_the_model_saved(model, tmp_path, caplog):
    (tmp_path / "base").mkdir()
    companions = find_companions(Paths(tokenizer_path=str(edited_tokenizer(tmp_path / "base", drop_spare))))
    config = replace(TINY, text_vocab_size=510)
    state = CsmModel(config).state_dict()
    write_transformers(tmp_path, state, config, load_mimi(companions, 4, CPU), companions)
    assert "leaves none for <|AUDIO|>" in caplog.text
    assert transformers.CsmForConditionalGeneration.from_pretrained(tmp_path).config.audio_token_id is None


# What a folder hands on


@pytest.mark.parametrize("layout", ["transformers", "sesame"])
def test_an_export_hands_on_how_turns_are_written_and_what_is_set_wins(exported, tmp_path, monkeypatch, layout):
    files = find_files(Paths(str(exported), **OWN_TURNS))
    state, mimi = read_state(files), load_mimi(files, 4, CPU)
    if layout == "sesame":
        write_sesame(tmp_path, state, TINY, files.tokenizer_path, files.settings)
    else:
        write_transformers(tmp_path, state, TINY, mimi, files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    alone = Paths(str(tmp_path), mimi_path=None, mimi_config_path=None, tokenizer_path=None)
    again = find_files(alone)
    assert {key: getattr(again.settings, key) for key in OWN_TURNS} == OWN_TURNS
    assert again.settings.mimi_path == (str(MIMI) if layout == "sesame" else None)
    assert again.mimi_config["quantizer"]["bins"] == 512
    reset = find_files(replace(alone, text_template="[{speaker}]{text}"))
    assert reset.settings == replace(again.settings, text_template="[{speaker}]{text}")
    (tmp_path / "next").mkdir()
    write_transformers(tmp_path / "next", state, TINY, mimi, reset)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "next")
    message = {"role": "5", "content": [{"type": "text", "text": "Hi"}]}
    assert processor.apply_chat_template([message]) == "<|end_of_text|>[5]Hi<|begin_of_text|>"


def test_another_codec_comes_without_the_noted_ones_configuration(exported, model, tmp_path):
    write_sesame(tmp_path, model.state_dict(), TINY, None, find_files(Paths(str(exported))).settings)
    settings = settle(Paths(mimi_path="other.safetensors", mimi_config_path=None), folder_place(tmp_path, "model.path"))
    assert (settings.mimi_path, settings.mimi_config_path) == ("other.safetensors", None)


@pytest.mark.parametrize(
    ("notes", "says"),
    [
        ("[]", "holds no JSON object"),
        ('{"text_template": 3}', "parley.json: text_template: 3 is not a text"),
        ('{"mood": "x"}', "parley.json: mood"),
        ('{"text_template": "{speaker}"}', "must hold {text}"),
    ],
)
def test_broken_notes_are_one_line(model, tmp_path, notes, says):
    write_sesame(tmp_path, model.state_dict(), TINY)
    (tmp_path / "parley.json").write_text(notes)
    with pytest.raises(UserError, match=re.escape(says)):
        find_files(Paths(str(tmp_path)))


# Adapters


def trained_adapter(model: CsmModel, args: LoraArgs, inside: list[str] | None, tables: bool) -> dict[str, torch.Tensor]:
    """What training would hand over: adapters on some parts, with weights that do something, and perhaps tables."""
    copy = CsmModel(TINY)
    copy.load_state_dict(model.state_dict())
    add_adapters(copy, args, None if inside is None else [copy.get_submodule(name) for name in inside])
    tensors = {name: torch.randn_like(p) * 0.1 for name, p in copy.named_parameters() if ".lora_" in name}
    if tables:
        for table in ("embed_text_tokens.weight", AUDIO_TABLE):
            tensors[table] = copy.get_parameter(table).detach() + 0.5 * torch.randn_like(copy.get_parameter(table))
    return tensors


CASES = {
    "all": (LoraArgs(rank=4, alpha=6.0), None, False),
    "decoder": (LoraArgs(rank=4, scaling=2.0, dropout=0.1), ["depth_decoder"], False),
    "backbone": (LoraArgs(rank=2, scaling=1.0), ["backbone_model", "lm_head"], False),
    "rslora": (LoraArgs(rank=8, alpha=8.0, rslora=True), None, False),
    "tables": (LoraArgs(rank=4), None, True),
    "decoder and tables": (LoraArgs(rank=4), ["depth_decoder"], True),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_adapter_and_agrees(exported, theirs, model, tmp_path, case):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    args, inside, tables = CASES[case]
    tensors = trained_adapter(model, args, inside, tables)
    files = find_files(Paths(str(exported)))
    adapter = Adapter(args.rank, args.scaling, args.dropout, args.rslora)
    write_adapter(tmp_path, tensors, adapter, files)
    merged = CsmModel(TINY).eval()
    merged.load_state_dict(model.state_dict())
    merge_into(merged, tensors, args.scaling)
    codes_BKT = random_codes()
    expected = logits_of(merged, codes_BKT)
    assert (expected[1] - logits_of(model, codes_BKT)[1]).abs().max() > 0.05  # the adapter does something

    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert_same(their_logits(adapted.get_base_model(), codes_BKT), expected, 1e-5)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linears if inside is None or name.startswith(tuple(inside))}
    names = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert {name.removesuffix(".lora_A") for name in names} == wanted
    assert_same(their_logits(adapted.merge_and_unload(), codes_BKT), expected, 1e-5)
    assert transformers.AutoProcessor.from_pretrained(tmp_path).audio_token_id == 510
    notes = json.loads((tmp_path / "parley.json").read_text())
    assert (notes["mimi_path"], notes["text_template"]) == (str(MIMI), "[{speaker}]{text}")
    assert notes["tokenizer_path"] == str(QUICKSTART / "tokenizer.json")
    again, read = read_adapter(tmp_path)
    assert again == adapter
    assert_equal_states(read, tensors)


def test_adapters_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="LOHA"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": None}, "r: None of"),
        ({"r": "4"}, "r: '4' of"),
        ({"lora_alpha": "8"}, "lora_alpha: '8' of"),
        ({"lora_dropout": "x"}, "lora_dropout: 'x' of"),
    ],
)
def test_an_adapter_without_its_numbers_is_one_line(tmp_path, change, says):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8} | change))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=says):
        read_adapter(tmp_path)
