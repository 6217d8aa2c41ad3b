"""Mimi in two libraries: the names, row orders and configurations of moshi and of transformers.

Sources: moshi 0.2.13 `models/loaders.py` and `quantization/`, transformers `MimiConfig` and `MimiModel`.

moshi turns neighbouring numbers of a query or key (rotary positions), transformers turns halves; moshi keeps query, key
and value in one matrix. Everything else differs in name alone.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from moshi.models import loaders

from finetune.errors import UserError

MIMI_CONFIG: dict[str, Any] = loaders._mimi_config
"""Kyutai's Mimi, in moshi's spelling."""

# moshi's name → transformers', piece by piece.
_PIECES = [
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"^(encoder|decoder)_transformer\.transformer\.", r"\1_transformer."),
    (r"\.(conv\.conv\.conv|conv\.conv|convtr\.convtr\.convtr|convtr\.convtr)\.(weight|bias)$", r".conv.\2"),
    (r"\.self_attn\.out_projs\.0\.", ".self_attn.o_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"^quantizer\.rvq_first\.", "quantizer.semantic_residual_vector_quantizer."),
    (r"^quantizer\.rvq_rest\.", "quantizer.acoustic_residual_vector_quantizer."),
    (r"\.vq\.layers\.(\d+)\._codebook\.", r".layers.\1.codebook."),
    (r"\.codebook\._initialized$", ".codebook.initialized"),
    (r"\.codebook\.embedding_sum$", ".codebook.embed_sum"),
]
_PACKED = re.compile(r"(?P<attention>.*\.self_attn)\.in_projs\.0\.weight")
_ACOUSTIC = re.compile(r"quantizer\.rvq_rest\.vq\.layers\.(?P<index>\d+)\..*")
# What moshi can build and transformers' MimiModel cannot.
_FIXED = {
    "seanet": {"activation": "ELU", "norm": "none", "causal": True},
    "transformer": {"causal": True, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope"},
}


def their_names(name: str) -> list[str]:
    """What transformers' `MimiModel` calls a tensor of moshi's: three names where moshi packs three matrices."""
    packed = _PACKED.fullmatch(name)
    inner = [f"{packed['attention']}.{part}_proj.weight" for part in "qkv"] if packed else [name]
    return [_renamed(one) for one in inner]


def _renamed(name: str) -> str:
    for pattern, replacement in _PIECES:
        name = re.sub(pattern, replacement, name)
    return name


def to_transformers(state: Mapping[str, torch.Tensor], num_heads: int, num_codebooks: int) -> dict[str, torch.Tensor]:
    """moshi's Mimi under transformers' names, with its first codebooks alone; values are moved, never computed with.

    Args:
        state: of moshi's `MimiModel`, in any type.
        num_heads: of its transformers.
    """
    there: dict[str, torch.Tensor] = {}
    for name in _kept(state, num_codebooks):
        names, tensor = their_names(name), state[name]
        parts = tensor.chunk(len(names))
        if len(names) == 3:
            parts = (_turning(parts[0], num_heads, "halves"), _turning(parts[1], num_heads, "halves"), parts[2])
        there.update(zip(names, (part.contiguous() for part in parts), strict=True))
    return there


def from_transformers(
    state: Mapping[str, torch.Tensor], names: Iterable[str], num_heads: int
) -> dict[str, torch.Tensor]:
    """The inverse of `to_transformers` for moshi's `names`.

    Raises:
        UserError: a tensor is missing.
    """
    here = {}
    for name in names:
        parts = []
        for there in their_names(name):
            if there not in state:
                raise UserError(f"model: the codec of the weights lacks {there}; set model.mimi_path to a whole one")
            parts.append(state[there])
        if len(parts) == 3:
            parts[:2] = [_turning(part, num_heads, "neighbours") for part in parts[:2]]
        here[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return here


def _kept(names: Iterable[str], num_codebooks: int) -> Iterator[str]:
    """All but the codebooks beyond `num_codebooks`, the first of which is the semantic one."""
    for name in names:
        acoustic = _ACOUSTIC.fullmatch(name)
        if acoustic is None or int(acoustic["index"]) < num_codebooks - 1:
            yield name


def _turning(weight: torch.Tensor, num_heads: int, what: str) -> torch.Tensor:
    """Rows of a query or key matrix [heads · D, width], reordered for rotary positions that turn `what`."""
    half = len(weight) // num_heads // 2
    pair = (half, 2) if what == "halves" else (2, half)
    return weight.unflatten(0, (num_heads, *pair)).transpose(1, 2).flatten(0, 2)


# What both configurations hold: by section of moshi's, moshi's key → transformers'.
_CONFIG_KEYS = {
    "seanet": {
        "dimension": "hidden_size",
        "n_filters": "num_filters",
        "n_residual_layers": "num_residual_layers",
        "ratios": "upsampling_ratios",
        "kernel_size": "kernel_size",
        "last_kernel_size": "last_kernel_size",
        "residual_kernel_size": "residual_kernel_size",
        "dilation_base": "dilation_growth_rate",
        "pad_mode": "pad_mode",
        "compress": "compress",
    },
    "quantizer": {"bins": "codebook_size", "dimension": "codebook_dim"},
    "transformer": {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "dim_feedforward": "intermediate_size",
        "context": "sliding_window",
        "layer_scale": "layer_scale_initial_scale",
    },
}


def to_codec_config(mimi_config: Mapping[str, Any], num_codebooks: int) -> dict[str, Any]:
    """transformers' `MimiConfig` as JSON, of a Mimi in moshi's spelling that has only its first codebooks.

    Raises:
        UserError: transformers' Mimi has no such architecture.
    """
    _refuse_what_transformers_lacks(mimi_config)
    shared = {
        theirs: mimi_config[section][ours] for section, keys in _CONFIG_KEYS.items() for ours, theirs in keys.items()
    }
    return {
        "model_type": "mimi",
        "architectures": ["MimiModel"],
        "sampling_rate": mimi_config["sample_rate"],
        "audio_channels": mimi_config["channels"],
        **shared,
        **_fixed_in_moshi(shared),
        "use_conv_shortcut": not mimi_config["seanet"]["true_skip"],
        "num_quantizers": num_codebooks,
        "norm_eps": 1e-5,
        "rope_theta": float(mimi_config["transformer"]["max_period"]),
    }


def _fixed_in_moshi(shared: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' configuration leaves open and moshi's Mimi does not."""
    width = shared["hidden_size"]
    return {
        "use_causal_conv": True,
        "trim_right_ratio": 1.0,
        "vector_quantization_hidden_dimension": shared["codebook_dim"],
        "num_semantic_quantizers": 1,
        "upsample_groups": width,  # moshi resamples each channel by itself
        "num_key_value_heads": shared["num_attention_heads"],
        "head_dim": width // shared["num_attention_heads"],
        "hidden_act": "gelu",
        "attention_bias": False,
    }


def _refuse_what_transformers_lacks(mimi_config: Mapping[str, Any]) -> None:
    seanet, quantizer, transformer = (mimi_config[key] for key in ("seanet", "quantizer", "transformer"))
    hop = math.prod(seanet["ratios"])
    facts: list[tuple[str, Any, Any]] = [
        (f"{part}.{key}", mimi_config[part].get(key, value), value)
        for part, values in _FIXED.items()
        for key, value in values.items()
    ]
    width = seanet["dimension"]
    facts += [
        ("transformer.d_model", transformer["d_model"], width),
        ("frame_rate", mimi_config["frame_rate"], mimi_config["sample_rate"] / hop / 2),
        ("quantizer.bins", quantizer["bins"], 1 << (quantizer["bins"].bit_length() - 1)),
        ("seanet.trim_right_ratio", seanet.get("trim_right_ratio", 1.0), 1.0),
    ]
    for key, value, wanted in facts:
        if value != wanted:
            remedy = "set model.export_layout: sesame, which stores no codec"
            raise UserError(f"model.mimi_config_path: {key}: {value}; transformers' Mimi has {wanted} there; {remedy}")
    if transformer.get("layer_scale") is None or quantizer["dimension"] == width:
        raise UserError("model.mimi_config_path: transformers' Mimi needs transformer.layer_scale and projections")


def from_codec_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_codec_config`: moshi's spelling, from which `moshi.models.loaders.get_mimi` builds.

    What the file leaves out is as in Kyutai's Mimi, transformers' default.

    Raises:
        UserError: moshi's Mimi has no such architecture.
    """
    given = to_codec_config(MIMI_CONFIG, MIMI_CONFIG["quantizer"]["n_q"])
    given |= {key: value for key, value in config.items() if value is not None}
    for key, value in _fixed_in_moshi(given).items():
        if key in config and config[key] not in (None, value):
            remedy = "set model.mimi_path to a codec in moshi's layout"
            raise UserError(f"model: codec_config.{key}: {config[key]}; moshi's Mimi has {value} there; {remedy}")
    rope, width = config.get("rope_parameters") or {}, given["hidden_size"]
    channels, rate_hz = given["audio_channels"], given["sampling_rate"]
    own: dict[str, dict[str, Any]] = {
        "seanet": {"channels": channels, "true_skip": not given["use_conv_shortcut"]},
        "quantizer": {"n_q": given["num_quantizers"], "input_dimension": width, "output_dimension": width},
        "transformer": {
            "d_model": width,
            "max_period": rope.get("rope_theta", given["rope_theta"]),
            "input_dimension": width,
            "output_dimensions": [width],
        },
    }
    sections = {
        section: MIMI_CONFIG[section] | {ours: given[theirs] for ours, theirs in keys.items()} | own[section]
        for section, keys in _CONFIG_KEYS.items()
    }
    frame_rate_hz = rate_hz / math.prod(given["upsampling_ratios"]) / 2
    return {"sample_rate": rate_hz, "channels": channels, "frame_rate": frame_rate_hz, **sections}
