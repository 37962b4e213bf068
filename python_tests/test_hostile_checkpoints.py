"""Damaged and hostile checkpoints: each is refused with one message, before it costs anything."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pdiff_runtime import LLM, ControlTokens, Decoder, load_model
from pdiff_runtime.models import BUNDLED_MODEL, ModelConfig, init_weights, save_model
from pdiff_runtime.models.safetensors_folder import SafetensorsFolder

SHAPE = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads_q=2, num_heads_kv=1, head_dim=8,
    intermediate_size=24,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Decoder(SHAPE)
    init_weights(model, seed=0)
    save_model(model, tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def refused(folder: Path, message: str) -> str:
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert len(str(error.value)) < 2000
    return str(error.value)


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map of a 'llama' model asks for remote code"),
        ({"model_type": "evil", "auto_map": {"AutoModel": "x.Y"}}, "remote code"),
        ({"model_type": ["llama"]}, "model_type: expected one of"),
        ({"model_type": None}, "model_type: expected one of"),
        ({"trust_remote_code": True}, "trust_remote_code: expected"),
        ({"custom_generate": "owner/name"}, "custom_generate: expected none"),
        ({"_attn_implementation": "owner/kernel"}, "_attn_implementation: expected"),
        ({"attn_implementation": "owner/kernel:fn"}, "attn_implementation: expected"),
        ({"_attn_implementation_internal": "mine"}, "_attn_implementation_internal: expected"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: expected none"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected"),
        ({"layer_types": ["full_attention"]}, "layer_types: .* for each of 2 layers"),
        ({"no_rope_layers": [1]}, "no_rope_layers: expected"),
        ({"logits_scaling": 8.0}, "logits_scaling: expected 1.0, got 8.0"),
        ({"attention_multiplier": 0.5}, "attention_multiplier: expected none, got 0.5"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config: expect"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: expected False"),
        ({"num_local_experts": 8}, "num_local_experts: expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": -1, "low_freq_factor": 1,
                           "high_freq_factor": 4, "original_max_position_embeddings": 8}},
         "rope_scaling: factor: expected a number > 0, got -1"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}},
         "rope_scaling: type 'default' takes no 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
         "rope_parameters: type 'default' takes no 'full_attention'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
         "rope_parameters, rope_scaling: expected two that agree"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
         "rope_scaling: expected type 'default' or 'llama3', got 'linear'"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a number > 0, got nan"),
        ({"rope_theta": 10**400}, "rope_theta: expected a number > 0, got 1000"),
        ({"rope_theta": "10000"}, "rope_theta: expected a number > 0, got '10000'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a number > 0, got -1.0"),
        ({"num_hidden_layers": 10**9}, "num_layers: expected an integer from 1 to 1024"),
        ({"hidden_size": 10**4000}, "hidden_size: expected an integer from 1 to 65536"),
        ({"vocab_size": -5}, "vocab_size: expected an integer from 1 to 4194304, got -5"),
        ({"max_position_embeddings": 1 << 62}, "max_position: expected an integer from 1 to"),
        ({"intermediate_size": 24.0}, "intermediate_size: expected an integer"),
        ({"num_attention_heads": True, "head_dim": 8}, "num_heads_q: expected an integer"),
        ({"num_attention_heads": 0, "head_dim": None}, "hidden_size: expected a multiple"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"full_attention": 1}, "full_attention: expected true or false"),
        ({"length_unit": 0}, "length_unit: expected an integer"),
        ({"model_type": "llada"}, "block_type: expected 'llama', got None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_keys_that_ask_for_what_we_do_not_do(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"a": ' * 100_000, "not valid JSON .maximum recursion"),
        (b'{"model_type": "\xff"}', "not UTF-8"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model_type": "' + b"x" * 50_000 + b'"}', "model_type: expected one of"),
    ],
    ids=["empty", "open", "list", "deep", "latin", "digits", "long"],
)
def test_configs_that_are_no_json(folder, text, message):
    (folder / "config.json").write_bytes(text)
    refused(folder, message)


def test_a_large_config_is_not_read(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # takes no space
    refused(folder, "expected at most")


def test_unknown_keys_are_named_and_others_are_not(folder):
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"torch_dtype": "bfloat16", "architectures": ["X"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
    file.write_text(json.dumps(fields | {"my_note": [1], "wandb": None}))
    with pytest.warns(UserWarning, match="keys that are not read: my_note$"):
        load_model(folder)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "bogus"}, "device: cannot use 'bogus'"),
        ({"device": "cuda:99"}, "device: cannot use 'cuda:99'"),
        ({"device": "meta"}, "device: expected one with memory, got 'meta'"),
        ({"dtype": "float32"}, "dtype: expected torch.bfloat16, .*, got 'float32'"),
        ({"revision": "main"}, "revision: expected none for .*, got 'main'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder, **arguments)


def test_a_path_too_long_for_any_folder():
    with pytest.raises(ValueError, match="model: cannot look for 'xxx.*File name too long"):
        load_model("x" * 5000)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        ModelConfig.from_file(tmp_path / "config.json")


# --- safetensors ---------------------------------------------------------------------------------


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = header_of(file)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEAD, NORM = "lm_head.weight", "model.norm.weight"
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "beyond the file": lambda h: h[HEAD].update(data_offsets=[0, 1 << 50], shape=[1 << 48]),
    "backwards": lambda h: h[HEAD].update(data_offsets=[64, 0]),
    "overlapping": lambda h: h[NORM].update(data_offsets=h[HEAD]["data_offsets"], shape=[40, 16]),
    "shape does not fit": lambda h: h[HEAD].update(shape=[40, 17]),
    "dtype does not fit": lambda h: h[HEAD].update(dtype="F64"),
    "unknown dtype": lambda h: h[HEAD].update(dtype="Q4"),
    "negative shape": lambda h: h[HEAD].update(shape=[-40, -16]),
    "overflowing shape": lambda h: h[HEAD].update(shape=[1 << 40, 1 << 40]),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie, folder):
    with_header(folder / "model.safetensors", LIES[lie])
    refused(folder, "truncated or damaged")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x01", struct.pack("<Q", 1 << 60), struct.pack("<Q", 50) + b"{}",
     struct.pack("<Q", 100_000) + b"[" * 100_000],
    ids=["empty", "one byte", "huge header", "short header", "deep header"],
)  # fmt: skip
def test_files_that_are_no_safetensors(data, folder):
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "truncated or damaged")


def test_a_header_of_gigabytes_is_not_read(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(200 << 20)
    refused(folder, "truncated or damaged .its header is too long")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_files(folder, kept):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    refused(folder, "truncated or damaged")


def test_a_file_that_shrinks_while_it_is_read(folder):
    weights = SafetensorsFolder(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match="was cut off while it was read"):
        weights.read(NORM)


def test_tensors_that_are_no_floats(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[NORM] = torch.ones(16, dtype=torch.int8)
    safetensors.torch.save_file(tensors, file)
    refused(folder, "model.norm.weight in .*: expected one of BF16, F16, F32, F64, got I8")


def test_weights_in_another_format_are_not_looked_for(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no model.safetensors in")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_once(folder, value):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    tensors[NORM][0] = value
    safetensors.torch.save_file(tensors, file)
    with pytest.warns(UserWarning, match="are not finite") as caught:
        load_model(folder)
    (warning,) = caught
    assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in str(warning.message)
    assert "lm_head" not in str(warning.message)


def test_finite_weights_whose_sum_is_not_are_no_matter(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[HEAD].fill_(6e4)
    safetensors.torch.save_file(tensors, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder, dtype=torch.float16)


# --- shards --------------------------------------------------------------------------------------


def shard(folder: Path) -> dict[str, str]:
    """Split into two files with an index, and return its ``weight_map``."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    weight_map = {name: f"part-{idx % 2}.safetensors" for idx, name in enumerate(sorted(tensors))}
    for part in sorted(set(weight_map.values())):
        some = {name: tensors[name] for name, of_part in weight_map.items() if of_part == part}
        safetensors.torch.save_file(some, folder / part)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("../part-0.safetensors", "expected the name of a file"),
        ("/etc/x.safetensors", "expected the name of a file"),
        ("a/part-0.safetensors", "expected the name of a file"),
        ("a\\part-0.safetensors", "expected the name of a file"),
        ("\0.safetensors", "expected the name of a file"),
        (".hidden.safetensors", "expected the name of a file"),
        ("x" * 5000 + ".safetensors", "cannot look for 'xxx"),
        ("part-7.safetensors", "no part-7.safetensors in"),
        ("part-0.bin", "expected names of safetensors files"),
        (7, "expected names of safetensors files"),
        (["part-0.safetensors"], "expected names of safetensors files"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_index_that_points_elsewhere(folder, part, message):
    weight_map = shard(folder)
    load_model(folder)
    write_index(folder, weight_map | {HEAD: part})
    refused(folder, message)


@pytest.mark.parametrize("weight_map", [None, {}, [], "part-0.safetensors"])
def test_an_index_without_a_map(folder, weight_map):
    shard(folder)
    write_index(folder, weight_map)
    refused(folder, "expected files by tensor under 'weight_map'")


def test_a_shard_that_lacks_what_the_index_says(folder):
    weight_map = shard(folder)
    file = folder / weight_map[NORM]
    tensors = safetensors.torch.load_file(file)
    del tensors[NORM]
    safetensors.torch.save_file(tensors, file)
    refused(folder, f"missing {NORM}")


def test_a_single_file_goes_before_an_index(folder):
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(whole)
    write_index(folder, {HEAD: "part-7.safetensors"})
    load_model(folder)


def test_a_tensor_in_two_shards(folder):
    shard(folder)
    for part in ("part-0.safetensors", "part-1.safetensors"):
        tensors = safetensors.torch.load_file(folder / part)
        tensors[NORM] = torch.ones(16)
        safetensors.torch.save_file(tensors, folder / part)
    refused(folder, f"{NORM} is in two files")


def test_an_embedding_of_another_vocabulary(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 48}))
    message = refused(folder, r"lm_head.weight: expected shape \[48, 16\], got \[40, 16\]")
    assert "model.embed_tokens.weight: expected shape [48, 16], got [40, 16]" in message


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_that_lead_out_of_the_folder(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    refused(folder, "is a link that leads out of its folder")


def test_links_within_the_folder_and_to_it(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    link = folder.parent / "link"
    link.symlink_to(folder)
    load_model(link)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_to_nothing_and_to_a_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nothing")
    with pytest.raises(ValueError, match=f"expected a file at .*{name}"):
        LLM(folder)
    (folder / "nothing").mkdir()
    with pytest.raises(ValueError, match=f"expected a file at .*{name}"):
        LLM(folder)


@pytest.mark.parametrize("target", ["/no/such/file", "/dev/zero"])
def test_links_out_of_the_folder_to_no_file(folder, target):
    (folder / "model.safetensors.index.json").symlink_to(target)
    refused(folder, "index.json is a link that leads out of its folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_without_permission(folder, name):
    (folder / name).chmod(0)
    refused(folder, f"{name}.*Permission denied")


def test_links_in_a_circle(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    refused(folder, "cannot look for 'config.json'|expected a file at")  # before and from 3.13 on


def test_only_a_snapshot_of_the_hubs_cache_has_a_repository(folder, tmp_path):
    snapshot = tmp_path / "name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "config.json").rename(tmp_path / "name" / "config.json")
    (snapshot / "config.json").symlink_to("../../config.json")
    refused(snapshot, "is a link that leads out of its folder")


def test_a_snapshot_may_not_leave_its_repository(folder, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "config.json").rename(tmp_path / "config.json")
    (snapshot / "config.json").symlink_to(tmp_path / "config.json")
    refused(snapshot, "is a link that leads out of its folder")


# --- tags ----------------------------------------------------------------------------------------


def bundled_with(tmp_path: Path, **changes: Any) -> Path:
    """The bundled model's tokenizer and a random model, with changes to its config."""
    fields = json.loads((BUNDLED_MODEL / "config.json").read_text()) | changes
    save_model(Decoder(ModelConfig.from_hf(fields)), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BUNDLED_MODEL / name).read_bytes())
    return tmp_path


def test_a_vocabulary_too_small_for_a_tag(tmp_path):
    bundled_with(tmp_path, vocab_size=5)
    with pytest.raises(ValueError, match="tags: expected ids below the model's vocab_size=5") as e:
        LLM(tmp_path)
    assert "digits[9]=" in str(e.value)
    assert "sync=" in str(e.value)


def test_tags_are_checked_before_weights(tmp_path):
    bundled_with(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 5}))
    with pytest.raises(ValueError, match="tags: expected ids below the model's vocab_size=5"):
        LLM(tmp_path)


def test_tags_that_are_missing_or_split(tmp_path):
    bundled_with(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["pdiff"] |= {"sync": "<nothing>", "topic_start": "no one token"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sync '<nothing>' is missing") as error:
        LLM(tmp_path)
    assert "topic_start 'no one token' is missing" in str(error.value)


def test_a_tag_of_several_tokens(tmp_path):
    bundled_with(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<async>"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"async_start '<async>' splits into 5 tokens"):
        LLM(tmp_path)


def test_a_checkpoint_without_a_tokenizer(folder):
    with pytest.raises(ValueError, match=f"where there is no tokenizer, in {folder}"):
        LLM(folder)
    tags = ControlTokens(
        topic_start=10, topic_end=11, async_start=12, async_end=13, sync=14, mask=15, pad=16,
        eos=17, digits=tuple(range(10)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected token ids where there is no tokenizer"):
        LLM(folder, tags=tags).generate("Hello")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["open", "latin", "deep"])
def test_damaged_tokenizers(tmp_path, name, text):
    bundled_with(tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match="cannot read|not UTF-8|not valid JSON"):
        LLM(tmp_path)
