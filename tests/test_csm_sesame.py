"""Sesame's own model, built of torchtune's parts, loads what we write and gives the same logits.

torchtune is no dependency of the project; `pip install torchtune` for this test.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from finetune.families.csm.config import CsmConfig, TransformerConfig
from finetune.families.csm.export import write_sesame
from finetune.families.csm.model import CsmModel
from test_csm_export import TINY, assert_same, logits_of, random_codes


class SesameModel(nn.Module):
    """What SesameAILabs/csm `models.py` builds of torchtune's parts, as far as logits go."""

    def __init__(self, config: CsmConfig):
        super().__init__()
        self.config = config
        self.backbone, self.decoder = torchtune_llama(config.backbone, 64), torchtune_llama(config.decoder, 32)
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


def run_causally(llama: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
    num_positions = x_BTD.shape[1]
    mask_BTT = torch.ones(num_positions, num_positions, dtype=torch.bool).tril().expand(len(x_BTD), -1, -1)
    return llama(x_BTD, mask=mask_BTT, input_pos=torch.arange(num_positions).expand(len(x_BTD), -1))


@pytest.mark.slow
def test_sesames_model_of_torchtune_gives_the_same_logits(tmp_path):
    model = CsmModel(TINY).eval()
    theirs = SesameModel(TINY)
    write_sesame(tmp_path, model.state_dict(), TINY)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    codes_BKT = random_codes()
    with torch.no_grad():
        assert_same(theirs.logits(codes_BKT), logits_of(model, codes_BKT))
