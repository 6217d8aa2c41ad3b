"""The sizes of a CSM, and the configuration files that hold them.

Facts: SesameAILabs/csm `models.py` (flavours), transformers `CsmConfig`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from finetune.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions. Only the ratios to `original_context` matter."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class TransformerConfig:
    """One Llama."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


LLAMA_1B = TransformerConfig(2048, 8192, num_layers=16, num_heads=32, num_kv_heads=8)
LLAMA_100M = TransformerConfig(1024, 8192, num_layers=4, num_heads=8, num_kv_heads=2)
FLAVORS = {"llama-1B": LLAMA_1B, "llama-100M": LLAMA_100M}


@dataclass(frozen=True)
class CsmConfig:
    """CSM-1B by default."""

    text_vocab_size: int = 128_256
    audio_vocab_size: int = 2051
    num_codebooks: int = 32
    backbone: TransformerConfig = LLAMA_1B
    decoder: TransformerConfig = LLAMA_100M


def from_sesame(config: dict[str, Any]) -> CsmConfig:
    """Read Sesame's `config.json`, which names flavours; sizes of our own stand under the same keys as mappings.

    Raises:
        UserError: a flavour is unknown.
    """
    return CsmConfig(
        text_vocab_size=config["text_vocab_size"],
        audio_vocab_size=config["audio_vocab_size"],
        num_codebooks=config["audio_num_codebooks"],
        backbone=_flavor(config["backbone_flavor"]),
        decoder=_flavor(config["decoder_flavor"]),
    )


def _flavor(flavor: str | dict[str, Any]) -> TransformerConfig:
    if isinstance(flavor, dict):
        sizes = dict(flavor)
        scaling = sizes.pop("rope_scaling", None)
        return TransformerConfig(**sizes, rope_scaling=RopeScaling(**scaling) if scaling else None)
    if flavor not in FLAVORS:
        raise UserError(f"model: flavour {flavor!r} of config.json is not one of {', '.join(FLAVORS)}")
    return FLAVORS[flavor]


def from_transformers(config: dict[str, Any]) -> CsmConfig:
    """Read the `config.json` of transformers' `CsmForConditionalGeneration`, of version 4 or 5."""
    return CsmConfig(
        text_vocab_size=config["text_vocab_size"],
        audio_vocab_size=config["vocab_size"],
        num_codebooks=config["num_codebooks"],
        backbone=_llama(config),
        decoder=_llama(config["depth_decoder_config"]),
    )


def _llama(config: dict[str, Any]) -> TransformerConfig:
    # transformers 5 keeps all of rope's settings in `rope_parameters`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sizes = TransformerConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        norm_eps=config["rms_norm_eps"],
        rope_base=float(rope.get("rope_theta") or config["rope_theta"]),
    )
    if rope.get("rope_type", "default") == "default":
        return replace(sizes, rope_scaling=None)
    scaling = RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )
    return replace(sizes, rope_scaling=scaling)
