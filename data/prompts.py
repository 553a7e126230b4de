"""The tokenizer and the chat format that are stored beside a checkpoint's weights.

    tokenizer = Tokenizer.from_directory("data/micro")
    prompt_ids = tokenizer.encode_prompt(user_text)

Made for Llama 3's form: byte-level BPE in tokenizer.json, a Jinja chat template in
chat_template.jinja or tokenizer_config.json. A checkpoint without a template is a base model and
gets plain text.

Two rules keep prompts honest. What a user types is text: "<|eot_id|>" in a question never becomes
the control token. And a prompt does not depend on the day: the date that Llama 3.2's template
writes is pinned, or two runs of one seed would differ.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

PINNED_DATE = datetime.date(2024, 7, 26)  # the date that Llama 3.2's template falls back to
PINNED_DATE_TEXT = "26 Jul 2024"  # spelled out: strftime's month name follows the locale
BASE_PROMPT = "Question: {user_text}\nAnswer:"
USER_PLACE = "@@the-user-text-goes-here@@"  # stands for the user's text while the template renders


class Tokenizer:
    """One checkpoint's tokenizer. Build it with `from_directory`.

    bos_id, pad_id: int. eos_ids: every id that ends a completion (Llama 3 Instruct has three).
    pad_id is <|finetune_right_pad_id|>, or bos_id where there is none; it is never one of eos_ids,
    because a padded batch could not be told from a finished one.
    chat_template: Jinja source, or None for a base model.
    """

    def __init__(self, directory: Path, backend: tokenizers.Tokenizer):
        self.directory = directory
        self._backend = backend
        config = _read_json(directory / "tokenizer_config.json")
        self.chat_template = _chat_template(directory, config)
        self._bos_token = _token_text(config.get("bos_token")) or "<|begin_of_text|>"
        self._eos_token = _token_text(config.get("eos_token")) or ""

        bos_id = backend.token_to_id(self._bos_token)
        if bos_id is None:
            raise ValueError(
                f"{directory / 'tokenizer.json'} has no token {self._bos_token!r}: "
                "use a Llama 3 checkpoint, or name its first token as bos_token "
                "in tokenizer_config.json"
            )
        self.bos_id: int = bos_id
        self._token_bytes = _bytes_of_vocabulary(backend, directory)
        self.eos_ids = self._find_eos_ids()
        pad_id = backend.token_to_id("<|finetune_right_pad_id|>")
        self.pad_id: int = self.bos_id if pad_id is None else pad_id
        if self.pad_id in self.eos_ids:
            raise ValueError(
                f"{directory}: padding id {self.pad_id} is also an end-of-text id; "
                "correct eos_token_id in generation_config.json"
            )

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and the files beside it. ValueError if it is missing or damaged."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file} not found: --model must name a checkpoint that has this file")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust side raises bare Exception for a damaged file
            raise ValueError(
                f"{file} cannot be read as a tokenizer ({error}): fetch it again"
            ) from error
        return cls(file.parent, backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes)

    def check_fits(self, vocab_size: int) -> None:
        """ValueError where a model of so many token ids does not know all of this tokenizer's."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{self.directory / 'tokenizer.json'} has {self.vocab_size} ids, config.json a "
                f"vocab_size of {vocab_size}: ids beyond it have no embedding; resize the model's "
                "embeddings, or put the tokenizer files of the model it was made from beside it"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and the name of a control token stays text."""
        return self._encode(text, control_tokens=False)

    def encode_prompt(self, user_text: str) -> list[int]:
        """Ids up to where the model's completion begins, one BOS in front; white space is trimmed.

        Chat checkpoints: the template's own parts become control tokens, the user's text does not.
        Base models: plain text. ValueError where the template fails or hides the user's text.
        """
        user_text = user_text.strip()  # Llama's template trims too, but would only see USER_PLACE
        if self.chat_template is None:
            return [self.bos_id, *self.encode(BASE_PROMPT.format(user_text=user_text))]
        parts = self._render(USER_PLACE).split(USER_PLACE)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template of {self.directory} shows the user's text {len(parts) - 1} "
                "times, not once: use another template"
            )
        before, after = (self._encode(part, control_tokens=True) for part in parts)
        return [*before, *self.encode(user_text), *after]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of all ids together, special tokens skipped, invalid UTF-8 as U+FFFD.

        Never decode token by token: one character may be split over several tokens.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: b"" for special tokens and ids without an entry."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def _encode(self, text: str, control_tokens: bool) -> list[int]:
        self._backend.encode_special_tokens = not control_tokens
        # add_special_tokens would prepend a BOS, a second one where the template has its own
        return self._backend.encode(text, add_special_tokens=False).ids

    def _render(self, user_text: str) -> str:
        # trim_blocks and lstrip_blocks as transformers documents for chat templates
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def raise_exception(message: str):
            raise jinja2.TemplateError(message)

        def strftime_now(form: str) -> str:
            return PINNED_DATE_TEXT if form == "%d %b %Y" else PINNED_DATE.strftime(form)

        try:
            text = environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": user_text}],
                add_generation_prompt=True,
                bos_token=self._bos_token,
                eos_token=self._eos_token,
                date_string=PINNED_DATE_TEXT,
                strftime_now=strftime_now,
                raise_exception=raise_exception,
            )
            text.encode()  # a lone surrogate is no text, and the tokenizer takes none
            return text
        except Exception as error:  # a template is a program: it may divide by zero or recurse
            reason = str(error) or type(error).__name__
            raise ValueError(f"the chat template of {self.directory} fails: {reason}") from None

    def _find_eos_ids(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(self.directory / name).get("eos_token_id")
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]  # base models have one, Instruct several
            if not ids or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
                raise ValueError(
                    f"{self.directory / name}: eos_token_id must be a token id or a list of them, "
                    "all in tokenizer.json; fetch the file again"
                )
            return tuple(ids)
        eos_id = self._backend.token_to_id(self._eos_token)
        if eos_id is None:
            raise ValueError(
                f"{self.directory} names no end-of-text token: "
                "set eos_token_id in generation_config.json"
            )
        return (eos_id,)


def _read_json(file: Path) -> dict:
    """The file's object, {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object: fetch it again")
    return content


def _chat_template(directory: Path, config: dict) -> str | None:
    file = directory / "chat_template.jinja"  # where newer checkpoints keep it
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}): fetch it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        try:
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        except (TypeError, KeyError):
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: each chat_template needs name and template"
            ) from None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{directory / 'tokenizer_config.json'}: chat_template must be text")
    return template


def _token_text(value: str | dict | None) -> str | None:
    """Older files write a token as an object: {"content": "<s>", ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: {value!r} is no token; fetch the file again")
    return text


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2's table).

    Printable bytes stand for themselves; the others, in order, are shifted to U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


def _bytes_of_vocabulary(backend: tokenizers.Tokenizer, directory: Path) -> list[bytes]:
    """Bytes of each id. ValueError for a tokenizer that is not byte-level."""
    alphabet = _byte_alphabet()
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values())
    if highest > 10**7:  # a damaged file, and a table that fills the memory
        raise ValueError(f"{directory / 'tokenizer.json'} has token id {highest}: fetch it again")
    table = [b""] * (highest + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:  # written as they are, not in the byte alphabet
            table[token_id] = b"" if added[token_id].special else token.encode("utf-8")
            continue
        try:
            table[token_id] = bytes(alphabet[character] for character in token)
        except KeyError as error:
            raise ValueError(
                f"{directory / 'tokenizer.json'} is not byte-level BPE (token {token!r}): "
                "use a Llama 3 checkpoint"
            ) from error
    return table
