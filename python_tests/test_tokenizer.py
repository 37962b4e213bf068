"""The tokenizer folder: prompts through the template, and tags a user may not write."""

from __future__ import annotations

import json

import pytest

from pdiff_runtime import ControlTokens
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer


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
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.from_dir(tmp_path)


def test_templates_run_in_a_sandbox(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BUNDLED_MODEL / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="unsafe|__class__|not safe"):
        Tokenizer.from_dir(tmp_path).encode_prompt("Hello")


def test_a_tokenizer_without_tags_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="<promise>-<topic>"):
        ControlTokens.from_tokenizer(tokenizer)


def test_text_that_is_no_unicode_is_named(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode at position 1"):
        tokenizer.encode_prompt("a\udcff")
