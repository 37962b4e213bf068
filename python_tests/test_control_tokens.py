"""Control token ids: what is refused, and how they are found in tokenizers of several makes."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pdiff_runtime.plan import PUBLISHED_NAMES, ControlTokens

IDS = {
    "topic_start": 0, "topic_end": 1, "async_start": 2, "async_end": 3,
    "sync": 4, "mask": 5, "pad": 6, "eos": 7, "digits": tuple(range(10, 20)),
}  # fmt: skip
OUR_NAMES = {"topic_start": "<topic>", "mask": "<mask>", "pad": "<pad>", "eos": "<eos>"}


def tokenizer(tags=None, merges=()):
    """Byte-level BPE with tags as special tokens, by default the published ones."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    result = tokenizers.Tokenizer(models.BPE(vocab, list(merges)))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(list(PUBLISHED_NAMES.values() if tags is None else tags))
    return result


class HuggingFaceLike:
    name_or_path = "someone/some-model"
    unk_token, unk_token_id = "<unk>", 999

    def __init__(self, backend):
        self.backend = backend

    def convert_tokens_to_ids(self, token):
        token_id = self.backend.token_to_id(token)
        return self.unk_token_id if token_id is None else token_id

    def encode(self, text, add_special_tokens=True):
        ids = self.backend.encode(text).ids
        return [*ids, 1234] if add_special_tokens else ids


class Wrapper:
    """The least that is asked for."""

    def __init__(self, backend):
        self.backend = backend

    def token_to_id(self, token):
        return self.backend.token_to_id(token)

    def encode(self, text):
        return self.backend.encode(text).ids


MAKES = [lambda backend: backend, HuggingFaceLike, Wrapper]
MAKE_IDS = ["tokenizers", "hugging_face", "wrapper"]


def test_control_tokens_are_values():
    tags = ControlTokens(**IDS)
    assert tags == ControlTokens(**{**IDS, "digits": list(IDS["digits"])})
    assert hash(tags) == hash(ControlTokens(**IDS))
    assert tags.control_ids == set(range(8))
    assert tags.banned_in_span == (0, 1, 2, 3, 4, 5, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tags.sync = 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync": -1}, "sync: expected an int >= 0, got -1"),
        ({"eos": None}, "eos: expected an int >= 0, got None"),
        ({"mask": True}, "mask: expected an int >= 0, got True"),
        ({"pad": "6"}, "pad: expected an int >= 0, got '6'"),
        ({"pad": 5}, "pad: expected an id of its own, got 5 like mask"),
        ({"digits": (4, *range(11, 20))}, r"digits\[0\]: expected an id of its own, got 4 like sy"),
        ({"digits": range(9)}, "digits: expected 10 ids, got 9"),
    ],
)
def test_wrong_ids_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ControlTokens(**{**IDS, **change})


@pytest.mark.parametrize("make", MAKES, ids=MAKE_IDS)
def test_ids_are_found_in_a_tokenizer(make):
    backend = tokenizer()
    tags = ControlTokens.from_tokenizer(make(backend))
    for field, name in PUBLISHED_NAMES.items():
        assert backend.id_to_token(getattr(tags, field)) == name
    assert [backend.id_to_token(token_id) for token_id in tags.digits] == list("0123456789")


@pytest.mark.parametrize("make", MAKES, ids=MAKE_IDS)
def test_names_override_spellings(make):
    backend = tokenizer({**PUBLISHED_NAMES, **OUR_NAMES}.values())
    tags = ControlTokens.from_tokenizer(make(backend), names=OUR_NAMES)
    assert backend.id_to_token(tags.topic_start) == "<topic>"
    assert backend.id_to_token(tags.sync) == "<sync/>"
    with pytest.raises(ValueError, match=r"names: expected fields among .*, got \['topic'\]"):
        ControlTokens.from_tokenizer(make(backend), names={"topic": "<topic>"})


@pytest.mark.parametrize("make", MAKES, ids=MAKE_IDS)
def test_one_error_lists_every_missing_tag(make):
    backend = tokenizer([name for field, name in PUBLISHED_NAMES.items() if field != "sync"])
    with pytest.raises(ValueError) as error:
        ControlTokens.from_tokenizer(make(backend), names={"pad": "[NOT THERE]"})
    message = str(error.value)
    assert "expected every control tag to be one token" in message
    assert "sync '<sync/>' is missing" in message
    assert "pad '[NOT THERE]' is missing" in message
    assert "eos" not in message


def test_one_error_lists_every_tag_that_splits():
    class Splitting(Wrapper):
        def encode(self, text):
            ids = super().encode(text)
            return ids * 2 if text in ("<async>", "[PAD]") else ids

    with pytest.raises(ValueError) as error:
        ControlTokens.from_tokenizer(Splitting(tokenizer()))
    assert "async_start '<async>' splits into 2 tokens" in str(error.value)
    assert "pad '[PAD]' splits into 2 tokens" in str(error.value)


@pytest.mark.parametrize("merge", [("1", "2"), ("9", "9"), ("2", "4")], ids="".join)
def test_tokenizers_that_merge_digits_are_refused_by_name(merge):
    backend = HuggingFaceLike(tokenizer(merges=[merge]))
    with pytest.raises(ValueError, match=r"tokenizer someone/some-model: .* merges digits"):
        ControlTokens.from_tokenizer(backend)


def test_a_digit_of_several_tokens_is_refused():
    class Prefixing(Wrapper):
        def encode(self, text):
            return [0, *super().encode(text)] if text == "7" else super().encode(text)

    with pytest.raises(ValueError, match="expected digit '7' to be one token"):
        ControlTokens.from_tokenizer(Prefixing(tokenizer()))


def test_an_object_that_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer: expected token_to_id or convert_tokens_to_id"):
        ControlTokens.from_tokenizer(object())
