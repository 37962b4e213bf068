"""`LLM` on folders of every family: which tags it finds, which modes they allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from pdiff_runtime import LLM, Decoder, GenerationParams
from pdiff_runtime.models import ModelConfig, init_weights, save_model
from pdiff_runtime.plan import PUBLISHED_NAMES
from pdiff_runtime.plan.control_tokens import MISSING

SHAPES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "Dream": {"qkv_bias": True, "full_attention": True},
    "llada": {"num_heads_kv": 4, "full_attention": True, "logits_shift": 0},
}


def write_folder(folder: Path, family: str, special: list[str], **config: object) -> Path:
    """A small random model of a family, and a byte-level tokenizer with special tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields = {"num_heads_kv": 2, **SHAPES[family]}
    model = Decoder(ModelConfig(
        model_type=family, vocab_size=len(tokens) + len(special), hidden_size=32, num_layers=2,
        num_heads_q=4, head_dim=8, intermediate_size=48, max_position=512, **fields,
    ))  # fmt: skip
    init_weights(model, seed=1)
    save_model(model, folder)
    added = {
        str(len(tokens) + i): {"content": content, "special": True, "normalized": False}
        for i, content in enumerate(special)
    }
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", SHAPES)
def test_a_planned_checkpoint_of_any_family_plans(family, tmp_path):
    llm = LLM(write_folder(tmp_path, family, [*PUBLISHED_NAMES.values()]))
    assert llm.tags.has_plan
    assert llm.default_params.mode == "planned"
    params = GenerationParams(plan=[[("a", 10)], [("b", 20)]], max_tokens=60)
    if family == "llada":  # its logits do not predict what comes next
        with pytest.raises(ValueError, match="'planned' needs logits that predict"):
            llm.generate("Hello", params)
        return
    [output] = llm.generate("Hello", params)
    assert [r.lengths for r in output.rounds] == [[10], [20]]
    assert llm.generate("Hello", GenerationParams(max_tokens=12))[0].finish_reason in (
        "stop", "length",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_language_model_writes_on(family, tmp_path):
    folder = write_folder(tmp_path, family, ["<|endoftext|>", "<|im_end|>"], eos_token="<|im_end|>")
    llm = LLM(folder)
    assert not llm.tags.has_plan
    assert llm.tags.mask == llm.tags.pad == MISSING
    assert llm.tags.eos == llm.tokenizer.token_to_id("<|im_end|>")
    assert llm.default_params.mode == "ar"
    [output] = llm.generate("Hello", GenerationParams(mode="ar", max_tokens=5))
    assert 0 < len(output.token_ids) <= 5
    assert llm.generate("Hello")[0].finish_reason in ("stop", "length")
    for mode in ("planned", "skeleton", "diffusion", "fast_dllm"):
        with pytest.raises(ValueError, match=f"mode: '{mode}' needs"):
            llm.generate("Hello", GenerationParams(mode=mode))


@pytest.mark.parametrize(
    ("family", "mask", "config"),
    [
        ("Dream", "<|mask|>", {}),
        ("Dream", "<|hidden|>", {"mask_token": "<|hidden|>"}),
        ("llada", "<|mdm_mask|>", {}),
    ],
)
def test_a_diffusion_model_fills_a_canvas(family, mask, config, tmp_path):
    special = ["<|endoftext|>", mask, "<|im_start|>"]
    llm = LLM(write_folder(tmp_path, family, special, eos_token="<|endoftext|>", **config))
    assert not llm.tags.has_plan
    assert llm.tags.mask == llm.tokenizer.token_to_id(mask)
    assert llm.tags.eos == llm.tokenizer.token_to_id("<|endoftext|>")
    assert llm.default_params.mode == "diffusion"
    for mode in ("diffusion", "fast_dllm"):
        params = GenerationParams(mode=mode, max_tokens=20, block_len=8, num_steps=6)
        [output] = llm.generate("Hello", params)
        written = set(output.token_ids)
        assert not written & {
            llm.tags.mask,
            llm.tags.eos,
            llm.tokenizer.token_to_id("<|im_start|>"),
        }
        assert len(output.token_ids) == 20 or output.finish_reason == "stop"


def test_some_tags_without_the_others_are_named(tmp_path):
    special = [name for field, name in PUBLISHED_NAMES.items() if field not in ("sync", "pad")]
    with pytest.raises(ValueError) as raised:
        LLM(write_folder(tmp_path, "qwen2", special))
    assert "sync '<sync/>' is missing" in str(raised.value)
    assert "pad '[PAD]' is missing" in str(raised.value)
    assert "topic_start" not in str(raised.value)


def test_a_language_model_without_its_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eos '<|the_end|>' is missing"):
        LLM(write_folder(tmp_path, "llama", ["<|endoftext|>"], eos_token="<|the_end|>"))
