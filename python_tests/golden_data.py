"""Access to the recorded behaviour of the published implementation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from pdiff_runtime import ControlTokens, Decoder
from pdiff_runtime.models import ModelConfig

GOLDEN = Path(os.environ.get("PDIFF_GOLDEN", Path(__file__).parent / "golden"))


def load_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of ``golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def load_json(name: str) -> Any:
    """The content of ``golden/<name>.json``."""
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """``tiny_config.json`` as a ``config.json``, without the notes that none has."""
    notes = ("attention_bias", "digit_token_ids", "tags")
    kept = {name: value for name, value in fields.items() if name not in notes}
    return kept | {"model_type": "Dream"}


def recorded_tags() -> ControlTokens:
    """Control tokens of the recorded model."""
    fields = load_json("tiny_config")
    ids = fields["tags"]
    return ControlTokens(
        topic_start=ids["PROMISE_START"], topic_end=ids["PROMISE_END"],
        async_start=ids["ASYNC_START"], async_end=ids["ASYNC_END"], sync=ids["SYNC_TOKEN_ID"],
        mask=ids["MASK_TOKEN_ID"], pad=ids["PAD_TOKEN_ID"], eos=ids["EOS_TOKEN_ID"],
        digits=tuple(fields["digit_token_ids"]),
    )  # fmt: skip


def recorded_model() -> Decoder:
    """The recorded model in fp32."""
    model = Decoder(ModelConfig.from_hf(model_config(load_json("tiny_config"))))
    model.load_state_dict(safetensors.torch.load_file(GOLDEN / "tiny.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A packed boolean array."""
    return np.unpackbits(bits)[: int(np.prod(shape))].reshape(shape).astype(bool)
