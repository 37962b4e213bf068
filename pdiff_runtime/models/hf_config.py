"""What a Hugging Face ``config.json`` says of a decoder, for every family that we compute.

Only listed keys are read. A key that asks for code, or for something this decoder does not compute,
is refused; one that is not listed at all is named in a warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from pdiff_runtime.models.rope import Llama3Scaling

_STANDARD_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads_q": ("num_attention_heads",),
    "num_heads_kv": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size",),
    "rms_norm_eps": ("rms_norm_eps",),
    "qkv_bias": ("attention_bias",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "max_position": ("max_position_embeddings",),
}
_LLADA_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("embedding_size", "vocab_size"),
    "hidden_size": ("d_model",),
    "num_layers": ("n_layers",),
    "num_heads_q": ("n_heads",),
    "num_heads_kv": ("n_kv_heads",),
    "intermediate_size": ("mlp_hidden_size",),
    "rms_norm_eps": ("rms_norm_eps",),
    "qkv_bias": ("include_qkv_bias",),
    "tie_word_embeddings": ("weight_tying",),
    "max_position": ("max_sequence_length",),
}
_REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_heads_q", "intermediate_size")

_PLAIN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2")
_NO = (None, False)

_ALWAYS_FIXED: Mapping[str, tuple[Any, ...]] = {
    "trust_remote_code": _NO,
    "custom_generate": (None,),
    "custom_pipelines": (None,),
    "attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation_internal": _PLAIN_ATTENTION,
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": _NO,
    "add_cross_attention": _NO,
    "pruned_heads": (None, {}),
    "attention_multiplier": (None,),
    "dual_chunk_attention_config": (None,),
    "embedding_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "no_rope_layers": (None, []),
    "original_max_position_embeddings": (None,),
    "residual_multiplier": (None, 1.0),
    "text_config": (None,),
}
_STANDARD_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "mlp_bias": _NO,
    "use_sliding_window": _NO,
    "rope_interleaved": _NO,
    "partial_rotary_factor": (None, 1.0),
    "attention_sinks": _NO,
    "logit_scale": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
}
_LLADA_FIXED: Mapping[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "rope": (True,),
    "alibi": _NO,
    "include_bias": _NO,
    "bias_for_layer_norm": _NO,
    "attention_layer_norm": _NO,
    "input_emb_norm": _NO,
    "scale_logits": _NO,
    "multi_query_attention": _NO,
    "block_group_size": (1, None),
}

# Known, and without a bearing on what is computed: ids, training, generation, bookkeeping.
_NOT_READ = frozenset(
    ("_attn_implementation_autoset", "_name_or_path", "alibi_bias_max", "architectures",
     "attention_dropout", "attention_layer_norm_with_affine", "auto_map", "bos_token_id",
     "chunk_size_feed_forward", "dtype", "embedding_dropout", "eos_token_id", "flash_attention",
     "id2label", "init_cutoff_factor", "init_device", "init_fn", "init_std", "initializer_range",
     "is_llama_config", "label2id", "mask_token_id", "max_window_layers", "mlp_ratio",
     "model_max_length", "name_or_path", "output_attentions", "output_hidden_states",
     "pad_token_id", "precision", "pretraining_tp", "problem_type", "residual_dropout",
     "return_dict", "rope_full_precision", "sliding_window", "tokenizer_class", "torch_dtype",
     "torchscript", "transformers.js_config", "transformers_version", "unk_token_id", "use_cache")
)  # fmt: skip
_READ_APART = frozenset(
    ("model_type", "rope_theta", "rope_parameters", "rope_scaling", "layer_types", "length_unit",
     "full_attention")
)  # fmt: skip

_LLAMA3_KEYS: Mapping[str, str] = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one ``model_type`` says what it is.

    Attributes:
        keys: A field of :class:`ModelConfig` -> the keys that may give it, the first first.
        fixed: A key -> the values it may have, the one to write first; None allows silence.
        defaults: What a silent config means, by field of :class:`ModelConfig`.
        implied: What no config of the family says, by field of :class:`ModelConfig`.
        is_remote: Whether transformers knows the family by code from the hub only. Their
            ``auto_map`` is not read: we compute these families ourselves.
    """

    keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: _STANDARD_KEYS)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: _STANDARD_FIXED
    )
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_remote: bool = False


_DREAM = Family(defaults={"qkv_bias": True, "full_attention": True}, is_remote=True)
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(defaults={"qkv_bias": True}),
    "qwen3": Family(defaults={"head_dim": 128}, implied={"qk_norm": True}),
    "Dream": _DREAM,
    "dream": _DREAM,
    "llada": Family(
        keys=_LLADA_KEYS, fixed=_LLADA_FIXED, is_remote=True,
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "full_attention": True},
        implied={"logits_shift": 0},
    ),
}  # fmt: skip
"""The families by ``model_type``."""


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`ModelConfig`.

    Raises:
        ValueError: An unknown family, a missing key, or one that asks for what we do not do.
    """
    family = _family(fields)
    for key, allowed in {**_ALWAYS_FIXED, **family.fixed}.items():
        _check(key, fields.get(key), allowed)
    _warn_of_unread(fields, family)
    missing = [
        family.keys[field][-1] for field in _REQUIRED if _first(fields, family.keys[field]) is None
    ]
    if missing:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    values = {field: _first(fields, keys) for field, keys in family.keys.items()}
    values |= {name: fields.get(name) for name in ("length_unit", "full_attention")}
    values = {field: value for field, value in values.items() if value is not None}
    values = {**family.defaults, **values, **family.implied, "model_type": fields["model_type"]}
    values.setdefault("num_heads_kv", values["num_heads_q"])
    if "head_dim" not in values:
        values["head_dim"] = _head_dim(values["hidden_size"], values["num_heads_q"])
    _check_layer_types(fields.get("layer_types"), values["num_layers"])
    return values | _rope(fields)


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`parse`, for the fields of a :class:`ModelConfig`.

    Raises:
        ValueError: No family of that ``model_type``.
    """
    family = _family(values)
    fields = {"model_type": values["model_type"], "rope_theta": values["rope_theta"]}
    fields |= {key: values[field] for field, keys in family.keys.items() for key in keys}
    fields |= {key: allowed[0] for key, allowed in family.fixed.items() if allowed[0] is not None}
    if values["rope_scaling"] is not None:
        scaling = {key: values["rope_scaling"][field] for field, key in _LLAMA3_KEYS.items()}
        fields["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return fields | {name: values[name] for name in ("length_unit", "full_attention")}


def _family(fields: Mapping[str, Any]) -> Family:
    model_type, auto_map = fields.get("model_type"), fields.get("auto_map")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if auto_map is not None and not (family and family.is_remote):
        raise ValueError(
            f"config.json: auto_map of a {shown(model_type)} model asks for remote code, which is "
            "never run"
        )
    if family is None:
        raise ValueError(f"model_type: expected one of {sorted(FAMILIES)}, got {shown(model_type)}")
    return family


def _check(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        expected = " or ".join(repr(each) for each in allowed if each is not None) or "none"
        raise ValueError(f"{key}: expected {expected}, got {shown(value)}")


def _check_layer_types(layer_types: Any, num_layers: Any) -> None:
    if layer_types is not None and not (
        isinstance(layer_types, list)
        and len(layer_types) == num_layers
        and all(each == "full_attention" for each in layer_types)
    ):
        raise ValueError(
            f"layer_types: expected 'full_attention' for each of {shown(num_layers)} layers, got "
            f"{shown(layer_types)}"
        )


def _warn_of_unread(fields: Mapping[str, Any], family: Family) -> None:
    read = {key for keys in family.keys.values() for key in keys} | set(_ALWAYS_FIXED)
    known = read | set(family.fixed) | _NOT_READ | _READ_APART
    unread = sorted(key for key in set(fields) - known if fields[key])
    if unread:
        names = ", ".join(key[:40] for key in unread[:20])
        warnings.warn(f"config.json: keys that are not read: {names}", stacklevel=4)


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What newer configs say under ``rope_parameters``, older ones under ``rope_scaling``."""
    stated = [
        _rope_of(key, fields[key], fields.get("rope_theta"))
        for key in ("rope_parameters", "rope_scaling")
        if fields.get(key)
    ]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise ValueError("rope_parameters, rope_scaling: expected two that agree, or one of them")
    return stated[0] if stated else _rope_of("rope_parameters", {}, fields.get("rope_theta"))


def _rope_of(key: str, rope: Any, theta: Any) -> dict[str, Any]:
    """One of the two objects; ``theta`` is the ``rope_theta`` beside it."""
    if not isinstance(rope, dict):
        raise ValueError(f"{key}: expected an object, got {shown(rope)}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{key}: expected type 'default' or 'llama3', got {shown(rope_type)}")
    _check("partial_rotary_factor", rope.get("partial_rotary_factor"), (None, 1.0))
    theta = rope.get("rope_theta", theta)
    values = {} if theta is None else {"rope_theta": theta}
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if rope_type == "llama3":
        known |= set(_LLAMA3_KEYS.values())
        missing = [name for name in _LLAMA3_KEYS.values() if name not in rope]
        if missing:
            raise ValueError(f"{key}: missing {', '.join(missing)}")
        scaling = {field: rope[name] for field, name in _LLAMA3_KEYS.items()}
        values["rope_scaling"] = Llama3Scaling(**scaling)
    unknown = [name for name in rope if name not in known and rope[name] is not None]
    if unknown:
        raise ValueError(f"{key}: type {rope_type!r} takes no {shown(unknown[0])}")
    return values


def _first(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def _head_dim(hidden_size: Any, num_heads: Any) -> int:
    """The width of a head where the config leaves it to be divided."""
    are_sizes = isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0
    if not are_sizes or hidden_size % num_heads:
        raise ValueError(
            f"hidden_size: expected a multiple of the number of heads, got {shown(hidden_size)} "
            f"and {shown(num_heads)}"
        )
    return hidden_size // num_heads


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
