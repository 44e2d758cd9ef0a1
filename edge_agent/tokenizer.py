"""Text to tokens and back, from the files of a Hugging Face model folder.

Read are tokenizer.json, tokenizer_config.json and chat_template.jinja, and for the
end-of-sequence ids generation_config.json or config.json. No transformers, no torch.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from edge_agent.chat_template import ChatTemplate
from edge_agent.detokenizer import Detokenizer
from picospec.errors import ConfigError, ModelMismatch, RequestError
from picospec.protocol.fingerprint import chat_template_fingerprint, tokenizer_fingerprint
from picospec.protocol.messages import ModelCard, TokenArray

# Below, encoding takes less time than handing it to a thread and back is worth (about 1 ms).
_INLINE_CHARACTERS = 1024
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """The tokenizer that drafter and target share. Immutable; safe to use from threads."""

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.fingerprint = tokenizer_fingerprint(tokenizer_json)
        self.chat_template_fingerprint = chat_template_fingerprint(chat_template)
        self.eos_token_ids = tuple(eos_token_ids)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens = special_tokens or {}
        self._chat_template = ChatTemplate(chat_template, tokens) if chat_template else None
        self._bos_token_id = self._tokenizer.token_to_id(tokens.get("bos_token", ""))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads a model folder. Raises ConfigError naming what is missing or wrong."""
        try:
            tokenizer_json = (folder / "tokenizer.json").read_bytes()
        except OSError as error:
            raise ConfigError(
                f"drafter.tokenizer = {str(folder)!r} is not allowed: it must be a folder with a "
                f"tokenizer.json ({error.strerror})"
            ) from None
        config = _read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer_json,
            chat_template=_chat_template(folder, config),
            special_tokens={
                name: text for name in _TEMPLATE_TOKENS if (text := _token_text(config.get(name)))
            },
            eos_token_ids=_eos_token_ids(folder),
        )

    def encode(self, text: str) -> TokenArray:
        """Token ids of a prompt, beginning of sequence included where the model has one, once."""
        ids = self._ids(text, add_special_tokens=True)
        if ids[:2] == [self._bos_token_id] * 2:
            del ids[0]  # the text brought its own
        return np.asarray(ids, np.int32)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> TokenArray:
        """Token ids of a chat up to where the assistant begins. Raises RequestError."""
        if self._chat_template is None:
            raise RequestError(
                "The model has no chat template; use /v1/completions.", code="no_chat_template"
            )
        text = self._chat_template.render(messages)
        return np.asarray(self._ids(text, add_special_tokens=False), np.int32)

    async def encode_async(self, text: str) -> TokenArray:
        return await _off_loop(partial(self.encode, text), len(text))

    async def encode_chat_async(self, messages: Sequence[Mapping[str, str]]) -> TokenArray:
        num_characters = sum(len(message["content"]) for message in messages)
        return await _off_loop(partial(self.encode_chat, messages), num_characters)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch methods let go of the GIL, `encode` does not (tokenizers 0.23).
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones and ids beyond the vocabulary left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def detokenizer(self, prompt_tail: Sequence[int] = ()) -> Detokenizer:
        """For one generation whose prompt ends in `prompt_tail` (a dozen tokens suffice)."""
        return Detokenizer(self.decode, self._special_ids, prompt_tail)

    def check_pair(self, card: ModelCard) -> None:
        """Raises ModelMismatch unless drafts made with this tokenizer mean the same there."""
        differences = [
            f"{name} (edge {_short(ours)}, cloud {_short(theirs)})"
            for name, ours, theirs in (
                ("tokenizer.json", self.fingerprint, card.tokenizer_fingerprint),
                (
                    "the chat template (chat_template.jinja or tokenizer_config.json)",
                    self.chat_template_fingerprint,
                    card.chat_template_fingerprint,
                ),
            )
            if ours != theirs
        ]
        if differences:
            raise ModelMismatch(
                f"drafter and target {card.model_id!r} do not belong together: they differ in "
                + " and in ".join(differences)
            )
        if self.size > card.logits_width:
            raise ModelMismatch(
                f"drafter and target {card.model_id!r} do not belong together: the tokenizer has "
                f"{self.size} tokens, the target's logits only {card.logits_width}"
            )


async def _off_loop(encode: Callable[[], TokenArray], num_characters: int) -> TokenArray:
    """Long texts are encoded in a thread, beside the event loop."""
    return encode() if num_characters <= _INLINE_CHARACTERS else await asyncio.to_thread(encode)


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read: it holds no JSON object")
    return value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / 'chat_template.jinja'} cannot be read: {error}") from None
    if isinstance(template, list):  # named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
