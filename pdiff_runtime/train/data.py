"""Tagged documents on disk, their token ids, and packed batches of them.

A document is one JSON line ``{"prompt": ..., "text": ..., "family": ...}`` whose text carries the
control tags: topics with their numbers, then one ``<async>`` span per topic.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdiff_runtime.models.tokenizer import Tokenizer
from pdiff_runtime.plan import ControlTokens, SpanLayout, parse_plan, visible_text
from pdiff_runtime.train.targets import hybrid_targets, span_bounds

FORMATS = ("planned", "untagged", "diffusion")
"""How a document is shown to the model: with its plan and spans; as plain text; or as one span that
holds the whole plain text."""


@dataclasses.dataclass(frozen=True)
class TaggedDocument:
    """One line of a training file."""

    prompt: str
    text: str
    family: str = ""


def parse_document(line: str) -> TaggedDocument:
    """One line of a training file.

    Raises:
        ValueError: The line is no document.
    """
    try:
        record = json.loads(line)
        prompt, text = record["prompt"], record["text"]
        family = record.get("family", "")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON object with prompt and text, got {line[:60]!r}"
        ) from error
    if not all(isinstance(field, str) for field in (prompt, text, family)):
        raise ValueError("prompt, text and family must be strings")
    return TaggedDocument(prompt, text, family)


def read_documents(path: str | Path) -> Iterator[TaggedDocument]:
    """Documents of a JSONL file.

    Raises:
        ValueError: A line that is no document; the message has file and line number.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield parse_document(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
    """Token ids of a whole document, eos included, and how many of them are the prompt."""

    token_ids: list[int]
    prompt_len: int


class DocumentEncoder:
    """Turns tagged documents into token ids."""

    def __init__(self, tokenizer: Tokenizer, tags: ControlTokens, length_unit: int) -> None:
        self.tokenizer = tokenizer
        self.tags = tags
        self.length_unit = length_unit

    def __call__(self, document: TaggedDocument, form: str = "planned") -> EncodedDocument:
        """Encode in one of :data:`FORMATS`.

        Raises:
            ValueError: Malformed tags, or topics and spans that do not match.
        """
        prompt = self.tokenizer.encode_prompt(document.prompt)
        if form == "planned":
            answer = self._planned(self.tokenizer.encode(document.text))
        else:
            answer = self.tokenizer.encode_text(self.visible_text(document))
            if form == "diffusion":
                answer = self._span(answer, -(-len(answer) // self.length_unit))
            elif form != "untagged":
                raise ValueError(f"form: expected one of {FORMATS}, got {form!r}")
        # A reply that is one span has no plan: its <async> is given, and eos before it no target.
        prompt_len = len(prompt) + (form == "diffusion")
        return EncodedDocument([*prompt, *answer, self.tags.eos], prompt_len)

    def visible_text(self, document: TaggedDocument) -> str:
        """The document's answer as a reader sees it: no plan, no tags, parts joined by a space."""
        token_ids = self.tokenizer.encode(document.text)
        return visible_text(token_ids, self.tags, self.tokenizer.decode)

    def _planned(self, token_ids: list[int]) -> list[int]:
        """Pad every span to the length its topic announces."""
        spans = span_bounds(token_ids, self.tags)
        numbers = self._numbers(token_ids, spans)
        if len(spans) != len(numbers):
            raise ValueError(f"text: {len(numbers)} topics but {len(spans)} spans")
        padded: list[int] = []
        position = 0
        for (start, end), number in zip(spans, numbers, strict=True):
            padded += token_ids[position:start]
            padded += self._span(token_ids[start + 1 : end - 1], number)
            position = end
        return padded + token_ids[position:]

    def _span(self, content: list[int], number: int) -> list[int]:
        missing = number * self.length_unit - len(content)
        if missing < 0:
            raise ValueError(
                f"text: a span of {len(content)} tokens under a topic that announces "
                f"{number} x {self.length_unit}"
            )
        return [self.tags.async_start, *content, *[self.tags.pad] * missing, self.tags.async_end]

    def _numbers(self, token_ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
        """The numbers of all topics, round by round."""
        inside = {position for start, end in spans for position in range(start, end)}
        rounds: list[list[int]] = [[]]
        for position, token_id in enumerate(token_ids):
            if position not in inside:
                rounds[-1].append(token_id)
                if token_id == self.tags.sync:
                    rounds.append([])
        return [topic.number for plan in rounds for topic in parse_plan(plan, self.tags)]


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Documents one after another.

    Attributes:
        token_ids, labels, positions: ``[n]`` int64; positions restart at 0 in each document.
        is_span, is_content: ``[n]`` bool.
        cu_seqlens: ``[num_documents + 1]`` int32.
        layouts: One per document.
    """

    token_ids: Tensor
    labels: Tensor
    positions: Tensor
    is_span: Tensor
    is_content: Tensor
    cu_seqlens: Tensor
    layouts: list[SpanLayout]


class PackedDataset:
    """Encoded documents in flat arrays, and the batches of every epoch.

    Batches depend on ``(seed, epoch)`` alone, so a run can resume at any step. Without
    ``isolate_spans``, spans that directly follow one another see each other.
    """

    def __init__(
        self,
        documents: Sequence[EncodedDocument],
        tags: ControlTokens,
        *,
        isolate_spans: bool = True,
    ) -> None:
        if not documents:
            raise ValueError("documents: expected at least one, got none")
        targets = [hybrid_targets(document.token_ids, tags) for document in documents]
        self.layouts = [
            SpanLayout.from_tokens(document.token_ids, tags, isolate_spans)
            for document in documents
        ]
        lengths = [len(document.token_ids) for document in documents]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.token_ids = torch.tensor([i for d in documents for i in d.token_ids], device="cpu")
        self.labels = torch.cat([target.labels for target in targets])
        self.is_span = torch.cat([target.is_span for target in targets])
        self.is_content = torch.cat([target.is_content for target in targets])
        for start, document in zip(self.starts.tolist(), documents, strict=False):
            self.labels[start : start + max(0, document.prompt_len - 1)] = -100

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.starts[-1])

    def epoch(self, seed: int, epoch: int, batch_tokens: int) -> list[np.ndarray]:
        """Document indices of each batch: a random order, cut where ``batch_tokens`` is reached."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.layouts))
        ends = np.cumsum(self.starts[order + 1] - self.starts[order])
        cuts = np.flatnonzero(np.diff(ends // batch_tokens)) + 1
        return np.split(order, cuts)

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """Pack the documents at ``indices``."""
        lengths = torch.from_numpy(self.starts[indices + 1] - self.starts[indices])
        cu_seqlens = torch.zeros(len(indices) + 1, dtype=torch.int32, device="cpu")
        cu_seqlens[1:] = lengths.cumsum(0)
        offset = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        positions = torch.arange(int(cu_seqlens[-1]), device="cpu") - offset
        rows = positions + torch.repeat_interleave(torch.from_numpy(self.starts[indices]), lengths)
        return PackedBatch(
            self.token_ids[rows], self.labels[rows], positions, self.is_span[rows],
            self.is_content[rows], cu_seqlens, [self.layouts[i] for i in indices],
        )  # fmt: skip
