"""A GGUF file: the shape of a decoder, and its tensors dequantised by the ``gguf`` package."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.models.gguf_header import DamagedError, read_header
from pdiff_runtime.models.hf_config import shown

_MODEL_TYPES = ("llama", "qwen2", "qwen3")


class GgufFile:
    """One file.

    Attributes:
        metadata: By key.
        shapes: Of all tensors, outermost dimension first.
        config: The shape of the decoder.

    Raises:
        ValueError: No GGUF file or a damaged one, no decoder that we compute, or the ``gguf``
            package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = _import_gguf()
        self._path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self._tensors = read_header(memoryview(self._bytes), self._block_size)
        except OSError as error:
            raise ValueError(f"model: cannot read {path} ({error.strerror})") from error
        except (DamagedError, ValueError) as error:  # an empty file has no map
            raise ValueError(f"model: {path} is truncated or damaged ({error})") from error
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.config = self._config()

    def read(self, name: str) -> Tensor:
        """A tensor in float32, the rows of q and k in the order of a half-split rotary embedding.

        Raises:
            ValueError: A quantisation that the ``gguf`` package cannot undo.
        """
        tensor = self._tensors[name]
        data = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.start)
        rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
        kind = self._gguf.GGMLQuantizationType(tensor.kind)
        try:
            values = self._gguf.quants.dequantize(rows, kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(
                f"model: {name} in {self._path}: the gguf package cannot dequantise {kind.name}"
            ) from error
        # float32 comes as it lies in the file, which nothing may write to.
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
        return self._unpermuted(name, values)

    def _unpermuted(self, name: str, values: Tensor) -> Tensor:
        """llama.cpp keeps q and k of a Llama as it rotates them, in pairs side by side."""
        parts = name.split(".")  # blk.0.attn_q.weight
        if self.config.model_type != "llama" or parts[-2] not in ("attn_q", "attn_k"):
            return values
        is_q = parts[-2] == "attn_q"
        num_heads = self.config.num_heads_q if is_q else self.config.num_heads_kv
        pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)

    def _config(self) -> ModelConfig:
        arch = self.metadata.get("general.architecture")
        if arch not in _MODEL_TYPES:
            raise ValueError(
                f"general.architecture: expected one of {', '.join(_MODEL_TYPES)}, got {arch!r}"
            )
        fixed = {
            "expert_count": 0,
            "attention.sliding_window": 0,
            "attention.value_length": self._get("attention.key_length", 0),
            "rope.scaling.type": "none",
            "rope.scaling.factor": 1.0,
            "rope.scale_linear": 1.0,
        }
        for key, expected in fixed.items():
            if (value := self._get(key, expected)) != expected:
                raise ValueError(f"{arch}.{key}: expected {expected!r}, got {shown(value)}")
        hidden_size, num_heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._get("attention.key_length", hidden_size // num_heads)
        if self._get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{arch}.rope.dimension_count: expected {head_dim}, as a head is wide")
        return ModelConfig(
            vocab_size=self.shapes.get("token_embd.weight", (0,))[0],
            hidden_size=hidden_size,
            num_layers=self._size("block_count"),
            num_heads_q=num_heads,
            num_heads_kv=self._get("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            intermediate_size=self._size("feed_forward_length"),
            rope_theta=self._get("rope.freq_base", 10000.0),
            rms_norm_eps=self._get("attention.layer_norm_rms_epsilon", 1e-6),
            qkv_bias="blk.0.attn_q.bias" in self.shapes,
            tie_word_embeddings="output.weight" not in self.shapes,
            max_position=self._size("context_length"),
            qk_norm=arch == "qwen3",
            model_type=arch,
        )

    def _get(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)

    def _size(self, key: str) -> int:
        value = self._get(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}: expected an integer >= 1, got {value!r}")
        return value

    def _block_size(self, kind: int) -> tuple[int, int]:
        return self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(kind)]


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "model: GGUF files need the gguf package: pip install 'pdiff_runtime[gguf]'"
        ) from error
    return gguf
