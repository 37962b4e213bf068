"""The decoder against recorded logits, and checkpoints on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_data import GOLDEN, load_json, load_npz, model_config, recorded_tags, unpack

from pdiff_runtime import Decoder, SpanLayout, load_model, ops
from pdiff_runtime.models import ModelConfig, save_model
from pdiff_runtime.models.attention import PackedAttention

FORWARD = load_npz("forward")


def golden_model(folder) -> Decoder:
    (folder / "config.json").write_text(json.dumps(model_config(load_json("tiny_config"))))
    (folder / "model.safetensors").write_bytes((GOLDEN / "tiny.safetensors").read_bytes())
    return load_model(folder, dtype=torch.float32)


def attend(model: Decoder, layout: SpanLayout) -> PackedAttention:
    config = model.config
    plan = ops.AttentionPlan.pack(
        [layout], num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
        head_dim=config.head_dim,
    )  # fmt: skip
    return PackedAttention(plan, model.cos, model.sin, torch.arange(layout.num_rows))


@pytest.mark.parametrize("case", [int(c) for c in FORWARD["cases"]])
def test_logits_equal_the_published_ones(case, tmp_path):
    ids = torch.from_numpy(FORWARD[f"{case}_ids"]).long()
    visible = unpack(FORWARD[f"{case}_attend"], (len(ids), len(ids)))
    tags = recorded_tags()
    layouts = [SpanLayout.from_tokens(ids, tags, isolate_spans=joint) for joint in (True, False)]
    layouts.append(SpanLayout.causal(len(ids), len(ids)))
    layouts.append(SpanLayout.from_segments(len(ids), [(len(ids), "full", [(0, len(ids))])]))
    matching = [
        layout for layout in layouts if np.array_equal(layout.dense_mask().numpy(), visible)
    ]
    assert matching, "the recorded mask is none of ours"
    model = golden_model(tmp_path)
    with torch.inference_mode():
        logits = model.logits(model(ids, attend(model, matching[0])))
    expected = torch.from_numpy(FORWARD[f"{case}_logits"])
    assert (logits - expected).abs().max() < 2e-4


@pytest.fixture
def small() -> Decoder:
    config = ModelConfig(
        vocab_size=40, hidden_size=16, num_layers=1, num_heads_q=2, num_heads_kv=1, head_dim=8,
        intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    return Decoder(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_loads_the_same(dtype, small, tmp_path):
    save_model(small, tmp_path, dtype=torch.float32)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.config == small.config
    for name, parameter in small.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.cos, small.cos)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_stay_in_float32(small, dtype):
    cos, sin = small.cos.clone(), small.sin.clone()
    for moved in (small.to(dtype), small.to(device="cpu"), small.float()):
        assert torch.equal(moved.cos, cos)
        assert torch.equal(moved.sin, sin)
    with torch.device("meta"):
        model = Decoder(small.config).to(dtype)
    assert torch.equal(model.to_empty(device="cpu").cos, cos)


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no hub id"):
        load_model(tmp_path / "nowhere")


def test_truncated_weights_are_an_error(small, tmp_path):
    save_model(small, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_model(tmp_path)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_model(tmp_path)


def test_every_misfit_is_in_one_message(small, tmp_path):
    save_model(small, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["extra"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match="missing model.norm.weight") as error:
        load_model(tmp_path)
    assert "unexpected extra" in str(error.value)
    assert "up_proj.weight: expected shape [24, 16], got [2, 2]" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of"),
        ({"model_type": "x", "auto_map": {"AutoModel": "x.Y"}}, "remote code"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: expected type 'default'"),
        ({"num_key_value_heads": 3}, "num_heads_q: expected a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(small, change, message):
    fields = {k: v for k, v in (small.config.to_hf() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(fields)
