"""CSM's text: `[speaker]text` between the tokenizer's begin and end of text (SesameAILabs/csm `generator.py`)."""

from pathlib import Path
from string import Formatter

from tokenizers import Tokenizer

from finetune.errors import UserError
from finetune.families.csm.places import Settings

# Sesame's (SesameAILabs/csm `generator.py`).
TEXT_TEMPLATE, BOS_TOKEN, EOS_TOKEN = "[{speaker}]{text}", "<|begin_of_text|>", "<|end_of_text|>"


class TurnTokenizer:
    """A Hugging Face tokenizer and the template that a turn is written in.

    Args:
        path: a `tokenizer.json`.
        template: with the fields `{speaker}` and `{text}`; `{text}` is required.
        bos_token, eos_token: what stands before and behind each turn's text.

    Raises:
        UserError: the file is no tokenizer, it lacks these tokens, or the template has other fields.
    """

    def __init__(self, path: Path, template: str, bos_token: str, eos_token: str):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare exceptions
            raise UserError(f"model.tokenizer_path: {path}: not a tokenizer.json ({error})") from error
        self._template = template
        self._bos = self._special(bos_token, "bos_token", path)
        self._eos = self._special(eos_token, "eos_token", path)

    @classmethod
    def of(cls, path: Path, settings: Settings) -> "TurnTokenizer":
        """The same of settings that have been settled."""
        return cls(path, settings.text_template, settings.bos_token, settings.eos_token)

    @property
    def vocab_size(self) -> int:
        """Pieces, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, speaker: str, text: str) -> list[int]:
        """Token ids of a turn's text, begin and end included; none for a turn without text."""
        if not text:
            return []
        written = self._template.format(speaker=speaker, text=text)
        return [self._bos, *self._tokenizer.encode(written, add_special_tokens=False).ids, self._eos]

    def _special(self, token: str, key: str, path: Path) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"model.{key}: {token!r} is not a token of {path}; name the one that it has")
        return number


def check_template(template: str) -> None:
    """Raise ValueError for a template that does not write the text."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"text_template: {template!r} is not a template ({error}); write '[{{speaker}}]{{text}}'"
        ) from error
    fields = {name for _, name, _, _ in parts}
    if "text" not in fields or not fields <= {"speaker", "text"}:
        raise ValueError(f"text_template: {template!r} must hold {{text}} and may hold {{speaker}}, nothing else")
    if any(specification or conversion for _, _, specification, conversion in parts):
        raise ValueError(f"text_template: {template!r} must hold plain {{text}} and {{speaker}}, without ! and :")
