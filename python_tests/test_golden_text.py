"""Padding, the data filter and the clean-up of text, as the published scripts have them."""

from __future__ import annotations

import random

import pytest
from golden_data import load_json

from pdiff_runtime import ControlTokens
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer
from pdiff_runtime.plan import published_text
from pdiff_runtime.train import hybrid_targets, pad_spans
from pdiff_runtime.train.data import DocumentEncoder, TaggedDocument
from pdiff_runtime.train.validate import check_document

RECORDED = load_json("pad_text")
TAGS = ControlTokens(
    **RECORDED["special"], topic_start=2, topic_end=3, mask=100, digits=tuple(range(101, 111))
)


@pytest.mark.parametrize("case", RECORDED["pad"], ids=lambda c: f"{c['mode']}_{len(c['ids'])}")
def test_padding(case):
    num_pads = case.get("padding")
    if case["mode"] == "stochastic":
        draw = random.Random(case["python_random_seed"])
        low, high = case["padding_low"], case["padding_high"]
        num_pads = lambda: draw.randint(low, high - 1)  # noqa: E731
    assert pad_spans(case["ids"], TAGS, num_pads) == case["out"]


def test_padding_is_not_negative():
    with pytest.raises(ValueError, match="num_pads: expected >= 0, got -1"):
        pad_spans([TAGS.async_start, TAGS.async_end], TAGS, -1)


@pytest.fixture(scope="module")
def encoder() -> DocumentEncoder:
    tokenizer = Tokenizer.from_dir(BUNDLED_MODEL)
    tags = ControlTokens.from_tokenizer(tokenizer, names=tokenizer.tag_names)
    return DocumentEncoder(tokenizer, tags, length_unit=10)


@pytest.mark.parametrize("case", RECORDED["valid_sample"], ids=lambda c: "".join(c["tokens"]))
def test_data_filter(case, encoder):
    """What the filter drops, we refuse; what it keeps, we can train on."""
    document = TaggedDocument(case.get("prompt", "Say a."), "".join(case["tokens"]))
    ids = encoder.tokenizer.encode(document.text)
    if case["valid"]:
        assert len(hybrid_targets(ids, encoder.tags).labels) == len(ids)
        return
    with pytest.raises(ValueError, match="prompt: expected|span (opened|closed) at"):
        check_document(document, encoder)


@pytest.mark.parametrize("case", RECORDED["clean_text"], ids=lambda c: repr(c["text"][:30]))
def test_text_clean_up(case):
    assert published_text(case["text"]) == case["out"]


def test_text_between_topics_of_a_line_stays():
    text = "<promise>-<topic>a 1</topic>b<promise>-<topic>c 2</topic>"
    assert published_text(text) == "b"
