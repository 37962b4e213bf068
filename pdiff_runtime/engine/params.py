"""What a caller can set: for the engine as a whole, and for one request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import torch

from pdiff_runtime.denoise import PUBLISHED_RULES, RULES

Mode = Literal["planned", "ar", "diffusion", "fast_dllm", "skeleton"]
PLAN_MODES = ("planned", "skeleton")
ONE_SPAN_MODES = ("diffusion", "fast_dllm")
UserRound = Sequence[int] | Sequence[tuple[str | Sequence[int], int]]
"""One round of a user's plan: the token ids of its text, ending in sync or eos, or a list of
``(topic, length)`` with the topic's words (or their token ids) and the span's length in tokens, a
multiple of the model's length unit; ``length_scale`` rescales it like any other."""

MAX_TOKENS_LIMIT = 1 << 20
MAX_SAMPLES = 128
MAX_STOP_STRINGS, MAX_STOP_LEN = 16, 1024
MAX_SEED = (1 << 63) - 1
FAST_DLLM_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_requests: Requests that run at the same time; the others wait.
        max_waiting: Requests that may wait; further ones are refused.
        max_batch_tokens: Rows of one forward. What does not fit waits for the next one; a span
            that is longer runs in a forward without other spans.
        page_size: Tokens of a KV page.
        kv_cache_tokens: Room of the KV cache in tokens.
        prefix_cache: Share pages between requests that begin alike. Where weights change, what it
            holds is wrong: ``allocator.clear_cache()`` of the engine empties it.
        max_logits_rows: Logits rows that are computed at once, which bounds their memory.
        max_topics: Topics a round may have.
        max_topic_tokens: Tokens a topic may have, its number included.
        draft_plan: Let each plan forward also carry the tags that are likely to follow, for the
            model to confirm: fewer forwards, the same plan.
        batch_invariant: Make every result the same bits in any company, however prompts are cut
            into chunks, and after preemption. Matrix products then run in tiles of fixed sizes.
        pack_weights: Keep weights as products want them: on a CPU a copy of bfloat16 ones in
            another order, which takes as much memory again; elsewhere those of layers with the same
            input side by side, where the parameters become parts of one tensor.
        run_ahead: Launch a denoising step before the last one's results are read, where it is
            known that its rows are the same; events come one step later. None: on a GPU.
        cuda_graphs: On a GPU, capture denoising steps and forwards of few rows as graphs, and
            replay them: the host launches once in place of hundreds of times. Weights may change
            then, and be replaced by other tensors, but not layers by other layers.
    """

    max_requests: int = 64
    max_waiting: int = 4096
    max_batch_tokens: int = 2048
    page_size: int = 64
    kv_cache_tokens: int = 65_536
    prefix_cache: bool = True
    max_logits_rows: int = 2048
    max_topics: int = 64
    max_topic_tokens: int = 64
    draft_plan: bool = True
    batch_invariant: bool = False
    pack_weights: bool = True
    run_ahead: bool | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool | None":
                _expect(value is None or isinstance(value, bool), field.name, "a bool", value)
            elif field.type == "bool":
                _expect(isinstance(value, bool), field.name, "a bool", value)
            else:
                _expect_int(field.name, value, 1, (1 << 31) - 1)
        if self.max_topic_tokens < 2:
            raise ValueError("max_topic_tokens: expected >= 2 (a word and a number), got 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """How one request is answered.

    Attributes:
        mode: "planned": a plan, then its spans at once; "ar": token by token, no control tags;
            "diffusion": one span over the whole answer, ``max_tokens`` long with its two tags;
            "fast_dllm": the same block by block (Fast-dLLM); "skeleton": a plan, then all its spans
            at once, each token by token (skeleton-of-thought). Where the model is one whose prompt
            and answer see each other both ways (Dream, LLaDA), the span of "diffusion" and
            "fast_dllm" has no tags, and the answer ends at its first eos.
        max_tokens: Tokens after the prompt: plan, tags, spans with their pads, sync. What a plan
            leaves of them is dealt to its spans in reading order: one may be shortened, later ones
            dropped, and the answer ends with "length".
        temperature: 0 (the default) takes the most likely token.
        top_p, top_k: Filters before sampling; 1.0 and 0 (or None) are off.
        seed: Of the random numbers; None draws one.
        n: Answers to the same prompt; number i is the one that ``seed + i`` gives. They share the
            pages of the prompt.
        stop: Strings that end the answer, in reading order; the text is cut before the first one,
            and spans behind it are cancelled.
        logprobs: Return each token's log-probability.
        unmask: The rule that orders positions, see :data:`pdiff_runtime.denoise.RULES`: "entropy"
            (the default), "maskgit_plus" (probability), "topk_margin" and "origin" (random order)
            write as many per step as the schedule says; "confidence_threshold", "factor" (Wu et
            al. 2025) and "entropy_budget" (Ben-Hamu et al. 2025) as many as are sure enough. Mode
            "fast_dllm" takes "confidence_threshold" and 0.9 by default.
        steps_ratio: Steps of a round per token of its longest span, or of a block per its token.
        num_steps: Steps of a round or block, in place of `steps_ratio`.
        threshold: Probability from which "confidence_threshold" writes a position; the f of
            "factor", which writes the n surest while (n + 1) (1 - p_n) < f; the nats that
            "entropy_budget" lets the positions of a step have, without the last one's. Without
            `unmask` it means "confidence_threshold".
        alg_temp: Temperature of the order of positions; 0 takes the most certain first.
        length_scale: Tokens per unit of a topic's number; None: the model's own unit.
        block_len: Tokens of a block in mode "fast_dllm".
        block_cache: What keeps its keys and values while a block is filled: "prefix", all before
            it; "dual", all behind it too; "off", nothing.
        isolate_spans: Whether spans of a round are hidden from one another.
        kv_commit: "clean" (the default) recomputes a finished span's keys and values from its final
            tokens before anything reads them; "published" keeps those of its last denoising step.
        plan: A plan of the user's own, one entry per round; the model then only denoises.
        use_grammar: Whether plan tokens are limited to what the plan grammar allows. Without it the
            model may write a malformed plan, which ends the answer with ``"invalid_plan"``.
        record_steps: Keep each step's writes in ``Round.history``.
        compat: "published" answers as the published implementation does, mode "planned" only: no
            grammar, a plan may begin in the prompt, a reply without topics is an error, nothing is
            banned, spans overshoot `max_tokens` and the answer is cut, the threshold rule has
            quotas with a carry; and None stands for kv_commit "published", top_k 50,
            temperature 1.
    """

    mode: Mode = "planned"
    max_tokens: int = 256
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    logprobs: bool = False
    unmask: str | None = None
    steps_ratio: float = 1.0
    num_steps: int | None = None
    threshold: float | None = None
    alg_temp: float = 0.0
    length_scale: float | None = None
    block_len: int = 32
    block_cache: Literal["prefix", "dual", "off"] = "prefix"
    isolate_spans: bool = True
    kv_commit: Literal["clean", "published"] | None = None
    plan: Sequence[UserRound] | None = None
    use_grammar: bool = True
    record_steps: bool = False
    compat: Literal["published"] | None = None

    def __post_init__(self) -> None:
        _expect_one_of("mode", self.mode, get_args(Mode))
        _expect(self.compat in (None, "published"), "compat", "None or 'published'", self.compat)
        if self.compat is not None:
            _expect(self.mode == "planned", "compat", "mode='planned' with it", self.mode)
        _expect_int("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        if self.temperature is not None:
            _expect_number("temperature", self.temperature, 0.0, 1e4)
        _expect_number("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        if self.top_k is not None:
            _expect_int("top_k", self.top_k, 0, (1 << 31) - 1)
        if self.seed is not None:
            _expect_int("seed", self.seed, 0, MAX_SEED)
        _expect_int("n", self.n, 1, MAX_SAMPLES)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        is_list = isinstance(stop, Sequence) and len(stop) <= MAX_STOP_STRINGS
        is_list = is_list and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LEN for s in stop)
        _expect(is_list, "stop", f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LEN} "
                "characters", self.stop)  # fmt: skip
        object.__setattr__(self, "stop", tuple(stop))
        if self.unmask is not None:
            _expect_one_of("unmask", self.unmask, RULES if self.compat is None else PUBLISHED_RULES)
            if RULES[self.unmask].needs_threshold and self.threshold is None:
                raise ValueError(f"threshold: {self.unmask!r} needs one, got None")
        _expect_number("steps_ratio", self.steps_ratio, 0.0, 1e3, low_is_open=True)
        if self.num_steps is not None:
            _expect_int("num_steps", self.num_steps, 1, MAX_TOKENS_LIMIT)
        if self.threshold is not None:
            is_probability = self.unmask in (None, "confidence_threshold")
            _expect_number("threshold", self.threshold, 0.0, 1.0 if is_probability else 1e4)
        _expect_number("alg_temp", self.alg_temp, 0.0, 1e4)
        if self.length_scale is not None:
            _expect_number("length_scale", self.length_scale, 0.0, 1e4, low_is_open=True)
        _expect_int("block_len", self.block_len, 1, MAX_TOKENS_LIMIT)
        _expect_one_of("block_cache", self.block_cache, ("prefix", "dual", "off"))
        if self.mode == "skeleton":
            _expect(self.kv_commit != "published", "kv_commit", "'clean' in mode 'skeleton'",
                    self.kv_commit)  # fmt: skip
            _expect(self.isolate_spans is True, "isolate_spans", "True in mode 'skeleton'",
                    self.isolate_spans)  # fmt: skip
        _expect(self.kv_commit in (None, "clean", "published"), "kv_commit",
                "None, 'clean' or 'published'", self.kv_commit)  # fmt: skip
        if self.plan is not None:
            _expect(self.mode in PLAN_MODES, "plan", "a mode with plans", self.mode)
            is_list = isinstance(self.plan, Sequence) and not isinstance(self.plan, str | bytes)
            _expect(is_list and len(self.plan) > 0, "plan", "a list of rounds", self.plan)
        for name in ("isolate_spans", "use_grammar", "record_steps", "logprobs"):
            _expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))

    def resolved(self) -> GenerationParams:
        """The same with the defaults of its mode where it says None; a seed is not drawn."""
        is_published = self.compat == "published"
        has_threshold = self.mode == "fast_dllm" or self.threshold is not None
        rule = "confidence_threshold" if has_threshold else "entropy"
        temperature, top_k = (1.0, 50) if is_published else (0.0, 0)
        threshold = self.threshold
        if self.unmask is None and RULES[rule].needs_threshold and threshold is None:
            threshold = FAST_DLLM_THRESHOLD
        return dataclasses.replace(
            self,
            unmask=self.unmask or rule,
            threshold=threshold,
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=top_k if self.top_k is None else self.top_k,
            kv_commit=self.kv_commit or ("published" if is_published else "clean"),
        )

    def resolve_seed(self) -> int:
        """The seed, drawn now if none was given."""
        if self.seed is not None:
            return self.seed
        return int(torch.randint(MAX_SEED, (), device="cpu"))


def check_type(name: str, value: object, kind: type) -> None:
    """Raise ``ValueError`` unless an argument is of its type."""
    _expect(isinstance(value, kind), name, kind.__name__, value)


def recommended(fields: object, source: str) -> GenerationParams:
    """The parameters that a checkpoint recommends under "pdiff".

    Args:
        fields: The object there.
        source: Where it was found, for messages.

    Raises:
        ValueError: No object, a field that is no parameter, or one out of its range.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{source}: expected an object under 'pdiff', got {fields!r:.80}")
    known = {field.name for field in dataclasses.fields(GenerationParams)}
    if unknown := sorted(str(name) for name in fields if name not in known):
        raise ValueError(f"{source}: unknown parameter {unknown[0]!r}")
    return GenerationParams(**fields)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _expect_one_of(name: str, value: object, choices: Collection[str]) -> None:
    is_one = isinstance(value, str) and value in choices
    _expect(is_one, name, "one of " + ", ".join(map(repr, choices)), value)


def _expect_int(name: str, value: object, low: int, high: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _expect(is_int and low <= value <= high, name, f"an integer from {low} to {high}", value)  # type: ignore[operator]


def _expect_number(
    name: str, value: object, low: float, high: float, *, low_is_open: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[operator, arg-type]
    fits = fits and not (low_is_open and value == low)
    _expect(fits, name, f"a number {'above' if low_is_open else 'from'} {low} to {high}", value)
