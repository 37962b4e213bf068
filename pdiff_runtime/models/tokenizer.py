"""A tokenizer folder as Hugging Face writes it: ``tokenizer.json``, its config, a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.sandbox
import tokenizers

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``[{"role": "user" | "assistant" | "system", "content": text}, ...]``."""


class Tokenizer:
    """Text to token ids and back, and prompts through the chat template.

    Control tags in a user's text are never parsed as control tokens: :meth:`encode_prompt` refuses
    them or, when asked, encodes them as plain text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self.backend = backend
        self.tag_names: Mapping[str, str] = config.get("pdiff", {})
        self._special = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special or token.content in self.tag_names.values()
        }
        template = config.get("chat_template")
        self._template = None
        if template is not None:
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
            )
            environment.globals["raise_exception"] = _raise_exception
            self._template = environment.from_string(template)
        self._template_tokens = {
            name: _content(config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name)
        }

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` if there.

        Raises:
            ValueError: No or a malformed ``tokenizer.json``.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"tokenizer: no tokenizer.json in {path}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: cannot read {file}: {error}") from error
        config_file = path / "tokenizer_config.json"
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"tokenizer: expected a JSON object in {config_file}")
        template_file = path / "chat_template.jinja"
        if template_file.is_file():
            config["chat_template"] = template_file.read_text("utf-8")
        return cls(backend, config)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens and control tags."""
        return frozenset(self._special.values())

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None if the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; control tags in it become control tokens."""
        return self._encode(text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ``text`` taken as plain text, whatever tags it spells."""
        self.backend.encode_special_tokens = True
        try:
            return self._encode(text)
        finally:
            self.backend.encode_special_tokens = False

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: not valid Unicode at position {error.start}") from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ``token_ids``, control tags included."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def encode_prompt(self, prompt: str | Messages, *, escape: bool = False) -> list[int]:
        """Token ids of a prompt or conversation, up to where the model's reply starts.

        Args:
            prompt: A user's text, or a conversation.
            escape: Encode control tags in the text as plain text instead of refusing them.

        Raises:
            ValueError: An empty prompt, or a control tag in it.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages or not all(message.get("content", "").strip() for message in messages):
            raise ValueError("prompt: expected some text, got an empty prompt")
        contents = [message["content"] for message in messages]
        found = sorted({tag for tag in self._special for text in contents if tag in text})
        if found and not escape:
            raise ValueError(
                f"prompt: contains the control tag {found[0]!r}, which only the model may write; "
                "remove it, or encode the prompt with Tokenizer.encode_prompt(..., escape=True)"
            )
        if self._template is None:
            return [token_id for text in contents for token_id in self.encode_text(text)]
        # Render with stand-ins, so that the template's own tags are parsed and the user's are not.
        stand_ins = [f"\x00{i}\x00" for i in range(len(messages))]
        rendered = self._template.render(
            messages=[
                {**message, "content": stand_in}
                for message, stand_in in zip(messages, stand_ins, strict=True)
            ],
            add_generation_prompt=True,
            **self._template_tokens,
        )
        token_ids: list[int] = []
        for stand_in, text in zip(stand_ins, contents, strict=True):
            before, _, rendered = rendered.partition(stand_in)
            token_ids += self.encode(before) + self.encode_text(text)
        return token_ids + self.encode(rendered)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _raise_exception(message: str) -> None:
    raise ValueError(f"chat template: {message}")
