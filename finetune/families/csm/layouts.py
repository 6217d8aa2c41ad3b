"""The names and row orders under which CSM's weights are stored: ours (transformers'), Sesame's, csm-hf's.

Sources: transformers `convert_csm.py`, SesameAILabs/csm `models.py`, thomasgauthier/csm-hf `modeling_csm.py`.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Literal

import torch

from finetune.errors import UserError
from finetune.families.csm.config import CsmConfig

Layout = Literal["transformers", "sesame", "csm_hf"]

# Ours → theirs, for what stands outside the layers.
_SESAME_OUTER = {
    "embed_text_tokens.weight": "text_embeddings.weight",
    "backbone_model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
    "backbone_model.norm.weight": "backbone.norm.scale",
    "depth_decoder.model.norm.weight": "decoder.norm.scale",
    "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
    "lm_head.weight": "codebook0_head.weight",
    "depth_decoder.codebooks_head.weight": "audio_head",
}
_CSM_HF_OUTER = _SESAME_OUTER | {
    "backbone_model.norm.weight": "backbone.norm.weight",
    "depth_decoder.model.norm.weight": "decoder.norm.weight",
}
# Inside a layer.
_SESAME_INNER = {
    "self_attn.q_proj.weight": "attn.q_proj.weight",
    "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight",
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
_LAYER = re.compile(r"(?P<owner>backbone_model|depth_decoder\.model)\.layers\.(?P<index>\d+)\.(?P<inner>.*)")
_OWNERS = {"backbone_model": "backbone", "depth_decoder.model": "decoder"}
# transformers stores its codec too, and the audio table a second time where it is not tied.
CODEC_PREFIX = "codec_model."
AUDIO_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
TIED_COPY = "depth_decoder.model.embed_tokens.weight"


def recognize(names: Iterable[str]) -> Layout:
    """Which layout a file's names belong to.

    Raises:
        UserError: none of them.
    """
    present = set(names)
    if "embed_text_tokens.weight" in present:
        return "transformers"
    if "backbone.norm.scale" in present:
        return "sesame"
    if "backbone.norm.weight" in present and "audio_embeddings.weight" in present:
        return "csm_hf"
    example = next(iter(sorted(present)), "nothing")
    raise UserError(f"model: not a CSM: the weights hold {example} and the like; see the layouts in README.md")


def name_in(layout: Layout, name: str, stored: Container[str] | None = None) -> str:
    """What another layout calls a parameter of ours.

    Args:
        stored: the names in a file: transformers keeps the shared audio table under either of its two names.
    """
    if layout == "transformers":
        is_elsewhere = name == AUDIO_TABLE and stored is not None and name not in stored and TIED_COPY in stored
        return TIED_COPY if is_elsewhere else name
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return (_SESAME_OUTER if layout == "sesame" else _CSM_HF_OUTER)[name]
    inner = _SESAME_INNER[layer["inner"]] if layout == "sesame" else layer["inner"]
    return f"{_OWNERS[layer['owner']]}.layers.{layer['index']}.{inner}"


def to_layout(state: Mapping[str, torch.Tensor], layout: Layout, config: CsmConfig) -> dict[str, torch.Tensor]:
    """Our parameters under another layout's names and row orders. Values are moved, never computed with."""
    return {
        name_in(layout, name): _reorder(name, tensor, layout, config, outward=True) for name, tensor in state.items()
    }


def from_layout(
    state: Mapping[str, torch.Tensor], layout: Layout, names: Iterable[str], config: CsmConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `to_layout` for our `names`; a codec beside them is left out.

    Raises:
        UserError: the file lacks a parameter, or the tied audio tables differ.
    """
    tied = state.get(TIED_COPY)
    table = state.get(AUDIO_TABLE)
    if tied is not None and table is not None and not torch.equal(tied, table):
        raise UserError("model: the audio embeddings of backbone and decoder differ; CSM shares one table")
    taken = {}
    for name in names:
        source = name_in(layout, name, state)
        if source not in state:
            raise UserError(f"model: the weights lack {source}; is this the model of its config.json?")
        taken[name] = _reorder(name, state[source], layout, config, outward=False)
    return taken


def rows_in(
    layout: Layout,
    name: str,
    read: Callable[[int, int], torch.Tensor],
    start: int,
    stop: int,
    config: CsmConfig,
) -> torch.Tensor:
    """Rows of a parameter of ours, from a file in another layout.

    Args:
        read: gives rows of the stored tensor.
    """
    if not _is_reordered(name, layout):
        return read(start, stop)
    # Rows move inside their heads, so that whole heads are read.
    height = _head_dim(name, config)
    first = start // height * height
    heads = read(first, -(-stop // height) * height)
    return _reorder(name, heads, layout, config, outward=False)[start - first : stop - first]


def _is_reordered(name: str, layout: Layout) -> bool:
    return layout == "sesame" and name.endswith(("q_proj.weight", "k_proj.weight"))


def _head_dim(name: str, config: CsmConfig) -> int:
    return (config.backbone if name.startswith("backbone") else config.decoder).head_dim


def _reorder(name: str, tensor: torch.Tensor, layout: Layout, config: CsmConfig, *, outward: bool) -> torch.Tensor:
    """Sesame turns neighbouring rows of a query or key head, the others halves of it."""
    if not _is_reordered(name, layout):
        return tensor
    half = _head_dim(name, config) // 2
    pair = (half, 2) if not outward else (2, half)
    return tensor.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2).contiguous()
