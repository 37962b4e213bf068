"""Text to token ids and back, with the tokenizer and the chat template of a checkpoint."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pdiff_runtime.models.byte_level_bpe import byte_level_bpe, pairs_of
from pdiff_runtime.models.chat_template import ChatTemplate
from pdiff_runtime.models.files import find_file, read_json, read_text
from pdiff_runtime.models.gguf_file import GgufFile
from pdiff_runtime.models.gguf_tokenizer import gguf_tokenizer
from pdiff_runtime.models.tokenizer_backend import library_errors, private_backends
from pdiff_runtime.plan import PLAN_TAGS, PUBLISHED_NAMES, ControlTokens

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may say something in a conversation."""

LLADA_MASK = "<|mdm_mask|>"
"""LLaDA's tokenizer has this token and does not say what it is for."""

_STYLES = {
    "DreamTokenizer": "qwen2",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
}

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``[{"role": "user" | "assistant" | "system", "content": text}, ...]``."""


class Tokenizer:
    """Text to token ids and back, and prompts through the chat template.

    Control tags in a user's text are never parsed as control tokens: :meth:`encode_prompt` refuses
    them or, when asked, encodes them as plain text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self._config = config
        self.tag_names = _tag_names(config.get("pdiff", {}))
        template = _default_template(config.get("chat_template"))
        self._template = None if template is None else ChatTemplate(template)
        self._template_tokens = {
            name: _content(name, config[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name)
        }
        self._mask_token = _content("mask_token", config.get("mask_token") or LLADA_MASK)
        roles = ("bos_token", "eos_token", "pad_token")
        special = [self._template_tokens[name] for name in roles if name in self._template_tokens]
        special += [self._mask_token, *PUBLISHED_NAMES.values(), *self.tag_names.values()]
        self.backend, self._plain = private_backends(backend, special)
        added = self.backend.get_added_tokens_decoder().values()
        names = {*special, *(token.content for token in added if token.special)}
        ids = {name: self.token_to_id(name) for name in names}
        self._special = {name: i for name, i in ids.items() if i is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and other processes: templates and what the backends are told are not kept."""
        return type(self), (self.backend, self._config)

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> Tokenizer | None:
        """The tokenizer of a folder or a GGUF file, None if it has none.

        Raises:
            ValueError: A malformed one.
        """
        if checkpoint.is_file():
            metadata = GgufFile(checkpoint).metadata
            has_any = "tokenizer.ggml.model" in metadata
            return cls(*gguf_tokenizer(metadata)) if has_any else None
        names = ("tokenizer.json", "merges.txt")
        has_any = any(find_file(checkpoint, name) is not None for name in names)
        return cls.from_dir(checkpoint) if has_any else None

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read a folder.

        ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt`` as Qwen2, Dream and GPT-2 have
        them; ``tokenizer_config.json`` and ``chat_template.jinja`` if there.

        Raises:
            ValueError: Neither, or a malformed file.
        """
        path = Path(path)
        config_file = find_file(path, "tokenizer_config.json")
        config = {} if config_file is None else read_json(config_file)
        template_file = find_file(path, "chat_template.jinja")
        if template_file is not None:
            config["chat_template"] = read_text(template_file)
        return cls(_read_backend(path, config), config)

    @classmethod
    def from_gguf(cls, path: Path) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes.

        Raises:
            ValueError: No GGUF file, or a tokenizer that is not byte-level BPE.
        """
        return cls(*gguf_tokenizer(GgufFile(path).metadata))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens and control tags."""
        return frozenset(self._special.values())

    def control_tokens(self) -> ControlTokens:
        """The tags by name: those in its config under "pdiff", else the published ones.

        A vocabulary that has none of the tags of plans gives eos and the mask by the names that its
        own config has for them; the other tags are missing then.

        Raises:
            ValueError: Some tags are missing or split (all of them in one message), or digits are
                not single tokens.
        """
        names = {**PUBLISHED_NAMES, **self.tag_names}
        if self.tag_names or any(self.token_to_id(names[tag]) is not None for tag in PLAN_TAGS):
            return ControlTokens.from_tokenizer(self, names=names)
        names["eos"] = self._template_tokens.get("eos_token", names["eos"])
        if self.token_to_id(names["mask"]) is None:
            names["mask"] = self._mask_token
        return ControlTokens.from_tokenizer(self, names=names, needs_plan=False)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None if the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; control tags in it become control tokens."""
        return _ids(self.backend, text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ``text`` taken as plain text, whatever tags it spells."""
        return _ids(self._plain, text)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ``token_ids``, control tags included."""
        with library_errors("token_ids"):
            return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def encode_prompt(self, prompt: str | Messages, *, escape: bool = False) -> list[int]:
        """Token ids of a prompt or conversation, up to where the model's reply starts.

        Args:
            prompt: A user's text, or a conversation.
            escape: Encode control tags in the text as plain text instead of refusing them.

        Raises:
            ValueError: No text and no conversation, an empty one, a control tag in it, or a
                template that leaves no way to keep its own tags apart from those in the text.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, Sequence):
            raise ValueError(f"prompt: expected text or messages, got {type(prompt).__name__}")
        contents = [_text_of(message) for message in messages]
        if not contents or not all(text.strip() for text in contents):
            raise ValueError("prompt: expected some text, got an empty prompt")
        found = sorted({tag for tag in self._special for text in contents if tag in text})
        if found and not escape:
            raise ValueError(
                f"prompt: contains the control tag {found[0]!r}, which only the model may write; "
                "remove it, or encode the prompt with Tokenizer.encode_prompt(..., escape=True)"
            )
        if self._template is None:
            return self._bos() + [i for text in contents for i in self.encode_text(text)]
        return self._encode_rendered(messages, contents)

    def _encode_rendered(self, messages: Messages, contents: Sequence[str]) -> list[int]:
        """Token ids of a conversation through the template.

        Marks stand in for the tags that the text spells, so that only the template's own are
        parsed. A template may trim the text or look into it, and words may span its borders; that
        is right only if it brings forth no tag that the template does not write by itself. Where it
        does, marks stand in for all of the text. Either way the ids spell what the template makes
        of the messages as they are, or else nothing would tell that a part of them was lost.
        """
        frame = self._render(messages, [_mark(idx) for idx in range(len(contents))])
        own_ids = [self.encode(piece) for piece in _MARK.split(frame)[::2]]
        own_tags = self._tags(itertools.chain(*own_ids))
        hidden, spelled = self._hide_tags(contents)
        marked = self._render(messages, hidden)
        rendered = self._render(messages, contents) if spelled else marked
        trimmed = [text.strip() for text in contents]
        for text, fillings in ((marked, spelled), (frame, contents), (frame, trimmed)):
            pieces = _fill(_MARK.split(text), fillings)
            if "".join(pieces) != rendered:
                continue
            token_ids: list[int] = []
            for idx, piece in enumerate(pieces):
                token_ids += self.encode_text(piece) if idx % 2 else self.encode(piece)
            if self._tags(token_ids) == own_tags:
                return token_ids
        raise ValueError(
            "prompt: the chat template changes this text, or what it writes depends on it, in a "
            "way that leaves its own tags and those in the text no longer apart"
        )

    def _hide_tags(self, contents: Sequence[str]) -> tuple[list[str], list[str]]:
        """The texts with marks for what could pass for a tag or a mark, and what they stand for."""
        spelled: list[str] = []

        def hide(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return _mark(len(spelled) - 1)

        names = sorted(self._special, key=len, reverse=True)
        tag = re.compile("|".join(re.escape(name) for name in ["\x00", *names]))
        return [tag.sub(hide, text) for text in contents], spelled

    def _bos(self) -> list[int]:
        """The token that starts a text, if the tokenizer adds it by itself."""
        with library_errors("tokenizer"):
            first = self.backend.encode("", add_special_tokens=True).ids[:1]
        bos = self._template_tokens.get("bos_token")
        return first if bos is not None and first == [self.token_to_id(bos)] else []

    def _render(self, messages: Messages, contents: Sequence[str]) -> str:
        assert self._template is not None
        return self._template.render(
            messages=[
                {"role": message["role"], "content": content}
                for message, content in zip(messages, contents, strict=True)
            ],
            tools=None, documents=None, add_generation_prompt=True, **self._template_tokens,
        )  # fmt: skip

    def _tags(self, token_ids: Iterable[int]) -> list[int]:
        # Any text may hold something unknown.
        unknown = self._special.get(self._template_tokens.get("unk_token", ""))
        tags = self.special_ids - {unknown}
        return [token_id for token_id in token_ids if token_id in tags]


_MARK = re.compile("\x00([0-9]{1,9})\x00")


def _mark(idx: int) -> str:
    return f"\x00{idx}\x00"


def _fill(pieces: Sequence[str], fillings: Sequence[str]) -> list[str]:
    """What was split at the marks, with the texts that those stand for at the odd places."""
    texts = dict(enumerate(fillings))
    return [texts.get(int(p), "") if idx % 2 else p for idx, p in enumerate(pieces)]


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    _check_unicode(text)
    with library_errors("text"):
        return backend.encode(text, add_special_tokens=False).ids


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: not valid Unicode at position {error.start}") from error


def _text_of(message: Any) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"prompt: expected messages with a role and content, got {type(message).__name__}"
        )
    content, role = message.get("content", ""), message.get("role")
    if not isinstance(content, str):
        raise ValueError(f"prompt: expected text as content, got {type(content).__name__}")
    _check_unicode(content)
    if role not in ROLES:
        raise ValueError(f"prompt: expected a role among {', '.join(ROLES)}, got {role!r}")
    return content


def _default_template(template: Any) -> str | None:
    """The template to use, of one or of a list with names."""
    if not isinstance(template, list):
        return template
    entries = [entry for entry in template if isinstance(entry, dict)]
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    if "default" not in named and len(named) != 1:
        raise ValueError(f"tokenizer: no default chat template among {sorted(named)}")
    return named.get("default", next(iter(named.values())))


def _read_backend(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    file = find_file(path, "tokenizer.json")
    if file is not None:
        with library_errors(f"tokenizer: cannot read {file}"):
            return tokenizers.Tokenizer.from_file(str(file))
    vocab, merges = find_file(path, "vocab.json"), find_file(path, "merges.txt")
    if vocab is None or merges is None:
        raise ValueError(f"tokenizer: no tokenizer.json in {path}, nor vocab.json and merges.txt")
    style = _STYLES.get(str(config.get("tokenizer_class")))
    if style is None:
        raise ValueError(
            f"tokenizer_class: expected one of {', '.join(_STYLES)} where there is no "
            f"tokenizer.json, got {config.get('tokenizer_class')!r}"
        )
    lines = [line for line in read_text(merges).split("\n") if line and line[:9] != "#version:"]
    added = config.get("added_tokens_decoder", {})
    return byte_level_bpe(read_json(vocab), pairs_of(lines), _added_tokens(added), style=style)


def _added_tokens(entries: Any) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` of a ``tokenizer_config.json``."""
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    try:
        return {
            int(token_id): AddedToken(
                entry["content"], **{flag: entry[flag] for flag in flags if flag in entry}
            )
            for token_id, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "added_tokens_decoder: expected objects with content and flags by id"
        ) from error


def _tag_names(names: Any) -> dict[str, str]:
    if not isinstance(names, dict) or not all(isinstance(tag, str) for tag in names.values()):
        raise ValueError(f"tokenizer: expected tags by name under 'pdiff', got {names!r:.80}")
    return names


def _content(name: str, token: Any) -> str:
    """The text of a token, given as such or with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"tokenizer: {name}: expected a token, got {token!r:.80}")
    return content
