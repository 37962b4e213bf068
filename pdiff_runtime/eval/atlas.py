"""Exact scores on the held-out prompts of the bundled model's data.

A part of an answer is right if it says an accepted wording of its fact to the letter. An answer
with a plan is held to it: each part must be all of the span under the part's topic. One without a
plan is searched for the wordings. Which of the two it is, the answer shows, whatever the mode.

An answer that did not end by itself (cut, malformed plan, error) counts as wrong in all its parts
and is not tried again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from pdiff_runtime.engine import LLM, GenerationParams, RequestOutput
from pdiff_runtime.engine.params import UserRound
from pdiff_runtime.eval.answering import answer, topics_of
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer
from pdiff_runtime.train.synth import score
from pdiff_runtime.train.synth.score import coupled_statements

Record = dict[str, Any]
"""A held-out prompt: "prompt", "family", "seed", and "parts" with "topic", "accepted" wordings,
"entity" and "field"."""

COUPLED = "coupled"
"""The family whose parts depend on one another: reported apart from the others."""


def held_out_records() -> list[Record]:
    """Prompts that the bundled model has not seen, with what is right about each."""
    lines = (BUNDLED_MODEL / "eval.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- one answer ----------------------------------------------------------------------------------


def spans_of(record: Record, output: RequestOutput) -> list[tuple[str, int]]:
    """For each part the text of its topic's next span and its length in tokens, else none and 0."""
    spans: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for plan_round in output.rounds:
        # Topics without room have no span.
        for topic, text, length in zip(
            plan_round.topics, plan_round.spans, plan_round.lengths, strict=False
        ):
            spans[topic].append((text, length))
    return [
        spans[part["topic"]].pop(0) if spans[part["topic"]] else ("", 0) for part in record["parts"]
    ]


def is_failure(output: RequestOutput) -> bool:
    """Whether an answer did not end by itself."""
    return output.finish_reason != "stop"


def marks_of(record: Record, output: RequestOutput) -> list[bool]:
    """Right or wrong for each part of a record."""
    if is_failure(output):
        return [False] * len(record["parts"])
    if topics_of(output):
        return score(record["parts"], [text for text, _ in spans_of(record, output)])
    return score(record["parts"], answer_text=output.text)


# --- what a model can be told in advance ---------------------------------------------------------


def answer_len(llm: LLM, record: Record) -> int:
    """Tokens of the record's answer in its first wordings, rounded up to the length unit."""
    return _rounded_len(llm, " ".join(part["accepted"][0] for part in record["parts"]))


def true_plan(llm: LLM, record: Record) -> list[UserRound]:
    """The plan that announces the record's parts in their first wordings."""
    return [[(part["topic"], _rounded_len(llm, part["accepted"][0])) for part in record["parts"]]]


def _rounded_len(llm: LLM, text: str) -> int:
    unit = llm.model.config.length_unit
    return -(-len(_tokenizer(llm).encode_text(text)) // unit) * unit


def _tokenizer(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ValueError("llm: expected one with a tokenizer")
    return llm.tokenizer


# --- all answers ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """One answer with its marks.

    Attributes:
        marks: Right or wrong, for each part.
        has_room: Whether the part's span has room for an accepted wording, for each part.
        num_stated, num_repeated: Facts stated in answer to coupled parts, and those of them that
            had been stated before.
    """

    record: Record
    output: RequestOutput
    marks: list[bool]
    has_room: list[bool]
    num_stated: int
    num_repeated: int

    @classmethod
    def of(cls, llm: LLM, record: Record, output: RequestOutput) -> Scored:
        """Score an answer."""
        encode = _tokenizer(llm).encode_text
        needed = [min(len(encode(text)) for text in part["accepted"]) for part in record["parts"]]
        lengths = [length for _, length in spans_of(record, output)]
        stated = coupled_statements(record["parts"], output.text)
        return cls(
            record, output, marks_of(record, output),
            has_room=[length >= least for length, least in zip(lengths, needed, strict=True)],
            num_stated=len(stated), num_repeated=len(stated) - len(set(stated)),
        )  # fmt: skip

    @property
    def topics_exact(self) -> bool:
        """Whether the plan names the parts asked for, in their order, and nothing else."""
        return topics_of(self.output) == [part["topic"] for part in self.record["parts"]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        output = self.output
        return {
            "prompt": self.record["prompt"],
            "family": self.record["family"],
            "text": output.text,
            "marks": self.marks,
            "topics": topics_of(output),
            "finish_reason": output.finish_reason,
            "usage": dataclasses.asdict(output.usage),
        }


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a group of answers is worth, and what it cost; None where it does not apply.

    Attributes:
        num_prompts, num_facts: Answers, and their parts.
        num_failures: Answers that did not end by themselves.
        exact: Share of the parts that are right.
        topics_exact: Share of the answers whose topics are those asked for, in order.
        room: Share of the parts whose announced length holds an accepted wording.
        padding: Share of the span tokens, tags included, that are pads.
        repeated: Share of the facts stated in answer to coupled parts that had been stated before.
        critical_path, num_forwards: Mean of an answer; see :class:`pdiff_runtime.engine.Usage`.
        num_tokens: Mean tokens of an answer: plan, tags, pads and text.
        latency: Median seconds of an answer, from its submission to its end.
    """

    num_prompts: int
    num_facts: int
    num_failures: int
    exact: float
    topics_exact: float | None
    room: float | None
    padding: float | None
    repeated: float | None
    critical_path: float
    num_forwards: float
    num_tokens: float
    latency: float

    @classmethod
    def of(cls, answers: Sequence[Scored], *, has_plans: bool) -> Scores:
        """Summarise at least one answer."""
        usages = [answer.output.usage for answer in answers]
        marks = [mark for answer in answers for mark in answer.marks]
        span_tokens = sum(usage.span_tokens for usage in usages)
        num_stated = sum(answer.num_stated for answer in answers)
        return cls(
            num_prompts=len(answers),
            num_facts=len(marks),
            num_failures=sum(is_failure(answer.output) for answer in answers),
            exact=statistics.fmean(marks),
            topics_exact=statistics.fmean(a.topics_exact for a in answers) if has_plans else None,
            room=statistics.fmean(r for a in answers for r in a.has_room) if has_plans else None,
            padding=sum(u.pad_tokens for u in usages) / span_tokens if span_tokens else None,
            repeated=sum(a.num_repeated for a in answers) / num_stated if num_stated else None,
            critical_path=statistics.fmean(usage.critical_path for usage in usages),
            num_forwards=statistics.fmean(usage.num_forwards for usage in usages),
            num_tokens=statistics.fmean(len(answer.output.token_ids) for answer in answers),
            latency=statistics.median(usage.seconds for usage in usages),
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """Answers to a set of records.

    Attributes:
        answers: Each with its marks, in the records' order.
        families: Scores by family, in the order in which the families come.
        overall: Scores of all answers.
        macro_exact: Mean of the families' `exact` without the coupled one; None if that is all.
        seconds_per_prompt: Time on the wall over the number of prompts.
    """

    answers: list[Scored]
    families: dict[str, Scores]
    overall: Scores
    macro_exact: float | None
    seconds_per_prompt: float

    @property
    def finish_reasons(self) -> dict[str, int]:
        """How often answers ended how, the most frequent first."""
        reasons = collections.Counter(answer.output.finish_reason for answer in self.answers)
        return dict(reasons.most_common())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the answers, which have a ``to_dict`` of their own."""
        return {
            "macro_exact": self.macro_exact,
            "overall": dataclasses.asdict(self.overall),
            "families": {name: dataclasses.asdict(s) for name, s in self.families.items()},
            "finish_reasons": self.finish_reasons,
            "seconds_per_prompt": self.seconds_per_prompt,
        }


def evaluate(
    llm: LLM,
    records: Sequence[Record],
    params: GenerationParams | Sequence[GenerationParams] | None = None,
    *,
    batch: int = 1,
    progress: bool = False,
) -> Report:
    """Answer records and score the answers.

    Args:
        llm: A model with a tokenizer.
        records: From :func:`held_out_records`.
        params: For all, or one each; None for the model's own.
        batch: Prompts that are answered together. A model's first answers take longer than the
            later ones.
        progress: Show a bar on stderr.

    Raises:
        ValueError: No records, a model without a tokenizer, or what the engine refuses.
    """
    if not records:
        raise ValueError("records: expected at least one, got none")
    _tokenizer(llm)
    if params is None or isinstance(params, GenerationParams):
        params = [params or llm.default_params] * len(records)
    if len(params) != len(records):
        raise ValueError(f"params: expected {len(records)}, one per record, got {len(params)}")
    prompts = [record["prompt"] for record in records]
    outputs, seconds = answer(llm, prompts, params, batch=batch, progress=progress)
    answers = [Scored.of(llm, *each) for each in zip(records, outputs, strict=True)]
    has_plans = any(topics_of(output) for output in outputs)
    by_family: dict[str, list[Scored]] = collections.defaultdict(list)
    for scored in answers:
        by_family[scored.record["family"]].append(scored)
    families = {name: Scores.of(some, has_plans=has_plans) for name, some in by_family.items()}
    independent = [scores.exact for name, scores in families.items() if name != COUPLED]
    return Report(
        answers=answers,
        families=families,
        overall=Scores.of(answers, has_plans=has_plans),
        macro_exact=statistics.fmean(independent) if independent else None,
        seconds_per_prompt=seconds / len(records),
    )
