"""Other people's checkpoints: logits as in transformers, LLaDA's against an eager reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff_runtime import Decoder, SpanLayout, load_model, ops
from pdiff_runtime.models import ModelConfig, init_weights, resolve_checkpoint, save_model
from pdiff_runtime.models.attention import PackedAttention
from pdiff_runtime.models.rope import Llama3Scaling

NUM_ROWS = 20


def logits_of(model: Decoder, ids: Tensor, *, is_causal: bool = True) -> Tensor:
    """Our logits of a sequence."""
    rows, config = len(ids), model.config
    layout = SpanLayout.causal(rows, rows)
    if not is_causal:
        layout = SpanLayout.from_segments(rows, [(rows, "full", [(0, rows)])])
    plan = ops.AttentionPlan.pack(
        [layout], num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
        head_dim=config.head_dim,
    )  # fmt: skip
    attend = PackedAttention(plan, model.cos, model.sin, torch.arange(rows))
    with torch.inference_mode():
        return model.logits(model(ids, attend))


def some_ids(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (NUM_ROWS,), generator=torch.Generator().manual_seed(0))


def shape(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads_q": 4, "num_heads_kv": 2,
        "head_dim": 8, "intermediate_size": 48, "max_position": 64,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def spread(model: torch.nn.Module) -> None:
    """Weights large enough that a mistake shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
        if parameter.ndim == 1:
            parameter.data.add_(1.0)


LLAMA3_ROPE = {  # the 4 frequencies are kept, interpolated, interpolated, and divided
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama, rope of 3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, **changes,
    )  # fmt: skip
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    spread(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = some_ids(50)
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    ours = load_model(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=1e-4, atol=1e-4)


# --- LLaDA ---------------------------------------------------------------------------------------

LLADA_CONFIG = {
    "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False, "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_size": 64, "eos_token_id": 1, "include_bias": False, "include_qkv_bias": False,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "mask_token_id": 2, "max_sequence_length": 64, "mlp_hidden_size": 48, "mlp_ratio": 4,
    "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 2, "precision": "amp_bf16", "rms_norm_eps": 1e-05, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
    "vocab_size": 60, "weight_tying": False,
}  # fmt: skip


def llada_weights() -> dict[str, Tensor]:
    """Random weights under the names of GSAI-ML/LLaDA-8B."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"wte.weight": (64, 32), "ln_f.weight": (32,), "ff_out.weight": (64, 32)}
    for layer_idx in range(2):
        layer = f"blocks.{layer_idx}"
        shapes |= {
            f"{layer}.{name}.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj")
        } | {
            f"{layer}.attn_out.weight": (32, 32), f"{layer}.ff_proj.weight": (48, 32),
            f"{layer}.up_proj.weight": (48, 32), f"{layer}.ff_out.weight": (32, 48),
            f"{layer}.attn_norm.weight": (32,), f"{layer}.ff_norm.weight": (32,),
        }  # fmt: skip
    return {
        f"model.transformer.{name}": 0.3 * torch.randn(size, generator=generator) + (len(size) == 1)
        for name, size in shapes.items()
    }


def llada_logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """An eager LLaDA: every position sees every position."""

    def norm(x: Tensor, name: str) -> Tensor:
        scale = weights[f"model.transformer.{name}.weight"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"model.transformer.{name}.weight"].T

    angle = torch.arange(len(ids))[:, None] * 500000.0 ** -(torch.arange(0, 8, 2) / 8)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 8)).transpose(0, 1)

    def rotate(x: Tensor) -> Tensor:
        rotation = torch.polar(torch.ones_like(angle), angle)
        turned = torch.complex(x[..., :4], x[..., 4:]) * rotation
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.transformer.wte.weight"][ids]
    for layer_idx in range(2):
        layer = f"blocks.{layer_idx}"
        y = norm(x, f"{layer}.attn_norm")
        q, k, v = (heads(linear(y, f"{layer}.{name}_proj")) for name in "qkv")
        seen = F.softmax(rotate(q) @ rotate(k).mT / 8**0.5, -1) @ v
        x = x + linear(seen.transpose(0, 1).flatten(1), f"{layer}.attn_out")
        y = norm(x, f"{layer}.ff_norm")
        gated = F.silu(linear(y, f"{layer}.ff_proj")) * linear(y, f"{layer}.up_proj")
        x = x + linear(gated, f"{layer}.ff_out")
    return linear(norm(x, "ln_f"), "ff_out")


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG))
    safetensors.torch.save_file(llada_weights(), tmp_path / "model.safetensors")
    return tmp_path


def test_llada_computes_what_an_eager_one_does(llada):
    model = load_model(llada, dtype=torch.float32)
    assert (model.config.full_attention, model.config.logits_shift) == (True, 0)
    assert model.config.vocab_size == 64  # rows of the embedding, not tokens
    ids = some_ids(60)
    expected = llada_logits(llada_weights(), ids)
    torch.testing.assert_close(logits_of(model, ids, is_causal=False), expected, rtol=1e-4,
                               atol=1e-4)  # fmt: skip
    assert (logits_of(model, ids) - expected).abs().max() > 0.1


def test_llada_is_saved_under_its_own_names(llada, tmp_path):
    model = load_model(llada, dtype=torch.float32)
    save_model(model, tmp_path / "again", dtype=torch.float32)
    saved = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == llada_weights().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in llada_weights().items())


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "rope_scaling": Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
            )
        },
        {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True},
        {"model_type": "qwen3", "qk_norm": True, "head_dim": 16},
        {"model_type": "Dream", "qkv_bias": True, "full_attention": True, "length_unit": 3},
        {"model_type": "dream", "qkv_bias": True, "full_attention": False},
        {"model_type": "llada", "num_heads_kv": 4, "full_attention": True, "logits_shift": 0},
        {"model_type": "llada", "tie_word_embeddings": True, "logits_shift": 0},
    ],
    ids=str,
)
def test_what_is_saved_loads_the_same(changes, tmp_path):
    model = Decoder(shape(**changes))
    spread(model)
    save_model(model, tmp_path, dtype=torch.float32)
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.config == model.config
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes", [{"qk_norm": True}, {"logits_shift": 0}, {"model_type": "llada", "logits_shift": 1}]
)
def test_a_config_that_its_family_cannot_say_is_not_saved(changes, tmp_path):
    model = Decoder(shape(**changes))
    with pytest.raises(ValueError, match=f"{[*changes][-1]}: a config.json of model_type"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dream_comes_as_published():
    config = ModelConfig.from_hf(
        {"architectures": ["DreamModel"], "attention_dropout": 0.0,
         "auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 151643,
         "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
         "initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666,
         "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "Dream",
         "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
         "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
         "use_sliding_window": False, "vocab_size": 152064}
    )  # fmt: skip
    assert config == ModelConfig(
        vocab_size=152064, hidden_size=3584, num_layers=28, num_heads_q=28, num_heads_kv=4,
        head_dim=128, intermediate_size=18944, rope_theta=1e6, qkv_bias=True, max_position=131072,
        full_attention=True, model_type="Dream",
    )  # fmt: skip


def test_silent_configs_mean_what_their_family_does():
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48,
    }  # fmt: skip
    assert ModelConfig.from_hf({"model_type": "qwen3", **sizes}).head_dim == 128
    assert ModelConfig.from_hf({"model_type": "qwen2", **sizes}).head_dim == 8
    silent = {"rms_norm_eps": None, "weight_tying": None}
    llada = ModelConfig.from_hf({**LLADA_CONFIG, **silent})
    assert (llada.rms_norm_eps, llada.tie_word_embeddings) == (1e-5, True)


def test_where_a_config_says_its_rope():
    fields = shape(rope_theta=20.0).to_hf()
    assert ModelConfig.from_hf(fields).rope_theta == 20.0
    for key in ("rope_parameters", "rope_scaling"):
        assert ModelConfig.from_hf({**fields, key: {"rope_theta": 30.0}}).rope_theta == 30.0
    both = {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}}
    config = ModelConfig.from_hf({**fields, **both})
    assert config.rope_theta == 50.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0


# --- where checkpoints lie -----------------------------------------------------------------------

OFFLINE = """
import sys, warnings
warnings.simplefilter("error")
from pdiff_runtime import load_model
print(load_model("owner/name", revision="main").config.hidden_size)
try:
    load_model("owner/other")
except ValueError as error:
    print(error)
"""


def test_the_hubs_cache_is_read_offline(tmp_path):
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    save_model(Decoder(shape()), blobs)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (blobs / name).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    result = subprocess.run(
        [sys.executable, "-P", "-c", OFFLINE], capture_output=True, text=True, timeout=120,
        env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin",
             "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "32"
    assert "'owner/other'" in lines[1]
    assert "cannot be fetched" in lines[1]


def test_only_files_of_a_checkpoint_are_fetched(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw) or str(tmp_path)
    )
    assert resolve_checkpoint("owner/name", revision="v1") == tmp_path
    names = ["config.json", "model.safetensors", "chat_template.jinja", "model.py", "old.bin",
             "original/model.safetensors", "onnx/config.json"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    fetched = huggingface_hub.utils.filter_repo_objects(names, **patterns)
    assert list(fetched) == names[:3]
    assert asked["revision"] == "v1"


def test_old_rotary_buffers_and_a_tied_heads_copy_are_left_out(tmp_path):
    model = Decoder(shape(tie_word_embeddings=True))
    init_weights(model, seed=0)
    save_model(model, tmp_path, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(tensors, file)
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_head_that_differs_is_not_tied(tmp_path):
    model = Decoder(shape())
    spread(model)
    save_model(model, tmp_path, dtype=torch.float32)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="ignored, since lm_head.weight differs"):
        again = load_model(tmp_path, dtype=torch.float32)
    assert again.config == model.config
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_weights_are_a_copy_of_the_file(tmp_path):
    save_model(Decoder(shape()), tmp_path)
    model = load_model(tmp_path)
    before = model.lm_head.weight.clone()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(model.lm_head.weight, before)


def test_a_bar_says_how_much_and_how_long(tmp_path, capsys):
    save_model(Decoder(shape()), tmp_path)
    load_model(tmp_path)
    assert capsys.readouterr().err == ""
    load_model(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "weights" in shown
    assert "kB" in shown
    assert "0:00:00" in shown
