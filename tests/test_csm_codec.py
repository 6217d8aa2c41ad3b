"""Mimi in transformers' names: the same codes and waveforms as moshi's, and the same bytes back."""

import json

import pytest
import sphn
import torch
from moshi.models import loaders
from moshi.modules.transformer import set_attention_context
from safetensors.torch import save_file

from conftest import CPU, QUICKSTART
from finetune.errors import UserError
from finetune.families.csm import codec_names
from finetune.families.csm.files import find_companions, load_mimi
from test_csm_export import FRAME, MIMI, MIMI_CONFIG, Paths, assert_equal_states

transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

IS_VERSION_4 = transformers.__version__.startswith("4.")


def codec_of(which: str) -> tuple[dict, loaders.MimiModel]:
    if which == "tiny":
        config = json.loads(MIMI_CONFIG.read_text())
        return config, loaders.get_mimi(MIMI, config, num_codebooks=16)
    return codec_names.MIMI_CONFIG, loaders.get_mimi(None, num_codebooks=32)


@pytest.mark.parametrize("which", ["tiny", "kyutai"])
def test_the_codec_has_their_names_and_comes_back_whole(which):
    config, mimi = codec_of(which)
    state, num_heads = mimi.state_dict(), config["transformer"]["num_heads"]
    for tensor in state.values():
        tensor.normal_()
    codec_config = codec_names.to_codec_config(config, mimi.num_codebooks)
    there = codec_names.to_transformers(state, num_heads, mimi.num_codebooks)
    with torch.device("meta"):
        theirs = transformers.MimiModel(transformers.MimiConfig.from_dict(codec_config)).state_dict()
    if IS_VERSION_4:  # version 5 renames while it loads
        assert {name: tensor.shape for name, tensor in there.items()} == {n: t.shape for n, t in theirs.items()}
    assert_equal_states(codec_names.from_transformers(there, state, num_heads), state)
    assert codec_names.from_codec_config(codec_config) == config


def test_the_default_codec_is_transformers_own():
    written = codec_names.to_codec_config(codec_names.MIMI_CONFIG, 32)
    default = transformers.MimiConfig().to_dict()
    common = written.keys() & default.keys() - {"architectures"}
    assert len(common) >= 28
    assert {key: written[key] for key in common} == {key: default[key] for key in common}


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    """Some seconds [1, 1, S] of whole frames."""
    wav_CS, rate = sphn.read(sorted((QUICKSTART / "dialogues" / "audio").glob("*.flac"))[0])
    assert rate == 24_000
    return torch.from_numpy(wav_CS)[None, :1, : 60 * FRAME]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model of the tiny codec with all its codebooks."""
    folder = tmp_path_factory.mktemp("codec")
    config, mimi = codec_of("tiny")
    there = codec_names.to_transformers(mimi.state_dict(), config["transformer"]["num_heads"], 16)
    save_file(there, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(codec_names.to_codec_config(config, 16)))
    return transformers.MimiModel.from_pretrained(folder).eval()


def test_codes_and_waveforms_equal_moshis(theirs, speech):
    _, mimi = codec_of("tiny")
    if IS_VERSION_4:
        # Version 4 masks nothing but the future; moshi and version 5 look back over 32 positions, 16 frames.
        set_attention_context(mimi, None)
    with torch.no_grad():
        codes_BKT = mimi.encode(speech)
        their_codes_BKT = theirs.encode(speech).audio_codes
        wav, their_wav = mimi.decode(codes_BKT), theirs.decode(codes_BKT).audio_values
    assert len(codes_BKT.unique()) > 100
    assert (codes_BKT == their_codes_BKT).float().mean() > 0.999
    torch.testing.assert_close(wav, their_wav, rtol=1e-5, atol=1e-5)


def test_within_the_window_nothing_differs(theirs, speech):
    _, mimi = codec_of("tiny")
    with torch.no_grad():
        codes_BKT, their_codes_BKT = mimi.encode(speech), theirs.encode(speech).audio_codes
    assert torch.equal(codes_BKT[..., :16], their_codes_BKT[..., :16])


def test_codecs_that_transformers_lacks_are_refused():
    config = json.loads(MIMI_CONFIG.read_text())
    config["transformer"]["gating"] = "silu"
    with pytest.raises(UserError, match=r"transformer\.gating: silu.*export_layout"):
        codec_names.to_codec_config(config, 4)


@pytest.mark.parametrize(
    ("changes", "num_codebooks", "says"),
    [
        ({"mimi_config_path": None}, 4, "not the codec its config describes"),
        ({}, 17, "16 codebooks, the model has 17"),
        ({"mimi_config_path": str(QUICKSTART / "tokenizer.json")}, 4, "lacks channels"),
    ],
)
def test_codecs_that_do_not_fit_are_refused(changes, num_codebooks, says):
    with pytest.raises(UserError, match=says):
        load_mimi(find_companions(Paths(**changes)), num_codebooks, CPU)
