"""The atlas tokenizer: a byte-level BPE of 2048 tokens in which every digit stands alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "atlas"
VOCAB_SIZE = 2048
LENGTH_UNIT = 4

CONTROL = {
    "topic_start": "<topic>",
    "topic_end": "</topic>",
    "async_start": "<async>",
    "async_end": "</async>",
    "sync": "<sync/>",
    "mask": "<mask>",
    "pad": "<pad>",
    "eos": "<eos>",
}
USER, ASSISTANT = "<user>", "<assistant>"
SPECIAL_TOKENS = (
    "<pad>", "<eos>", USER, ASSISTANT, "<topic>", "</topic>", "<async>", "</async>", "<sync/>",
    "<mask>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}<eos>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the BPE on plain texts (prompts, topics and spans, without tags), on one thread.

    Raises:
        ValueError: The texts are too few for ``VOCAB_SIZE`` tokens.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"vocab: expected {VOCAB_SIZE}, got {tokenizer.get_vocab_size()}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": CONTROL["eos"],
        "pad_token": CONTROL["pad"],
        "mask_token": CONTROL["mask"],
        "additional_special_tokens": [
            token for token in SPECIAL_TOKENS if token not in ("<pad>", "<eos>", "<mask>")
        ],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
        "pdiff": CONTROL,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@cache
def load_tokenizer(path: Path = ASSETS / "tokenizer.json") -> Tokenizer:
    """Load a tokenizer; the bundled one by default."""
    return Tokenizer.from_file(str(path))
