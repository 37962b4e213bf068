"""The tokenizer folder: prompts through the template, and tags a user may not write."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers, processors

from pdiff_runtime import ControlTokens
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer
from pdiff_runtime.models.byte_level_bpe import byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(BUNDLED_MODEL)


@pytest.mark.parametrize("text", ["", "Peru", " a  b\n", "São Tomé 2024 — ok", "数字 12"])
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_prompt_goes_through_the_template(tokenizer):
    ids = tokenizer.encode_prompt("Tell me about Peru.")
    assert tokenizer.decode(ids) == "<user>Tell me about Peru.<assistant>"
    chat = [
        {"role": "user", "content": "Peru?"},
        {"role": "assistant", "content": "Lima."},
        {"role": "user", "content": "Chad?"},
    ]
    text = tokenizer.decode(tokenizer.encode_prompt(chat))
    assert text == "<user>Peru?<assistant>Lima.<eos><user>Chad?<assistant>"


@pytest.mark.parametrize("tag", ["<topic>", "</async>", "<mask>", "<eos>", "<assistant>"])
def test_tags_in_a_prompt_are_refused_or_escaped(tokenizer, tag):
    with pytest.raises(ValueError, match="contains the control tag"):
        tokenizer.encode_prompt(f"Hello {tag} there")
    ids = tokenizer.encode_prompt(f"Hello {tag} there", escape=True)
    assert tokenizer.token_to_id(tag) not in ids[1:-1]
    assert tokenizer.decode(ids) == f"<user>Hello {tag} there<assistant>"


@pytest.mark.parametrize("prompt", ["", "  \n", [], [{"role": "user", "content": ""}]])
def test_empty_prompts_are_refused(tokenizer, prompt):
    with pytest.raises(ValueError, match="empty prompt"):
        tokenizer.encode_prompt(prompt)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no tokenizer\.json in .*, nor vocab\.json and merges\.txt"
    ):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.from_dir(tmp_path)


def test_a_tokenizer_without_tags_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="<promise>-<topic>"):
        ControlTokens.from_tokenizer(tokenizer)


def test_text_that_is_no_unicode_is_named(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode at position 1"):
        tokenizer.encode_prompt("a\udcff")


@pytest.mark.parametrize("prompt", [None, 7, {"role": "user", "content": "Peru"}, ["a"], [None]])
def test_prompts_that_are_none(tokenizer, prompt):
    with pytest.raises(ValueError, match="prompt: expected "):
        tokenizer.encode_prompt(prompt)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": ["Peru"]}, "expected text as content, got list"),
        ({"role": "<eos>", "content": "Peru"}, "expected a role among system, developer, user"),
        ({"content": "Peru"}, "expected a role among"),
    ],
)
def test_messages_that_are_none(tokenizer, message, expected):
    with pytest.raises(ValueError, match=expected):
        tokenizer.encode_prompt([message])


# --- templates of others -------------------------------------------------------------------------


def with_template(folder: Path, template: object) -> Tokenizer:
    """The bundled tokenizer with another template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED_MODEL / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_dir(folder)


def prompt(tokenizer: Tokenizer, *contents: str, escape: bool = False) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return tokenizer.decode(tokenizer.encode_prompt(messages, escape=escape))


LOOP = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<user>{{ messages[0].content | trim }}<eos>", "<user>Peru?<eos>"),
        ("{% for m in messages[1:] %}<user>{{ m.content }}{% endfor %}", "<user>Lima."),
        ("{% for m in messages | reverse %}<user>{{ m['content'] }}{% endfor %}",
         "<user>Lima.<user> Peru? "),
        ("{{ messages[0].content }}<eos>{{ messages[0].content }}", " Peru? <eos> Peru? "),
        ("<user>{{ messages[0].content.split('?')[0] }}", "<user> Peru"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": LOOP}],
         "<user> Peru? <user>Lima."),
        ([{"name": "only", "template": LOOP}], "<user> Peru? <user>Lima."),
        ("{% if tools or documents %}no{% endif %}{{ unheard_of }}<user>", "<user>"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_template_makes_of_the_messages(template, text, tmp_path):
    assert prompt(with_template(tmp_path, template), " Peru? ", "Lima.") == text


@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_tags_out_of_pieces_stay_text(content, tmp_path):
    template = f"{{% for m in messages %}}{{{{ {content} }}}}{{% endfor %}}"
    tokenizer = with_template(tmp_path, template)
    ids = tokenizer.encode_prompt(
        [{"role": "user", "content": " <e"}, {"role": "user", "content": "os> "}]
    )
    assert tokenizer.decode(ids).strip() == "<eos>"
    assert tokenizer.token_to_id("<eos>") not in ids


def test_escaped_tags_stay_text_wherever_the_template_puts_them(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0].content }}<eos>{{ messages[0].content }}")
    ids = tokenizer.encode_prompt("<sync/>", escape=True)
    assert tokenizer.decode(ids) == "<sync/><eos><sync/>"
    assert tokenizer.token_to_id("<sync/>") not in ids


def test_escaped_tags_stay_text_in_what_a_template_makes_of_the_rest(tmp_path):
    template = "<user>{{ messages[0].content.split('</think>')[-1] | trim }}<eos>"
    tokenizer = with_template(tmp_path, template)
    ids = tokenizer.encode_prompt("<think>x</think> <sync/> y ", escape=True)
    assert tokenizer.decode(ids) == "<user><sync/> y<eos>"
    assert tokenizer.token_to_id("<sync/>") not in ids


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # A message that stand-ins would lose, tags that the text calls for, and tags it becomes.
        ("{% if messages[0].content|length > 5 %}<user>{{ messages[0].content }}{% endif %}",
         "long enough"),
        ("{% if 'tools' in messages[0].content %}<eos>{% endif %}{{ messages[0].content }}",
         "use tools"),
        ("{{ messages[0].content | replace('_', '') }}", "<sy_nc/>"),
        ("{{ messages[0].content | tojson }}", "<sync/>"),
        ("{{ messages[0].content[:1] }}-{{ messages[0].content[1:] }}", "<sync/>"),
        ("\x005\x00{{ messages[0].content }}", "Peru"),
    ],
    ids=str,
)  # fmt: skip
def test_templates_that_leave_tags_and_text_no_longer_apart(template, text, tmp_path):
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ValueError, match="prompt: the chat template changes this text"):
        tokenizer.encode_prompt(text, escape=True)


def test_text_with_marks_in_it_survives(tokenizer):
    ids = tokenizer.encode_prompt("\x000\x00 and \x001\x00")
    assert tokenizer.decode(ids) == "<user>\x000\x00 and \x001\x00<assistant>"


def test_a_template_of_several_without_a_default_is_refused(tmp_path):
    some = [{"name": name, "template": LOOP} for name in ("rag", "tools")]
    with pytest.raises(ValueError, match=r"no default chat template among \['rag', 'tools'\]"):
        with_template(tmp_path, some)


@pytest.mark.parametrize("name", [[], {}, None])
def test_a_template_whose_name_is_none_is_used_if_alone(name, tmp_path):
    tokenizer = with_template(tmp_path, [{"name": name, "template": LOOP}])
    assert prompt(tokenizer, "Peru?") == "<user>Peru?"


# --- backends with a state, and those that fail --------------------------------------------------


def bundled_backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))


def test_padding_and_truncation_in_a_backend_are_not_obeyed():
    backend = bundled_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = "A text of more than four tokens."
    tokenizer = Tokenizer(backend, {})
    for ids in (tokenizer.encode(text), tokenizer.encode_text(text), tokenizer.encode_prompt(text)):
        assert tokenizer.decode(ids) == text
    assert backend.truncation["max_length"] == 4  # the caller's own is as it was
    assert backend.padding["length"] == 64


@pytest.mark.parametrize(
    ("tag", "config"),
    [
        ("<sync/>", {}),
        ("<plan/>", {"pdiff": {"sync": "<plan/>"}}),
        ("<end/>", {"eos_token": "<end/>"}),
        ("<fill/>", {"pad_token": "<fill/>"}),
        ("<hole/>", {"mask_token": "<hole/>"}),
    ],
)
def test_tags_that_were_added_as_plain_tokens_are_control_tags(tag, config):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate(alphabet)}
    backend = byte_level_bpe(vocab, [], {}, style="qwen2")
    backend.add_tokens([tag])
    tokenizer = Tokenizer(backend, config)
    tag_id = tokenizer.token_to_id(tag)
    assert tokenizer.encode(f"a{tag}b").count(tag_id) == 1
    assert tag_id in tokenizer.special_ids
    assert tag_id not in tokenizer.encode_text(f"a{tag}b")
    assert tokenizer.decode(tokenizer.encode_text(f"a{tag}b")) == f"a{tag}b"
    with pytest.raises(ValueError, match="contains the control tag"):
        tokenizer.encode_prompt(f"a{tag}b")


def test_copies_are_the_same_tokenizer(tokenizer):
    same = copy.deepcopy(tokenizer)
    text = "What is <sync/> 12?"
    assert same.encode(text) == tokenizer.encode(text)
    assert same.encode_text(text) == tokenizer.encode_text(text)
    assert same.encode_prompt("Hi", escape=True) == tokenizer.encode_prompt("Hi", escape=True)
    assert same.control_tokens() == tokenizer.control_tokens()
    with pytest.raises(ValueError, match="contains the control tag"):
        same.encode_prompt(text)


def test_threads_share_a_tokenizer(tokenizer):
    text = "<sync/> and words " * 500
    expected = tokenizer.encode(text), tokenizer.encode_text(text)
    results = []

    def encode() -> None:
        for _ in range(5):
            results.append((tokenizer.encode(text), tokenizer.encode_text(text)))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(result == expected for result in results)


def test_without_a_template_a_text_starts_as_the_tokenizer_says():
    backend = bundled_backend()
    eos = backend.token_to_id("<eos>")
    config = {"bos_token": "<eos>"}
    words = Tokenizer(backend, config).encode_prompt("Peru")
    backend.post_processor = processors.TemplateProcessing(
        single="<eos> $A <mask>",
        special_tokens=[("<eos>", eos), ("<mask>", backend.token_to_id("<mask>"))],
    )
    assert Tokenizer(backend, config).encode_prompt("Peru") == [eos, *words]
    assert Tokenizer(backend, {}).encode_prompt("Peru") == words  # no token for a start


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[MISSING]"}},
    ],
    ids=str,
)
def test_panics_of_the_library_are_value_errors(change, tmp_path):
    description = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | change))
    with pytest.raises(ValueError):  # noqa: PT011, RUF100
        Tokenizer.from_dir(tmp_path).encode_prompt("hello")


def test_unknown_words_are_no_tags():
    model = tokenizers.models.WordLevel({"a": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "<end>"])
    config = {"unk_token": "<unk>", "chat_template": "{{ messages[0].content }}<end>"}
    assert Tokenizer(backend, config).encode_prompt("a zebra") == [0, 1, 2]


@pytest.mark.parametrize("token_id", [-1, 1 << 32, "a"])
def test_ids_that_are_none(tokenizer, token_id):
    with pytest.raises(ValueError, match="token_ids: "):
        tokenizer.decode([token_id])


# --- vocab.json and merges.txt -------------------------------------------------------------------


def dream_folder(folder: Path, **changes: object) -> Path:
    """A small tokenizer in the files that Dream has."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġl", "Ġli", "Ġlim", "Ġlima"]
    added = {
        str(len(tokens) + i): {"content": content, "special": special, "normalized": False}
        for i, (content, special) in enumerate([("<|im_end|>", True), ("<note>", False)])
    }
    config = {
        "tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": "{{ messages[0].content }}<|im_end|>",
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ l\nĠl i\nĠli m\nĠlim a\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_vocabulary_and_merges_make_a_tokenizer(tmp_path):
    tokenizer = Tokenizer.from_dir(dream_folder(tmp_path))
    assert tokenizer.vocab_size == 262
    ids = tokenizer.encode("a lima 12 <note>")
    assert 259 in ids
    assert 261 in ids
    assert len(ids) == 1 + 1 + 1 + 1 + 1 + 1 + 1
    assert tokenizer.decode(ids) == "a lima 12 <note>"
    assert tokenizer.encode_prompt("lima")[-1] == 260
    with pytest.raises(ValueError, match="contains the control tag"):
        tokenizer.encode_prompt("<|im_end|>")


def test_a_vocabulary_and_merges_are_read_as_transformers_reads_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = dream_folder(tmp_path, tokenizer_class="Qwen2Tokenizer", auto_map={})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    for text in ("I'LL go to  Lima\n\n in 2024!", "e\u0301 数字 lima", "<note> a<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", "[]", "expected a JSON object"),
        ("vocab.json", '{"a": "b"}', "merges do not fit the vocabulary"),
        ("merges.txt", "a b c\n", "expected merges of two tokens, got 'a b c'"),
        ("merges.txt", "unheard of\n", "merges do not fit the vocabulary"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer", "pdiff": ["<async>"]}',
         "expected tags by name under 'pdiff'"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer", "bos_token": [1]}',
         "bos_token: expected a token"),
        ("tokenizer_config.json", "{}", "tokenizer_class: expected one of DreamTokenizer"),
        ("tokenizer_config.json",
         '{"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": {"9": {"content": "x"}}}',
         "added token 'x': expected id 9"),
        ("tokenizer_config.json",
         '{"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": [1]}',
         "added_tokens_decoder: expected objects"),
    ],
)  # fmt: skip
def test_damaged_vocabularies_are_named(name, text, message, tmp_path):
    (dream_folder(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_dir(tmp_path)
