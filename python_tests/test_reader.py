"""The reader: token by token it says what `visible_text` says of the whole, up to a stop string."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

import pytest

from pdiff_runtime import ControlTokens
from pdiff_runtime.engine.reader import Reader
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer
from pdiff_runtime.plan import visible_text

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

if not (BUNDLED_MODEL / "tokenizer.json").is_file():
    pytest.skip("this installation has no bundled model", allow_module_level=True)

CHARACTERS = "é 世界😀👩‍👩‍👧 naïve ﷽ \N{REPLACEMENT CHARACTER} ẞ\n\t"
"""Two, three and four bytes, joined ones, and the one that stands for broken bytes."""


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(BUNDLED_MODEL)


@functools.cache
def _tags() -> ControlTokens:
    return ControlTokens.from_tokenizer(_tokenizer(), names=_tokenizer().tag_names or None)


@functools.cache
def _byte_ids() -> tuple[int, ...]:
    """Tokens that are a part of a character."""
    decode = _tokenizer().decode
    return tuple(
        i for i in range(_tokenizer().vocab_size) if "\N{REPLACEMENT CHARACTER}" in decode([i])
    )


def _read(token_ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[Reader, list[str]]:
    """A reader that has read all tokens, and what `take` gave after each of them."""
    reader, taken = Reader(_tags(), _tokenizer().decode, stop), []
    for token_id in token_ids:
        reader.read(token_id)
        taken.append(reader.take())
    reader.finish()
    taken.append(reader.take(is_last=True))
    return reader, taken


def _joined(pieces: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


def _visible(token_ids: Sequence[int]) -> str:
    return visible_text(token_ids, _tags(), _tokenizer().decode)


def _tokens() -> st.SearchStrategy[list[int]]:
    """Words, tags, halves of characters, whole characters, in any order."""
    tags, encode = _tags(), _tokenizer().encode_text
    any_token = st.integers(0, _tokenizer().vocab_size - 1).map(lambda i: [i])
    tag = st.sampled_from(sorted(tags.control_ids)).map(lambda i: [i])
    byte = st.sampled_from(_byte_ids()).map(lambda i: [i])
    characters = st.text(st.sampled_from(CHARACTERS), max_size=4).map(encode)
    words = st.sampled_from([" the", " a b", "x", " ", "  ", "\n", "ab", "aab"]).map(encode)
    piece = st.one_of(any_token, tag, byte, characters, words)
    return st.lists(piece, max_size=25).map(_joined)


settings = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


# --- no stop string ---


@settings
@hypothesis.given(st.deferred(_tokens))
def test_reading_on_is_the_visible_text(token_ids):
    reader, taken = _read(token_ids)
    assert reader.text == _visible(token_ids)
    assert "".join(taken) == reader.text
    assert not reader.is_stopped


@settings
@hypothesis.given(st.deferred(_tokens))
def test_text_only_grows(token_ids):
    """What was said stays said, and at no time is it more than what is there."""
    reader = Reader(_tags(), _tokenizer().decode)
    before = ""
    for idx, token_id in enumerate(token_ids):
        reader.read(token_id)
        assert reader.text.startswith(before)
        assert _visible(token_ids[: idx + 1]).startswith(reader.text)
        before = reader.text


@pytest.mark.parametrize("text", ["é", "世界", "😀", "naïve 😀!", "👩‍👩‍👧", CHARACTERS])
def test_no_half_of_a_character_is_said(text):
    """A character of several tokens comes whole, with the last of them."""
    token_ids = _tokenizer().encode_text(text)
    reader, taken = _read(token_ids)
    assert reader.text == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(taken)
    first = _tokenizer().encode_text("😀")
    assert len(first) == 4
    assert _read(first)[1] == ["", "", "", "😀", ""]


def test_half_a_character_at_the_end_is_shown_as_broken():
    token_ids = _tokenizer().encode_text("a😀")[:-1]
    reader, taken = _read(token_ids)
    assert reader.text == _visible(token_ids) == "a\N{REPLACEMENT CHARACTER}"
    assert taken[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_tag_ends_a_character():
    """Halves on both sides of a tag do not make one."""
    tags, halves = _tags(), _tokenizer().encode_text("é")
    assert len(halves) == 2
    token_ids = [halves[0], tags.sync, halves[1]]
    reader, _ = _read(token_ids)
    assert reader.text == _visible(token_ids)
    assert "é" not in reader.text


def test_plans_pads_and_tags_are_hidden():
    tags, encode = _tags(), _tokenizer().encode_text
    token_ids = [
        *encode("Hi"), tags.topic_start, *encode("secret"), tags.digits[2], tags.topic_end,
        tags.async_start, *encode("one"), tags.pad, tags.pad, tags.async_end,
        tags.async_start, *encode(" two"), tags.async_end, tags.sync, *encode("three"), tags.eos,
    ]  # fmt: skip
    reader, _ = _read(token_ids)
    assert reader.text == "Hi one two three"


def test_a_long_answer_is_decoded_a_few_tokens_at_a_time():
    """Its cost is that of its tokens, once."""
    lengths = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return _tokenizer().decode(token_ids)

    reader = Reader(_tags(), decode)
    for token_id in _tokenizer().encode_text("A long answer, 世界 and 😀 included. " * 40):
        reader.read(token_id)
    assert max(lengths) <= 8


def test_broken_bytes_without_end_cost_no_more():
    """A model may write nothing but halves of characters."""
    lengths = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return _tokenizer().decode(token_ids)

    reader, half = Reader(_tags(), decode), _tokenizer().encode_text("😀")[0]
    for _ in range(300):
        reader.read(half)
    reader.finish()
    assert reader.text == _visible([half] * 300)
    assert sum(lengths) <= 300 * 20


# --- stop strings ---


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["two", "three"], "one "),
        ("one two three", ["one"], ""),
        ("one two three", ["four"], None),
        ("one two three", ["e t"], "on"),
        ("aaab", ["aab"], "a"),
        ("ab ab abc", ["abc"], "ab ab "),
        ("a 世界 b", ["界"], "a 世"),
        ("a 😀 b", ["😀"], "a "),
        ("end\n\nmore", ["\n\n"], "end"),
    ],
)
def test_the_text_is_cut_before_the_first_stop_string(text, stop, expected):
    reader, taken = _read(_tokenizer().encode_text(text), stop)
    assert reader.is_stopped == (expected is not None)
    assert reader.text == (text if expected is None else expected)
    assert "".join(taken) == reader.text


@pytest.mark.parametrize("stop", [("bc", "abc"), ("abc", "bc"), ("c", "bc", "abc")])
def test_of_those_that_end_together_the_first_to_begin_counts(stop):
    """In whatever order they are listed."""
    reader = Reader(_tags(), lambda token_ids: "xabcx" if token_ids else "", stop)
    reader.read(100)
    assert reader.text == "x"


def test_a_stop_string_spans_tokens_and_parts():
    tags, encode = _tags(), _tokenizer().encode_text
    spans = [
        [tags.async_start, *encode(text), tags.async_end] for text in ("The end", "of all", "no")
    ]
    reader, taken = _read(_joined(spans), ["end of"])
    assert reader.text == "The "
    assert "".join(taken) == "The "


def test_hidden_tokens_do_not_stop():
    tags, encode = _tags(), _tokenizer().encode_text
    token_ids = [tags.topic_start, *encode("halt"), tags.digits[1], tags.topic_end, *encode("go")]
    assert _read(token_ids, ["halt"])[0].text == "go"


def test_nothing_follows_a_stop():
    reader, _ = _read(_tokenizer().encode_text("one two three two"), ["two"])
    assert reader.text == "one "
    for token_id in _tokenizer().encode_text(" more"):
        reader.read(token_id)
    reader.finish()
    assert (reader.text, reader.take(), reader.take(is_last=True)) == ("one ", "", "")


def test_a_beginning_that_is_none_is_said_later():
    """What may become a stop string waits until it is one, or is none."""
    tokenizer = _tokenizer()
    reader, said = Reader(_tags(), tokenizer.decode, ["xyz!"]), ""
    for char, expected in [("a", "a"), ("x", "a"), ("y", "a"), ("x", "axy"), ("b", "axyxb")]:
        for token_id in tokenizer.encode_text(char):
            reader.read(token_id)
        said += reader.take()
        assert said == expected


@pytest.mark.parametrize(
    ("text", "stop", "taken"),
    [
        ("aab", ["aab"], ["", "", ""]),  # both letters wait, not the last one alone
        ("aaab", ["aab"], ["", "", "a", ""]),
        ("abac", ["abac", "ad"], ["", "", "", ""]),
        ("abad", ["abac", "ad"], ["", "", "", "ab"]),
    ],
)
def test_all_that_may_begin_a_stop_string_waits(text, stop, taken):
    reader, said = Reader(_tags(), lambda ids: "".join(map(chr, ids)), stop), []
    for char in text:
        reader.read(ord(char))
        said.append(reader.take())
    assert reader.is_stopped
    assert said == taken


def test_the_end_says_what_waited():
    reader, taken = _read(_tokenizer().encode_text("so xy"), ["xyz"])
    assert reader.text == "so xy"
    assert taken[-1] == "xy"


@settings
@hypothesis.given(
    st.deferred(_tokens),
    st.lists(
        st.text(st.sampled_from("ab aé世😀t"), min_size=1, max_size=4), min_size=1, max_size=3
    ),
)
def test_stop_strings_in_random_text(token_ids, stop):
    """The text is the visible one up to a stop string, none is in it, and none of it is taken
    back."""
    reader, taken = _read(token_ids, stop)
    text = _visible(token_ids)
    assert "".join(taken) == reader.text
    assert text.startswith(reader.text)
    assert not any(each in reader.text for each in stop)
    found = [text.find(each) for each in stop if each in text]
    if reader.is_stopped:
        assert any(text.startswith(each, len(reader.text)) for each in stop)
    else:
        assert not found
        assert reader.text == text


@settings
@hypothesis.given(
    st.deferred(_tokens), st.text(st.sampled_from("ab aé世😀t"), min_size=1, max_size=4)
)
def test_one_stop_string_is_found_where_it_first_is(token_ids, stop):
    reader, _ = _read(token_ids, [stop])
    assert reader.text == _visible(token_ids).split(stop)[0]
