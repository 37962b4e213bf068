"""Checkpoints: a folder as Hugging Face writes it, local or on the hub, or a GGUF file."""

from __future__ import annotations

import dataclasses
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from torch import Tensor

from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.models.decoder import Decoder
from pdiff_runtime.models.files import find_file
from pdiff_runtime.models.gguf_file import GgufFile
from pdiff_runtime.models.hf_config import shown
from pdiff_runtime.models.safetensors_folder import SafetensorsFolder, write_tensors
from pdiff_runtime.models.tensor_names import GGUF, TensorNames, names_of

BUNDLED_MODEL = Path(__file__).parent.parent / "assets" / "atlas"
"""Folder of the model that ships with the package."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
_NUM_READERS = 2  # one waits for the disk while another copies
_MAX_SHOWN = 20


class Weights(Protocol):
    """Tensors of a checkpoint by the names it gives them."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """A new tensor on the CPU, in some float dtype."""


def resolve_checkpoint(path_or_hub_id: str | Path | None, *, revision: str | None = None) -> Path:
    """The folder or GGUF file of a checkpoint: None for the bundled model, a path, or a hub id.

    A folder without ``config.json`` but with one GGUF file stands for that file. The hub's own
    environment variables (``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``) hold.

    Raises:
        ValueError: Neither a path nor a hub id of the form ``owner/name`` that can be fetched, or a
            revision of what is no hub id.
    """
    checkpoint = _local_checkpoint(path_or_hub_id)
    if checkpoint is None:
        return _fetched(str(path_or_hub_id), revision)
    if revision is not None:
        raise ValueError(f"revision: expected none for {checkpoint}, got {revision!r}")
    return checkpoint


def _local_checkpoint(path_or_hub_id: str | Path | None) -> Path | None:
    """A checkpoint on this machine; None for what must be a hub id."""
    if path_or_hub_id is None:
        if not (BUNDLED_MODEL / "config.json").is_file():
            raise ValueError("model: this installation has no bundled model; name a folder or id")
        return BUNDLED_MODEL
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, no permission
        raise ValueError(f"model: cannot look for {shown(name)} ({error.strerror})") from error
    if is_dir:
        ggufs = list(path.glob("*.gguf"))
        is_gguf = len(ggufs) == 1 and not (path / "config.json").is_file()
        return find_file(path, ggufs[0].name) or path if is_gguf else path
    if is_file and path.suffix == ".gguf":
        return path
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        raise ValueError(f"model: no folder {name!r}, and it is no hub id (owner/name)")
    return None


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a repository in the hub's cache, fetched if it is not there."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
        )
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
    progress: bool = False,
) -> Decoder:
    """Load a decoder for inference.

    Each tensor is read by itself, brought to the device and the dtype, and let go of before the
    next but one, so that memory holds the weights once. Those not finite are named in a warning.

    Args:
        path_or_hub_id: A Hugging Face folder, a GGUF file or a hub id; None for the bundled model.
        dtype: The dtype of weights and computation: bfloat16, float16 or float32.
        device: Where the weights go.
        revision: Of the hub repository.
        progress: Show a bar with bytes and seconds on stderr.

    Raises:
        ValueError: Not a checkpoint of a supported family, a damaged file, or tensors that do not
            fit; every missing, unexpected and mis-shaped tensor is in the one message. Or no such
            device.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"dtype: expected torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}"
        )
    device = _checked(device)
    checkpoint = resolve_checkpoint(path_or_hub_id, revision=revision)
    config, weights, name_of = _open(checkpoint)
    if config.tie_word_embeddings and _has_own_head(weights, name_of, dtype):
        warnings.warn(
            f"model: tie_word_embeddings in {checkpoint} is ignored, since "
            f"{name_of('lm_head.weight')} differs from the embedding",
            stacklevel=2,
        )
        config = dataclasses.replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Decoder(config)
    _check_tensors(checkpoint, model, weights, name_of)
    state, not_finite = _read(model, weights, name_of, dtype, device, progress)
    if not_finite:
        warnings.warn(
            f"model: weights in {checkpoint} are not finite as {dtype}: {_listed(not_finite)}",
            stacklevel=2,
        )
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.reset_rope(device)
    return model.eval().requires_grad_(False)


def read_config(checkpoint: Path) -> ModelConfig:
    """The shape of the decoder in a folder or a GGUF file.

    Raises:
        ValueError: As :func:`load_model`, which it spares where something else does not fit.
    """
    return _open(checkpoint)[0]


def save_model(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``model.safetensors``; tied embeddings are written once.

    Raises:
        ValueError: The family of the model's ``model_type`` has no config that says what it is.
    """
    text = json.dumps(model.config.to_hf(), indent=2) + "\n"
    name_of = names_of(model.config.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text, "utf-8")
    tensors = {
        name_of(name): parameter.detach().to(dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _checked(device: torch.device | str) -> torch.device:
    """A device that can hold weights."""
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (AssertionError, RuntimeError, TypeError) as error:  # torch's without CUDA asserts
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device: cannot use {device!r} ({reason[:200]})") from error
    if checked.type == "meta":
        raise ValueError(f"device: expected one with memory, got {device!r}")
    return checked


def _open(checkpoint: Path) -> tuple[ModelConfig, Weights, TensorNames]:
    if checkpoint.suffix == ".gguf" and checkpoint.is_file():
        file = GgufFile(checkpoint)
        return file.config, file, GGUF
    config_file = find_file(checkpoint, "config.json")
    if config_file is None:
        raise ValueError(f"model: no config.json in {checkpoint}, nor one GGUF file alone")
    config = ModelConfig.from_file(config_file)
    return config, SafetensorsFolder(checkpoint), names_of(config.model_type)


def _has_own_head(weights: Weights, name_of: TensorNames, dtype: torch.dtype) -> bool:
    """Whether there is a head that differs from the embedding."""
    names = name_of("lm_head.weight"), name_of("model.embed_tokens.weight")
    if not weights.shapes.keys() >= set(names):
        return False
    head, embedding = (weights.read(name).to(dtype) for name in names)
    return not torch.equal(head, embedding)


def _check_tensors(
    checkpoint: Path, model: Decoder, weights: Weights, name_of: TensorNames
) -> None:
    expected = {name_of(name): tuple(p.shape) for name, p in model.named_parameters()}
    ignored = {name_of("lm_head.weight")} if model.config.tie_word_embeddings else set()
    found = {
        name: shape
        for name, shape in weights.shapes.items()
        if name not in ignored and not name.endswith(".rotary_emb.inv_freq")  # of old checkpoints
    }
    problems = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(expected))]
    problems += [
        f"{name}: expected shape {list(expected[name])}, got {list(found[name])}"
        for name in sorted(set(expected) & set(found))
        if expected[name] != found[name]
    ]
    if problems:
        raise ValueError(
            f"model: tensors in {checkpoint} do not fit its config: {_listed(problems, '; ')}"
        )


def _read(
    model: Decoder,
    weights: Weights,
    name_of: TensorNames,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters in their place, and the names of those that are not finite."""

    def read(name: str) -> tuple[Tensor, bool]:
        tensor = weights.read(name_of(name)).to(device, dtype)
        # A sum sees every NaN and infinity at the speed of memory; it may overflow by itself.
        return tensor, bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())

    names = [name for name, _ in model.named_parameters()]
    state, not_finite = {}, []
    bar = Progress(
        TextColumn("weights"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(_NUM_READERS) as readers:
        task = bar.add_task("", total=sum(p.numel() for p in model.parameters()) * dtype.itemsize)
        for name, (tensor, is_finite) in zip(names, readers.map(read, names), strict=True):
            state[name] = tensor
            if not is_finite:
                not_finite.append(name_of(name))
            bar.advance(task, tensor.nbytes)
    return state, not_finite


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _MAX_SHOWN} more" if len(items) > _MAX_SHOWN else ""
    return separator.join(items[:_MAX_SHOWN]) + more
