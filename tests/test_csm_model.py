"""Logits, losses and layouts of CSM against transformers' own implementation."""

import pytest
import torch

from finetune.errors import UserError
from finetune.families.csm.config import from_transformers
from finetune.families.csm.layouts import from_layout, recognize, to_layout
from finetune.families.csm.model import CsmModel

transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

CODEC = {
    "model_type": "mimi",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_filters": 4,
    "codebook_size": 16,
    "codebook_dim": 8,
    "num_quantizers": 8,
    "head_dim": 8,
    "upsample_groups": 16,
    "vector_quantization_hidden_dimension": 8,
}
SIZES = {
    "tiny": {"num_codebooks": 4, "width": 64, "depth_width": 32, "heads": 4, "kv_heads": 2, "vocabulary": 51},
    "wider": {"num_codebooks": 8, "width": 96, "depth_width": 48, "heads": 6, "kv_heads": 1, "vocabulary": 80},
}


def rope(original: int) -> dict:
    ratios = {"low_freq_factor": original / 8192, "high_freq_factor": original / 2048}
    return {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": original, **ratios}


@pytest.fixture(params=SIZES)
def pair(request):
    """transformers' model with random weights, and ours with the same."""
    size = SIZES[request.param]
    shared = {
        "num_codebooks": size["num_codebooks"],
        "vocab_size": size["vocabulary"],
        "num_hidden_layers": 2,
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "intermediate_size": 96,
    }
    depth = {"hidden_size": size["depth_width"], "backbone_hidden_size": size["width"]}
    theirs = transformers.CsmForConditionalGeneration(
        transformers.CsmConfig(
            **shared,
            hidden_size=size["width"],
            text_vocab_size=100,
            max_position_embeddings=64,
            rope_scaling=rope(32),
            depth_decoder_config={
                **shared,
                **depth,
                "max_position_embeddings": size["num_codebooks"] + 1,
                "rope_scaling": rope(4),
            },
            codec_config=CODEC,
        )
    ).eval()
    config = from_transformers(theirs.config.to_dict())
    ours = CsmModel(config)
    state = from_layout(theirs.state_dict(), "transformers", ours.state_dict(), config)
    ours.load_state_dict(state)
    return ours, theirs


def random_frames(model: CsmModel, batch_size: int = 2, num_frames: int = 20) -> torch.Tensor:
    """Codes [B, 1 + K, T] of audio alone."""
    shape = (batch_size, model.config.num_codebooks, num_frames)
    audio = torch.randint(0, model.config.audio_vocab_size, shape)
    return torch.cat([torch.full((batch_size, 1, num_frames), -1), audio], 1)


def test_logits_equal_transformers(pair):
    ours, theirs = pair
    codes_BKT = random_frames(ours)
    position_BT = torch.arange(codes_BKT.shape[-1]).expand(len(codes_BKT), -1)
    with torch.no_grad():
        hidden_BTD = ours.hidden_states(codes_BKT, position_BT)
        expected = theirs(input_ids=codes_BKT[:, 1:].transpose(1, 2)).logits
        torch.testing.assert_close(ours.lm_head(hidden_BTD), expected, rtol=1e-4, atol=1e-4)
        frame_BK = codes_BKT[:, 1:, 5]
        depth = theirs.depth_decoder(
            input_ids=torch.cat([torch.zeros_like(frame_BK[:, :1]), frame_BK[:, :-1]], 1),
            backbone_last_hidden_state=hidden_BTD[:, 4],
        ).logits
        logits_KNV = ours.depth_logits(hidden_BTD[:, 4], frame_BK.T[:-1])
        torch.testing.assert_close(logits_KNV.transpose(0, 1), depth, rtol=1e-4, atol=1e-4)


def test_losses_equal_transformers(pair):
    ours, theirs = pair
    codes_BKT = random_frames(ours)
    batch_size, _, num_frames = codes_BKT.shape
    position_BT = torch.arange(num_frames).expand(batch_size, -1)
    labels_BTK = codes_BKT[:, 1:].transpose(1, 2).clone()
    labels_BTK[:, 0] = -100  # nothing comes before it
    reference = theirs(input_ids=codes_BKT[:, 1:].transpose(1, 2), labels=labels_BTK)
    rows = torch.arange(batch_size * num_frames).view(batch_size, -1)[:, 1:].flatten()
    nll_BKT = ours(codes_BKT, rows, rows, position_BT)
    semantic, acoustic = nll_BKT[:, 1].sum() / len(rows), nll_BKT[:, 2:].sum() / len(rows)
    torch.testing.assert_close(semantic, reference.backbone_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        acoustic / (ours.config.num_codebooks - 1), reference.depth_decoder_loss, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["transformers", "sesame", "csm_hf"])
def test_every_layout_gives_the_bytes_back(pair, layout):
    ours, _ = pair
    state = ours.state_dict()
    there = to_layout(state, layout, ours.config)
    assert recognize(there) == layout
    back = from_layout(there, layout, state, ours.config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_what_is_no_csm_is_named():
    with pytest.raises(UserError, match="not a CSM"):
        recognize(["model.layers.0.weight"])


def test_chunks_change_nothing(pair, monkeypatch):
    ours, _ = pair
    codes_BKT = random_frames(ours)
    position_BT = torch.arange(codes_BKT.shape[-1]).expand(len(codes_BKT), -1)
    rows = torch.tensor([3, 7, 8, 25, 31])
    whole = ours(codes_BKT, rows, rows[:3], position_BT)
    monkeypatch.setattr("finetune.families.csm.model.MAX_LOGITS", 200)
    monkeypatch.setattr("finetune.segments.MAX_ATTENTION_BATCH", 1)
    torch.testing.assert_close(ours(codes_BKT, rows, rows[:3], position_BT), whole)
    assert (whole[:, 0] == 0).all()
    assert (whole[0, 1] > 0).nonzero().flatten().tolist() == [3, 7, 8]
