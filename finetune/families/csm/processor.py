"""The files from which transformers' `CsmProcessor` is built: tokenizer, chat template, audio.

They are copied where the checkpoint's tokenizer came with them, and written otherwise.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from string import Formatter
from typing import Any

from tokenizers import Tokenizer

from finetune.families.csm.files import PROCESSOR_FILES, TOKENIZER_FILE, Companions
from finetune.families.csm.places import folder_place, read_notes
from finetune.families.csm.text import BOS_TOKEN, EOS_TOKEN, TEXT_TEMPLATE
from finetune.json_files import read_json

logger = logging.getLogger("parley")

# transformers' `CsmProcessor` looks for these; the first is repeated for every frame.
AUDIO_TOKEN, AUDIO_END_TOKEN = "<|AUDIO|>", "<|audio_eos|>"
# Llama 3 keeps tokens for later uses. sesame/csm-1b calls the first two as above.
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")
_SESAMES_TURN = {"text_template": TEXT_TEMPLATE, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set turn = namespace(text='', num_clips=0) -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {%- set turn.text = turn.text ~ part['text'] -%}
            {%- elif part['type'] == 'audio' -%}
                {%- set turn.num_clips = turn.num_clips + 1 -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if turn.text -%}
        {{- WRITTEN -}}
    {%- endif -%}
    {{- 'AUDIO' * turn.num_clips -}}
{%- endfor -%}
"""


def write_processor(folder: Path, companions: Companions, text_vocab_size: int) -> dict[str, int | None]:
    """Write everything that `AutoProcessor.from_pretrained(folder)` needs beside the model's `config.json`.

    Returns:
        The ids of the tokens that transformers' `CsmConfig` names.
    """
    own = companions.tokenizer_path.parent
    tokenizer = Tokenizer.from_file(str(companions.tokenizer_path))
    is_whole = tokenizer.token_to_id(AUDIO_TOKEN) is not None and (own / "tokenizer_config.json").is_file()
    if is_whole:
        shutil.copyfile(companions.tokenizer_path, folder / TOKENIZER_FILE)
    else:
        tokenizer = _write_tokenizer(folder, companions, text_vocab_size)
    files = _processor_files(companions)
    for name in PROCESSOR_FILES:
        if is_whole and (own / name).is_file() and not (name.endswith(".jinja") and _has_new_turns(companions)):
            shutil.copyfile(own / name, folder / name)
        else:
            (folder / name).write_text(files[name], encoding="utf-8")
    padding = read_json(folder / "tokenizer_config.json").get("pad_token") or companions.settings.eos_token
    return {
        "bos_token_id": tokenizer.token_to_id(companions.settings.bos_token),
        "eos_token_id": None,  # speech ends with a frame, never with a token
        "pad_token_id": tokenizer.token_to_id(padding["content"] if isinstance(padding, dict) else padding),
        "audio_token_id": tokenizer.token_to_id(AUDIO_TOKEN),
        "audio_eos_token_id": tokenizer.token_to_id(AUDIO_END_TOKEN),
    }


def _has_new_turns(companions: Companions) -> bool:
    """Whether turns are written in another way than by the chat template beside the tokenizer."""
    before = _SESAMES_TURN | read_notes(folder_place(companions.tokenizer_path.parent, "model"))
    return any(getattr(companions.settings, key) != before[key] for key in _SESAMES_TURN)


def _processor_files(companions: Companions) -> dict[str, str]:
    bos, eos = companions.settings.bos_token, companions.settings.eos_token
    special = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    contents: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "CsmProcessor",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **special,
        },
        "special_tokens_map.json": special,
        "preprocessor_config.json": {
            "feature_extractor_type": "EncodecFeatureExtractor",
            "processor_class": "CsmProcessor",
            "feature_size": 1,
            "sampling_rate": companions.mimi_config["sample_rate"],
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "chunk_length_s": None,
            "overlap": None,
        },
        "processor_config.json": {"processor_class": "CsmProcessor"},
    }
    files = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in contents.items()}
    return files | {"chat_template.jinja": _chat_template(companions)}


def _chat_template(companions: Companions) -> str:
    """Turns as training wrote them: text between its tokens, then the audio and its end."""
    fields = {"speaker": "message['role']", "text": "turn.text"}
    pieces = [json.dumps(companions.settings.bos_token)]
    for literal, field, _, _ in Formatter().parse(companions.settings.text_template):
        pieces += [json.dumps(literal)] if literal else []
        pieces += [fields[field]] if field else []
    pieces.append(json.dumps(companions.settings.eos_token))
    written = _CHAT_TEMPLATE.replace("WRITTEN", " ~ ".join(pieces))
    return written.replace("AUDIO", AUDIO_TOKEN + AUDIO_END_TOKEN)


def _write_tokenizer(folder: Path, companions: Companions, text_vocab_size: int) -> Tokenizer:
    """The tokenizer with names for audio, and with begin and end around a text, as in sesame/csm-1b."""
    content = read_json(companions.tokenizer_path)
    for token in (AUDIO_TOKEN, AUDIO_END_TOKEN):
        if not _has(content, token) and not _take_reserved(content, token):
            _append(content, token, text_vocab_size, companions)
    bos, eos = companions.settings.bos_token, companions.settings.eos_token
    tokenizer = Tokenizer.from_file(str(companions.tokenizer_path))
    around = {
        "type": "TemplateProcessing",
        "single": [_special(bos), _sequence("A"), _special(eos)],
        "pair": [_special(bos), _sequence("A"), _special(eos), _special(bos), _sequence("B"), _special(eos)],
        "special_tokens": {
            token: {"id": token, "ids": [tokenizer.token_to_id(token)], "tokens": [token]} for token in (bos, eos)
        },
    }
    before = content.get("post_processor") or {}
    kept = [one for one in before.get("processors", [before]) if one.get("type") == "ByteLevel"]
    content["post_processor"] = {"type": "Sequence", "processors": [*kept, around]}
    path = folder / TOKENIZER_FILE
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _has(content: dict[str, Any], token: str) -> bool:
    return any(one["content"] == token for one in content["added_tokens"])


def _take_reserved(content: dict[str, Any], token: str) -> bool:
    """Give the first token that the tokenizer keeps for later a name."""
    for one in sorted(content["added_tokens"], key=lambda one: one["id"]):
        if _RESERVED.fullmatch(one["content"]):
            vocabulary = content["model"].get("vocab")
            if isinstance(vocabulary, dict) and one["content"] in vocabulary:
                vocabulary[token] = vocabulary.pop(one["content"])
            one["content"] = token
            return True
    return False


def _append(content: dict[str, Any], token: str, text_vocab_size: int, companions: Companions) -> None:
    """Add a token behind all others, if the model has room for it."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    number = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if number >= text_vocab_size:
        said = f"the tokenizer {companions.tokenizer_path} fills the model's {text_vocab_size} text tokens"
        logger.warning("%s, which leaves none for %s: transformers will take texts, but no audio", said, token)
        return
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": number, "content": token, **flags, "special": True})
