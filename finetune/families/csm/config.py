"""The sizes of a CSM, and the configuration files that hold them.

Facts: SesameAILabs/csm `models.py` (flavours), transformers `CsmConfig`, thomasgauthier/csm-hf `modeling_csm.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from finetune.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions. Only the ratios to `original_context` matter."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def restated(self, original_context: int) -> "RopeScaling":
        """The same stretching, said of another original context."""
        ratio = original_context / self.original_context
        return RopeScaling(self.factor, self.low_freq_factor * ratio, self.high_freq_factor * ratio, original_context)


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


# Positions of the backbone that CSM-1B was trained on (SesameAILabs/csm `models.py`).
MAX_POSITIONS = 2048


def from_json(config: dict[str, Any]) -> CsmConfig:
    """Read a `config.json` of any of the three projects, told apart by content.

    Raises:
        UserError: it is none of theirs, lacks something, or describes a model that CSM is not.
    """
    readers: dict[str, Callable[[dict[str, Any]], CsmConfig]] = {
        "depth_decoder_config": from_transformers,
        "backbone_config": from_csm_hf,
        "backbone_flavor": from_sesame,
    }
    for key, read in readers.items():
        if key in config:
            try:
                return read(config)
            except KeyError as error:
                raise UserError(f"model: config.json lacks {error.args[0]}; take the one of the weights") from error
    raise UserError(f"model: config.json has none of {', '.join(readers)}; give a CSM's")


def from_sesame(config: dict[str, Any]) -> CsmConfig:
    """Read Sesame's `config.json`, which names flavours; sizes of our own stand under the same keys as mappings.

    Raises:
        UserError: a flavour is unknown.
    """
    return CsmConfig(
        text_vocab_size=_count(config, "text_vocab_size"),
        audio_vocab_size=_count(config, "audio_vocab_size"),
        num_codebooks=_count(config, "audio_num_codebooks"),
        backbone=_flavor(config, "backbone_flavor"),
        decoder=_flavor(config, "decoder_flavor"),
    )


def to_sesame(config: CsmConfig) -> dict[str, Any]:
    """The inverse of `from_sesame`."""
    return {
        "text_vocab_size": config.text_vocab_size,
        "audio_vocab_size": config.audio_vocab_size,
        "audio_num_codebooks": config.num_codebooks,
        "backbone_flavor": _flavor_name(config.backbone),
        "decoder_flavor": _flavor_name(config.decoder),
    }


def _flavor(config: Mapping[str, Any], key: str) -> TransformerConfig:
    flavor = config[key]
    if isinstance(flavor, str) and flavor in FLAVORS:
        return FLAVORS[flavor]
    known = [field.name for field in fields(TransformerConfig)]
    if not isinstance(flavor, dict) or not flavor.keys() <= set(known):
        said = f"model: {key}: {flavor!r:.60} of config.json is not one of {', '.join(FLAVORS)}"
        raise UserError(f"{said}, nor sizes ({', '.join(known)}); take the config.json of the weights")
    sizes: dict[str, Any] = {name: _count(flavor, name) for name in known[:5]}
    sizes |= {name: _number(flavor, name) for name in ("norm_eps", "rope_base") if name in flavor}
    transformer = TransformerConfig(**sizes, rope_scaling=None)
    _refuse_uneven_heads(transformer)
    if not flavor.get("rope_scaling"):
        return transformer
    return replace(transformer, rope_scaling=_scaling(_section(flavor, "rope_scaling"), "original_context"))


def _flavor_name(sizes: TransformerConfig) -> str | dict[str, Any]:
    return next((name for name, known in FLAVORS.items() if known == sizes), asdict(sizes))


def from_csm_hf(config: dict[str, Any]) -> CsmConfig:
    """Read csm-hf's `config.json`, which holds two of transformers' `LlamaConfig`."""
    return CsmConfig(
        text_vocab_size=_count(config, "text_vocab_size"),
        audio_vocab_size=_count(config, "audio_vocab_size"),
        num_codebooks=_count(config, "audio_num_codebooks"),
        backbone=_from_llama(_section(config, "backbone_config")),
        decoder=_from_llama(_section(config, "decoder_config")),
    )


def to_csm_hf(config: CsmConfig) -> dict[str, Any]:
    """The inverse of `from_csm_hf`, as csm-hf's `CSMConfig` reads it."""
    llama = {"model_type": "llama", "vocab_size": config.text_vocab_size}
    return {
        "architectures": ["CSMModel"],
        "model_type": "csm",
        "text_vocab_size": config.text_vocab_size,
        "audio_vocab_size": config.audio_vocab_size,
        "audio_num_codebooks": config.num_codebooks,
        "max_seq_len": MAX_POSITIONS,
        "backbone_config": llama | _to_llama(config.backbone, MAX_POSITIONS),
        "decoder_config": llama | _to_llama(config.decoder, config.num_codebooks),
    }


def from_transformers(config: dict[str, Any]) -> CsmConfig:
    """Read the `config.json` of transformers' `CsmForConditionalGeneration`, of version 4 or 5."""
    if not config.get("tie_codebooks_embeddings", True):
        raise UserError("model: tie_codebooks_embeddings: false; CSM shares one table of audio embeddings")
    return CsmConfig(
        text_vocab_size=_count(config, "text_vocab_size"),
        audio_vocab_size=_count(config, "vocab_size"),
        num_codebooks=_count(config, "num_codebooks"),
        backbone=_from_llama(config),
        decoder=_from_llama(_section(config, "depth_decoder_config")),
    )


def to_transformers(config: CsmConfig) -> dict[str, Any]:
    """The inverse of `from_transformers`; whoever writes the file adds the codec and the ids of the tokenizer."""
    shared = {"num_codebooks": config.num_codebooks, "vocab_size": config.audio_vocab_size}
    depth = _to_llama(config.decoder, config.num_codebooks + 1)
    return {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        **shared,
        **_to_llama(config.backbone, MAX_POSITIONS),
        "text_vocab_size": config.text_vocab_size,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "tie_codebooks_embeddings": True,
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model",
            **shared,
            **depth,
            "backbone_hidden_size": config.backbone.hidden_size,
        },
    }


def _from_llama(config: Mapping[str, Any]) -> TransformerConfig:
    sizes = TransformerConfig(
        hidden_size=_count(config, "hidden_size"),
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=_count(config, "num_attention_heads"),
        num_kv_heads=_count(config, "num_key_value_heads"),
        norm_eps=_number(config, "rms_norm_eps"),
        rope_scaling=None,
    )
    _refuse_uneven_heads(sizes)
    _refuse_what_csm_lacks(config, sizes)
    # transformers 5 keeps all of rope's settings in `rope_parameters`.
    key = next((key for key in ("rope_parameters", "rope_scaling") if config.get(key)), None)
    rope = _section(config, key) if key else {}
    sizes = replace(sizes, rope_base=float(_number(rope if rope.get("rope_theta") else config, "rope_theta")))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return sizes
    if kind != "llama3":
        raise UserError(f"model: rope_type: {kind} of config.json is not CSM's llama3")
    scaling = _scaling(rope, "original_max_position_embeddings")
    # One spelling for all that means the same, so that flavours are recognised.
    return replace(sizes, rope_scaling=scaling.restated(RopeScaling.original_context))


def _scaling(rope: Mapping[str, Any], context_key: str) -> RopeScaling:
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    return RopeScaling(_number(rope, "factor"), low, high, _count(rope, context_key))


def _count(config: Mapping[str, Any], key: str) -> int:
    if type(config[key]) is not int or config[key] < 1:
        raise _mismatch(config, key, "a whole number of 1 or more")
    return config[key]


def _number(config: Mapping[str, Any], key: str) -> float:
    if type(config[key]) not in (int, float) or not 0 < config[key] < math.inf:
        raise _mismatch(config, key, "a number above 0")
    return config[key]


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(config[key], dict):
        raise _mismatch(config, key, "a section")
    return config[key]


def _mismatch(config: Mapping[str, Any], key: str, wanted: str) -> UserError:
    return UserError(f"model: {key}: {config[key]!r:.60} of config.json is not {wanted}; take the one of the weights")


def _refuse_uneven_heads(sizes: TransformerConfig) -> None:
    if sizes.hidden_size % (2 * sizes.num_heads) or sizes.num_heads % sizes.num_kv_heads:
        said = f"{sizes.hidden_size} wide with {sizes.num_heads} heads over {sizes.num_kv_heads}"
        raise UserError(f"model: config.json: {said} is no transformer of CSM's; take the config.json of the weights")


def _refuse_what_csm_lacks(config: Mapping[str, Any], sizes: TransformerConfig) -> None:
    wanted = {"head_dim": sizes.head_dim, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise UserError(f"model: {key}: {config[key]} of config.json is not CSM's; it must be {value}")


def _to_llama(sizes: TransformerConfig, max_positions: int) -> dict[str, Any]:
    written: dict[str, Any] = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_eps,
        "max_position_embeddings": max_positions,
        "rope_theta": sizes.rope_base,
        "rope_scaling": None,
    }
    if sizes.rope_scaling is not None:
        # transformers warns unless the original context is below the one in use. Powers of two keep it exact.
        scaling = sizes.rope_scaling.restated(1 << ((max_positions // 2).bit_length() - 1))
        written["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return written
