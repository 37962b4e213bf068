"""Checkpoints: a folder with ``config.json`` and safetensors, local or on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.models.decoder import Decoder

BUNDLED_MODEL = Path(__file__).parent.parent / "assets" / "atlas"
"""Folder of the model that ships with the package."""

_FILES = ["*.json", "*.safetensors", "*.jinja"]


def resolve_checkpoint(path_or_hub_id: str | Path | None, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: None for the bundled model, a path, or a hub id to fetch.

    Raises:
        ValueError: Neither a folder nor a hub id of the form ``owner/name`` that can be fetched.
    """
    if path_or_hub_id is None:
        if not (BUNDLED_MODEL / "config.json").is_file():
            raise ValueError("model: this installation has no bundled model; name a folder or id")
        return BUNDLED_MODEL
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        raise ValueError(f"model: no folder {name!r}, and it is no hub id (owner/name)")
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"model: no folder {name!r}, and it cannot be fetched from the hub ({reason})"
        ) from error
    return Path(folder)


def load_model(
    path_or_hub_id: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Decoder:
    """Load a decoder for inference.

    Args:
        path_or_hub_id: A Hugging Face folder or hub id; None for the bundled model.
        dtype: The dtype of weights and computation: bfloat16, float16 or float32.
        device: Where the weights go.
        revision: Of the hub repository.

    Raises:
        ValueError: Not a checkpoint of a supported family, a damaged file, or tensors that do not
            fit; every missing, unexpected and mis-shaped tensor is in the one message.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    folder = resolve_checkpoint(path_or_hub_id, revision=revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: no config.json in {folder}")
    config = ModelConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = Decoder(config)
    tensors = _read_tensors(folder)
    _check_tensors(folder, model, tensors)
    model.load_state_dict(
        {name: tensor.to(device, dtype) for name, tensor in tensors.items()},
        strict=False,
        assign=True,
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.reset_rope(device)
    return model.eval().requires_grad_(False)


def save_model(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``model.safetensors``; tied embeddings are written once."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    tensors = {
        name: parameter.detach().to(dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if any("/" in name or name.startswith(".") for name in names):
            raise ValueError(f"model: {index} points outside its folder")
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"model: no {name} in {folder}")
        try:
            tensors |= safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"model: {file} is truncated or damaged ({error})") from error
    return tensors


def _check_tensors(folder: Path, model: Decoder, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(expected))]
    problems += [
        f"{name}: expected shape {list(expected[name])}, got {list(found[name])}"
        for name in sorted(set(expected) & set(found))
        if expected[name] != found[name]
    ]
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"model: tensors in {folder} do not fit its config: {shown}{more}")
