"""Sesame's layout and csm-hf's: Sesame's own model loads what we write and gives the same logits.

Its transformers are written out here in plain torch. `pip install torchtune` has the same said by torchtune's too.
"""

import json
import math
import re
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from finetune.errors import UserError
from finetune.families.csm.config import CsmConfig, RopeScaling, TransformerConfig, from_json, to_sesame
from finetune.families.csm.export import write_csm_hf, write_sesame
from finetune.families.csm.files import find_files, open_weights
from finetune.families.csm.model import CsmModel
from test_csm_export import TINY, Paths, assert_same, logits_of, random_codes


@pytest.fixture(scope="module")
def model() -> CsmModel:
    torch.manual_seed(0)
    return CsmModel(TINY).eval()


@pytest.mark.parametrize("layout", ["sesame", "csm_hf", "ckpt"])
def test_rows_of_every_layout(model, tmp_path, layout):
    """A rank reads its rows alone, also where they start inside a head."""
    state = model.state_dict()
    if layout == "csm_hf":
        write_csm_hf(tmp_path, state, TINY)
    else:
        write_sesame(tmp_path, state, TINY)
    if layout == "ckpt":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "ckpt.pt")
        (tmp_path / "model.safetensors").unlink()
    files = find_files(Paths(str(tmp_path)))
    assert (files.config, files.layout) == (TINY, layout.replace("ckpt", "sesame"))
    with ExitStack() as opened:
        weights = open_weights(files, opened)
        assert weights.names == state.keys()
        for name, tensor in state.items():
            for start, stop in [(0, len(tensor)), (3, len(tensor) - 5), (7, 8), (2, 2)]:
                assert torch.equal(weights.read(name, start, stop), tensor[start:stop]), name


def test_csm_1b_has_sesames_own_config(tmp_path):
    write_sesame(tmp_path, {}, CsmConfig())
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "text_vocab_size": 128_256,
        "audio_vocab_size": 2051,
        "audio_num_codebooks": 32,
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
    }


@pytest.mark.parametrize(
    ("flavor", "says"),
    [
        ([1], "backbone_flavor: [1] of config.json is not one of llama-1B"),
        ({"x": 1}, "backbone_flavor: {'x': 1} of config.json is not one of llama-1B"),
        ({"hidden_size": 64}, "config.json lacks intermediate_size"),
        ("llama-3B", "backbone_flavor: 'llama-3B'"),
    ],
)
def test_a_wrong_flavor_is_one_line(flavor, says):
    with pytest.raises(UserError, match=re.escape(says)):
        from_json(to_sesame(CsmConfig()) | {"backbone_flavor": flavor})


def test_tensors_beyond_the_configuration_are_refused(model, tmp_path):
    write_sesame(tmp_path, model.state_dict(), TINY)
    shallow = replace(TINY, backbone=replace(TINY.backbone, num_layers=1))
    (tmp_path / "config.json").write_text(json.dumps(to_sesame(shallow)))
    with ExitStack() as opened, pytest.raises(UserError, match=r"backbone\.layers\.1\.\S+ is of no model .*9 such"):
        open_weights(find_files(Paths(str(tmp_path))), opened)


class Attention(nn.Module):
    """Every key and value head serves several neighbouring query heads; rotary positions turn neighbouring numbers."""

    def __init__(self, sizes: TransformerConfig):
        super().__init__()
        self.head_dim, width = sizes.head_dim, sizes.hidden_size
        self.sharing = sizes.num_heads // sizes.num_kv_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, sizes.num_kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(width, sizes.num_kv_heads * sizes.head_dim, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, turn_TP: torch.Tensor) -> torch.Tensor:
        def heads(projection: nn.Linear) -> torch.Tensor:
            return projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def turned(heads_BHTD: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(heads_BHTD.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn_TP).flatten(-2)

        q, k = turned(heads(self.q_proj)), turned(heads(self.k_proj)).repeat_interleave(self.sharing, 1)
        v = heads(self.v_proj).repeat_interleave(self.sharing, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).float()
        is_future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        said = scores.masked_fill(is_future, -math.inf).softmax(-1) @ v
        return self.output_proj(said.transpose(1, 2).flatten(2))


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.scale


class Layer(nn.Module):
    def __init__(self, sizes: TransformerConfig):
        super().__init__()
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.attn = Attention(sizes)
        self.sa_norm, self.mlp_norm = Norm(width, sizes.norm_eps), Norm(width, sizes.norm_eps)
        shapes = {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x_BTD: torch.Tensor, turn_TP: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(self.sa_norm(x_BTD), turn_TP)
        normed_BTD = self.mlp_norm(x_BTD)
        gated_BTD = F.silu(self.mlp["w1"](normed_BTD)) * self.mlp["w3"](normed_BTD)
        return x_BTD + self.mlp["w2"](gated_BTD)


class PlainLlama(nn.Module):
    """A Llama 3.2 with torchtune's names and order of rows."""

    def __init__(self, sizes: TransformerConfig, max_positions: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = Norm(sizes.hidden_size, sizes.norm_eps)
        self.speeds = rope_speeds(sizes)

    def forward(self, x_BTD: torch.Tensor, *, mask: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        angle_TP = input_pos[0, :, None] * self.speeds
        turn_TP = torch.polar(torch.ones_like(angle_TP), angle_TP)
        for layer in self.layers:
            x_BTD = layer(x_BTD, turn_TP)
        return self.norm(x_BTD)


def rope_speeds(sizes: TransformerConfig) -> torch.Tensor:
    """Llama 3.1's: slow turns 32 times slower, fast ones as they were, and a ramp between."""
    speeds, scaling = [], RopeScaling()
    for index in range(0, sizes.head_dim, 2):
        speed = sizes.rope_base ** (-index / sizes.head_dim)
        turns = scaling.original_context * speed / (2 * math.pi)
        ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(ramp, 0.0), 1.0)
        speeds.append(speed * (kept + (1 - kept) / scaling.factor))
    return torch.tensor(speeds)


def torchtune_llama(sizes: TransformerConfig, max_positions: int) -> nn.Module:
    llama3_2 = pytest.importorskip("torchtune.models.llama3_2", reason="torchtune is not installed")
    llama = llama3_2.llama3_2(
        vocab_size=8,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        embed_dim=sizes.hidden_size,
        max_seq_len=max_positions,
        intermediate_dim=sizes.intermediate_size,
        norm_eps=sizes.norm_eps,
        rope_base=int(sizes.rope_base),
        scale_factor=32,
    )
    llama.tok_embeddings = nn.Identity()
    llama.output = nn.Identity()
    return llama


class SesameModel(nn.Module):
    """What SesameAILabs/csm `models.py` builds of two Llamas, as far as logits go."""

    def __init__(self, config: CsmConfig, llama):
        super().__init__()
        self.config = config
        self.backbone, self.decoder = llama(config.backbone, 64), llama(config.decoder, 32)
        width, depth_width = config.backbone.hidden_size, config.decoder.hidden_size
        self.text_embeddings = nn.Embedding(config.text_vocab_size, width)
        self.audio_embeddings = nn.Embedding(config.audio_vocab_size * config.num_codebooks, width)
        self.projection = nn.Linear(width, depth_width, bias=False)
        self.codebook0_head = nn.Linear(width, config.audio_vocab_size, bias=False)
        self.audio_head = nn.Parameter(torch.empty(config.num_codebooks - 1, depth_width, config.audio_vocab_size))

    def logits(self, codes_BKT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        offsets_K = torch.arange(self.config.num_codebooks) * self.config.audio_vocab_size
        embedded_BTKD = self.audio_embeddings(codes_BKT[:, 1:].transpose(1, 2) + offsets_K)
        hidden_BTD = run_causally(self.backbone, embedded_BTKD.sum(2))
        depth_BKD = torch.cat([hidden_BTD[:, 4:5], embedded_BTKD[:, 5, :-1]], 1)
        out_BKD = run_causally(self.decoder, self.projection(depth_BKD))
        return self.codebook0_head(hidden_BTD), torch.einsum("bkd,kdv->bkv", out_BKD[:, 1:], self.audio_head)


def run_causally(llama: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
    num_positions = x_BTD.shape[1]
    mask_BTT = torch.ones(num_positions, num_positions, dtype=torch.bool).tril().expand(len(x_BTD), -1, -1)
    return llama(x_BTD, mask=mask_BTT, input_pos=torch.arange(num_positions).expand(len(x_BTD), -1))


@pytest.mark.parametrize("llama", [PlainLlama, pytest.param(torchtune_llama, marks=pytest.mark.slow)])
def test_sesames_model_gives_the_same_logits(model, tmp_path, llama):
    theirs = SesameModel(TINY, llama)
    write_sesame(tmp_path, model.state_dict(), TINY)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    codes_BKT = random_codes()
    with torch.no_grad():
        assert_same(theirs.logits(codes_BKT), logits_of(model, codes_BKT))
