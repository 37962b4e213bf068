"""The front door: a model, its tokenizer and an engine, and `generate` over a list of prompts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import numbers
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pdiff_runtime.engine.engine import Engine
from pdiff_runtime.engine.output import Event, Finished, RequestOutput
from pdiff_runtime.engine.params import (
    PLAN_MODES,
    EngineConfig,
    GenerationParams,
    Mode,
    UserRound,
    check_type,
    recommended,
)
from pdiff_runtime.engine.progress import Bar
from pdiff_runtime.models import Decoder, Tokenizer, load_model, read_config, resolve_checkpoint
from pdiff_runtime.models.files import find_file, read_json
from pdiff_runtime.plan import ControlTokens

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A user's text, a conversation (``[{"role": ..., "content": ...}]``), or token ids."""

_INTEGERS = (int, numbers.Integral)  # the first is quickly told; numpy's are among the second
_Request = tuple[str, list[int], GenerationParams, list[list[int]]]


class LLM:
    """A planned-diffusion model ready to answer, one call at a time.

    Args:
        model_or_path: A decoder, a checkpoint folder, GGUF file or hub id; None for the bundled
            model.
        tags: Control tokens; None takes them from the tokenizer by name.
        tokenizer: None reads it from the checkpoint. Prompts given as token ids need none.
        config: Sizes of the engine.
        dtype: Of weights and computation when a checkpoint is loaded.
        device: Where a checkpoint is loaded to; a decoder stays where it is.
        revision: Of a hub repository.
        progress: Show a bar on stderr while weights load.

    Attributes:
        default_params: What the checkpoint's ``generation_config.json`` recommends under "pdiff",
            in a mode that the model has the tokens for; used where no parameters are given.

    Raises:
        ValueError: No such checkpoint, a damaged one, a tokenizer without the control tags, or tags
            that the model has no embedding for.
    """

    def __init__(
        self,
        model_or_path: Decoder | str | Path | None = None,
        *,
        tags: ControlTokens | None = None,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        progress: bool = False,
    ) -> None:
        for name, value, kind in (
            ("tags", tags, ControlTokens), ("tokenizer", tokenizer, Tokenizer),
            ("config", config, EngineConfig),
        ):  # fmt: skip
            if value is not None:
                check_type(name, value, kind)
        self.default_params = GenerationParams()
        if isinstance(model_or_path, Decoder):
            self.model = model_or_path
            tags = _checked_tags(tags, tokenizer, self.model.config.vocab_size, "the arguments")
        else:  # weights last: they take long
            checkpoint = resolve_checkpoint(model_or_path, revision=revision)
            self.default_params = _recommended(checkpoint)
            if tokenizer is None:
                tokenizer = Tokenizer.from_checkpoint(checkpoint)
            vocab_size = read_config(checkpoint).vocab_size
            tags = _checked_tags(tags, tokenizer, vocab_size, str(checkpoint))
            self.model = load_model(checkpoint, dtype=dtype, device=device, progress=progress)
        self.tokenizer = tokenizer
        if not tags.has_plan and self.default_params.mode in PLAN_MODES:
            mode: Mode = "diffusion" if self.model.config.full_attention else "ar"
            self.default_params = dataclasses.replace(self.default_params, mode=mode)
        self.tags = tags
        self.engine = Engine(
            self.model, tags, config or EngineConfig(), self._decode, self._banned_ids()
        )
        self._num_requests = 0
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts together; the answers keep their order.

        Args:
            prompts: One prompt, or a list of them.
            params: For all, or one each; None for `default_params`.
            progress: Show a bar on stderr.

        Returns:
            ``params.n`` answers for each prompt, those of one prompt one after another.

        Raises:
            ValueError: A bad prompt or parameter; nothing was run.
            RuntimeError: Another call is under way, in this thread (an open stream) or another.
        """
        if hasattr(prompts, "tolist"):  # ids as an array or a tensor
            prompts = prompts.tolist()
        if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
            raise ValueError(
                f"prompts: expected text, token ids or a list of them, got {prompts!r}"
            )
        is_one = isinstance(prompts, str) or _is_ids(prompts) or _is_conversation(prompts)
        batch: Sequence[Prompt] = [prompts] if is_one else prompts  # type: ignore[list-item,assignment]
        if params is None or isinstance(params, GenerationParams):
            params = [params or self.default_params] * len(batch)
        if not _is_list(params) or len(params) != len(batch):
            raise ValueError(f"params: expected {len(batch)}, one per prompt, got {params!r:.80}")
        requests = [self._request(*each) for each in zip(batch, params, strict=True)]
        order: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        with self._running(), Bar(sum(each.n for each in params), progress) as bar:
            for request in requests:
                self.engine.check(*request[1:])
            todo = collections.deque(requests)
            while todo or self.engine.has_work:
                while todo and self.engine.has_room(todo[0][2].n):
                    order += self.engine.add(*todo.popleft())
                for event in self.engine.step():
                    if isinstance(event, Finished):
                        outputs[event.request_id] = event.output
                        bar.advance(len(event.output.token_ids))
        return [outputs[request_id] for request_id in order]

    def stream(self, prompt: Prompt, params: GenerationParams | None = None) -> Iterator[Event]:
        """Answer one prompt and say what happens on the way; closing the iterator cancels it.

        Raises:
            ValueError: A bad prompt or parameter.
            RuntimeError: Another call is under way.
        """
        request = self._request(prompt, params or self.default_params)
        with self._running():
            self.engine.add(*request, with_text=True)
            while self.engine.has_work:
                yield from self.engine.step()

    def _request(self, prompt: Prompt, params: GenerationParams) -> _Request:
        return self._next_id(), *self.encode_request(prompt, params)

    def acquire(self) -> None:
        """Take the engine for oneself, as :class:`AsyncEngine` does, until :meth:`release`.

        Raises:
            RuntimeError: It is taken.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("LLM: another generate or stream is under way; one at a time")

    def release(self) -> None:
        """Give the engine back."""
        self._lock.release()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Hold the engine; whatever ends the block, none of its requests stays."""
        self.acquire()
        try:
            yield
        finally:
            self.engine.forget_all()
            self.release()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: An empty prompt, a control tag in it, or text without a tokenizer.
        """
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if _is_ids(prompt):
            return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
        is_text = isinstance(prompt, str) or _is_conversation(prompt)
        if not is_text and prompt != []:
            raise ValueError(f"prompt: expected text, a conversation or token ids, got {prompt!r}")
        if self.tokenizer is None:
            if prompt == []:
                raise ValueError("prompt: expected at least one token, got none")
            raise ValueError("prompt: expected token ids where there is no tokenizer, got text")
        return self.tokenizer.encode_prompt(prompt)  # type: ignore[arg-type]

    def encode_request(
        self, prompt: Prompt, params: GenerationParams
    ) -> tuple[list[int], GenerationParams, list[list[int]]]:
        """What the engine takes: token ids of a prompt, how to answer, token ids of a user's plan.

        Raises:
            ValueError: See :meth:`encode` and :meth:`encode_plan`; or no parameters.
        """
        check_type("params", params, GenerationParams)
        return self.encode(prompt), params, self.encode_plan(params.plan)

    def encode_plan(self, plan: Sequence[UserRound] | None) -> list[list[int]]:
        """Token ids of each round of a user's plan, sync or eos included.

        Raises:
            ValueError: A round that is neither token ids nor topics with lengths.
        """
        if plan is None:
            return []
        closings = [self.tags.sync] * (len(plan) - 1) + [self.tags.eos]
        return [self._encode_round(*each) for each in zip(plan, closings, strict=True)]

    def _encode_round(self, plan_round: UserRound, closing: int) -> list[int]:
        if _is_ids(plan_round):
            token_ids = [int(token_id) for token_id in plan_round]  # type: ignore[arg-type]
            if token_ids[-1] not in (self.tags.sync, self.tags.eos):
                raise ValueError("plan: token ids of a round must end in sync or eos")
            return token_ids
        if not _is_list(plan_round):
            raise ValueError(f"plan: expected rounds of (topic, length), got {plan_round!r}")
        token_ids = []
        for entry in plan_round:
            if not (isinstance(entry, tuple | list) and len(entry) == 2):
                raise ValueError(f"plan: expected (topic, length), got {entry!r}")
            token_ids += self._encode_topic(*entry)
        return [*token_ids, closing]

    def _encode_topic(self, topic: object, length: object) -> list[int]:
        unit, tags = self.model.config.length_unit, self.tags
        is_length = isinstance(length, int) and not isinstance(length, bool)
        if not is_length or not 1 <= length <= 99 * unit or length % unit:  # type: ignore[operator]
            raise ValueError(
                f"plan: expected a length in tokens, a multiple of {unit} up to {99 * unit}, "
                f"got {length!r}"
            )
        if isinstance(topic, str):
            if self.tokenizer is None:
                raise ValueError("plan: topics must be token ids where there is no tokenizer")
            words = self.tokenizer.encode_text(topic)
        elif _is_ids(topic):
            words = [int(token_id) for token_id in topic]  # type: ignore[attr-defined]
        else:
            words = []
        if not words:
            raise ValueError(f"plan: a topic needs words, got {topic!r}")
        number = [tags.digits[int(digit)] for digit in str(length // unit)]  # type: ignore[operator]
        if words[-1] in tags.digits and len(number) == 1:
            # "World War 2" must not run into the number.
            if self.tokenizer is None:
                raise ValueError(f"plan: a topic must not end in a digit, got {topic!r}")
            words = [*words, *self.tokenizer.encode_text(" ")]
        return [tags.topic_start, *words, *number, tags.topic_end]

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids)

    def _banned_ids(self) -> list[int]:
        """Special tokens that are no control tokens, and embedding rows without a token."""
        if self.tokenizer is None:
            return []
        vocab_size = self.model.config.vocab_size
        beyond = range(self.tokenizer.vocab_size, vocab_size)
        special = [i for i in self.tokenizer.special_ids if i < vocab_size]
        return sorted({*special, *beyond} - self.tags.control_ids)


def _checked_tags(
    tags: ControlTokens | None, tokenizer: Tokenizer | None, vocab_size: int, source: str
) -> ControlTokens:
    """Control tokens that the model has embeddings for; None takes them from the tokenizer."""
    if tags is None:
        if tokenizer is None:
            raise ValueError(
                f"tags: expected control tokens where there is no tokenizer, in {source}"
            )
        tags = tokenizer.control_tokens()
    tags.check_fit(vocab_size)
    return tags


def _recommended(checkpoint: Path) -> GenerationParams:
    """The parameters a checkpoint recommends."""
    file = find_file(checkpoint, "generation_config.json") if checkpoint.is_dir() else None
    if file is None:
        return GenerationParams()
    return recommended(read_json(file).get("pdiff", {}), str(file))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(item, _INTEGERS) and not isinstance(item, bool) for item in value)
    )


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )
