"""GGUF files: against the model they were made of, as a whole model, and damaged."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import logits_of, shape, some_ids, spread
from tokenizers import pre_tokenizers

from pdiff_runtime import LLM, ControlTokens, Decoder, GenerationParams, load_model
from pdiff_runtime.models import Tokenizer
from pdiff_runtime.models.tensor_names import GGUF

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

TAGS = [f"<t{idx}>" for idx in range(8)]
TOKENS = [*TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "<kept>"]
MERGES = ["h e", "l l", "he ll"]
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4
TYPES = [CONTROL] * 8 + [NORMAL] * (len(TOKENS) - 9) + [USER_DEFINED]
TEMPLATE = "{% for m in messages %}<t6>{{ m.content }}<t7>{% endfor %}"
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.eos_token_id": 7, "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip


def write(
    path: Path,
    model: Decoder,
    kind: Any = Kind.F32,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A file as llama.cpp's converter writes it."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.data_alignment = (metadata or {}).get("general.alignment", writer.data_alignment)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads_q)
    writer.add_head_count_kv(config.num_heads_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        part = name.split(".")[-2]
        if arch == "llama" and part in ("q_proj", "k_proj"):  # to pairs side by side
            heads = config.num_heads_q if part == "q_proj" else config.num_heads_kv
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        of_tensor = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(
            GGUF(name), gguf.quants.quantize(values.numpy(), of_tensor), raw_dtype=of_tensor
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(**changes: Any) -> Decoder:
    model = Decoder(shape(**{"hidden_size": 32, "intermediate_size": 64, **changes}))
    spread(model)
    return model.eval().requires_grad_(False)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_the_model(family, tmp_path):
    model = random_model(**FAMILIES[family])
    again = load_model(write(tmp_path / "m.gguf", model), dtype=torch.float32)
    assert vars(again.config) == pytest.approx(vars(model.config))  # float32 in the file
    ids = some_ids(50)
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(Kind.F16, 2e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 1e-2), (Kind.Q4_1, 0.15), (Kind.Q4_0, 0.15)],
)
def test_quantised_tensors(kind, tolerance, tmp_path):
    model = random_model(model_type="qwen2", qkv_bias=True)
    again = load_model(write(tmp_path / "m.gguf", model, kind), dtype=torch.float32)
    for name, expected in model.named_parameters():
        assert (
            again.get_parameter(name) - expected
        ).abs().max() <= tolerance * expected.abs().max()
    assert any(not torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())


# --- the tokenizer -------------------------------------------------------------------------------


def test_data_are_aligned_as_the_file_says(tmp_path):
    model = random_model()
    path = write(tmp_path / "m.gguf", model, metadata={"general.alignment": 4096})
    ours = load_model(path, dtype=torch.float32)
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    model = random_model(vocab_size=len(TOKENS), max_position=256)
    return write(tmp_path / "m.gguf", model, metadata=TOKENIZER)


def test_the_tokenizer_comes_along(whole):
    tokenizer = Tokenizer.from_gguf(whole)
    assert tokenizer.encode("hello") == [TOKENS.index("hell"), TOKENS.index("o")]
    text = "Où 12 <kept>\n  ok"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert TOKENS.index("<kept>") in tokenizer.encode(text)
    assert tokenizer.encode_prompt("hell") == [6, TOKENS.index("hell"), 7]
    with pytest.raises(ValueError, match="contains the control tag '<t3>'"):
        tokenizer.encode_prompt("a <t3>")
    assert tokenizer.encode_prompt("<kept>") == [6, TOKENS.index("<kept>"), 7]  # no control tag


@pytest.mark.parametrize("style", ["llama-bpe", "qwen2"])
def test_whole_words_without_a_merge(style, tmp_path):
    """Llama's tokenizer takes a word that is in its vocabulary even where no merge leads to it."""
    metadata = TOKENIZER | {"tokenizer.ggml.pre": style, "tokenizer.ggml.merges": ["h e", "l l"]}
    path = write(tmp_path / "m.gguf", random_model(), metadata=metadata)
    whole, pieces = [TOKENS.index("hell")], [TOKENS.index("he"), TOKENS.index("ll")]
    expected = whole if style == "llama-bpe" else pieces
    assert Tokenizer.from_gguf(path).encode("hell") == expected


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_is_a_whole_model(whole, is_folder):
    names = ("topic_start", "topic_end", "async_start", "async_end", "sync", "mask", "pad", "eos")
    digits = tuple(TOKENS.index(str(digit)) for digit in range(10))
    tags = ControlTokens(**{name: idx for idx, name in enumerate(names)}, digits=digits)
    llm = LLM(whole.parent if is_folder else str(whole), tags=tags)
    (output,) = llm.generate("hello", GenerationParams(mode="ar", max_tokens=5))
    assert 1 <= len(output.token_ids) <= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "expected 'gpt2', byte-level BPE, got 'llama'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "expected one of gpt-2, .* got 'unheard-of'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "expected a type for each"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "none of them twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens: expected a list of texts"),
        ({"tokenizer.ggml.merges": ["abc"]}, "expected merges of two tokens, got 'abc'"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "merges do not fit the vocabulary"),
    ],
    ids=str,
)
def test_tokenizers_that_do_not_fit(tmp_path, change, message):
    path = write(tmp_path / "m.gguf", random_model(), metadata=TOKENIZER | change)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(path)


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    path = write(tmp_path / "m.gguf", random_model())
    assert Tokenizer.from_checkpoint(path) is None
    with pytest.raises(ValueError, match="got None"):
        Tokenizer.from_gguf(path)


def test_how_words_are_cut(tmp_path):
    pieces = {}
    for style in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        path = write(
            tmp_path / f"{style}.gguf", random_model(),
            metadata=TOKENIZER | {"tokenizer.ggml.pre": style},
        )  # fmt: skip
        cut = Tokenizer.from_gguf(path).backend.pre_tokenizer
        pieces[style] = [piece for piece, _ in cut.pre_tokenize_str("I'LL 2024\n\na")]
    assert pieces == {
        "gpt-2": ["I", "'", "LL", "Ġ2024", "Ċ", "Ċ", "a"],
        "smollm": ["I", "'", "LL", "Ġ", "2", "0", "2", "4", "Ċ", "Ċ", "a"],
        "qwen2": ["I", "'LL", "Ġ", "2", "0", "2", "4", "ĊĊ", "a"],
        "llama-bpe": ["I", "'LL", "Ġ", "202", "4", "ĊĊ", "a"],
    }


# --- what does not load --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, got 8"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type: expected 'none'"),
        ({"llama.rope.scaling.factor": 2}, "rope.scaling.factor: expected 1.0, got 2"),
        ({"llama.rope.scale_linear": 2}, "rope.scale_linear: expected 1.0, got 2"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count: expected 8"),
        ({"llama.attention.sliding_window": 16}, "sliding_window: expected 0, got 16"),
    ],
    ids=str,
)
def test_decoders_that_we_do_not_compute(tmp_path, change, message):
    path = write(tmp_path / "m.gguf", random_model(), metadata=change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_tensors_that_do_not_fit_are_in_one_message(tmp_path):
    config = shape(qkv_bias=True)
    model = Decoder(config)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    path = write(tmp_path / "m.gguf", model)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ValueError, match="missing blk.1.ffn_up.weight") as error:
        load_model(path)
    assert "unexpected blk.1.ffn_xx.weight" in str(error.value)
    assert "output_norm.weight: expected shape [32], got [7]" in str(error.value)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


NORM = string("output_norm.weight") + struct.pack("<I", 1)
HUGE = struct.pack("<Q", 1 << 60)
DAMAGES = {
    "empty": lambda d: b"",
    "no magic": lambda d: b"GGML" + d[4:],
    "version": lambda d: d[:4] + struct.pack("<I", 1) + d[8:],
    "big-endian": lambda d: d[:4] + struct.pack(">I", 3) + d[8:],
    "many tensors": lambda d: d[:8] + HUGE + d[16:],
    "many keys": lambda d: d[:16] + HUGE + d[24:],
    "long string": lambda d: d[:24] + HUGE + d[32:],
    "long array": lambda d: replaced(
        d, struct.pack("<IQ", 8, len(TOKENS)), struct.pack("<I", 8) + HUGE
    ),
    "array of arrays": lambda d: replaced(
        d, struct.pack("<IQ", 8, len(TOKENS)), struct.pack("<IQ", 9, len(TOKENS))
    ),
    "value type": lambda d: replaced(
        d, string("llama.block_count") + struct.pack("<I", 4),
        string("llama.block_count") + struct.pack("<I", 99),
    ),
    "not utf-8": lambda d: replaced(d, b"llama.block_count", b"llama.block_coun\xff"),
    "dimensions": lambda d: replaced(d, NORM, NORM[:-4] + struct.pack("<I", 9)),
    "large shape": lambda d: replaced(d, NORM + struct.pack("<Q", 32), NORM + HUGE),
    "no elements": lambda d: replaced(d, NORM + struct.pack("<Q", 32), NORM + bytes(8)),
    "tensor type": lambda d: replaced(
        d, NORM + struct.pack("<QI", 32, 0), NORM + struct.pack("<QI", 32, 200)
    ),
    "offset": lambda d: replaced(
        d, string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, len(TOKENS), 0, 0),
        string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, len(TOKENS), 0, 1 << 60),
    ),
    "twice": lambda d: replaced(d, b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage, whole):
    whole.write_bytes(DAMAGES[damage](whole.read_bytes()))
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        load_model(whole)
    assert len(str(error.value)) < 500


def test_arrays_that_would_fill_the_memory(whole):
    data = whole.read_bytes()
    half = struct.pack("<IIQ", 9, 0, 1 << 21) + bytes(1 << 21)  # an array of small integers
    (num_keys,) = struct.unpack("<Q", data[16:24])
    more = string("a") + half + string("b") + half
    whole.write_bytes(data[:16] + struct.pack("<Q", num_keys + 2) + more + data[24:])
    with pytest.raises(ValueError, match="expected arrays of 4194304 items in all, got more"):
        load_model(whole)


def test_truncated_files(whole):
    data = whole.read_bytes()
    for length in (*range(1, 400, 7), *range(400, len(data), 1009), len(data) - 1):
        whole.write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            load_model(whole)


def test_a_folder_of_several_files_is_ambiguous(whole):
    (whole.parent / "other.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"no config\.json in .*, nor one GGUF file alone"):
        load_model(whole.parent)
