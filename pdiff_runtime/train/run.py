"""A whole run in one folder: from a recipe to a model that can be loaded.

The folder holds ``recipe.json``, ``data/`` (documents composed for the run), ``log.jsonl``,
``checkpoint.safetensors`` and, at the end, ``model/``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pdiff_runtime.models import BUNDLED_MODEL, ModelConfig, Tokenizer, save_model
from pdiff_runtime.models.files import read_json
from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.train.data import DocumentEncoder, TaggedDocument, read_documents
from pdiff_runtime.train.loop import Log, Trainer
from pdiff_runtime.train.recipe import Recipe
from pdiff_runtime.train.synth import synth
from pdiff_runtime.train.synth.tokenizer import LENGTH_UNIT

ATLAS = "atlas"
"""In place of a path: the data and the tokenizer that ship with the package."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def run_recipe(
    recipe: Recipe,
    out_dir: Path,
    *,
    max_steps: int | None = None,
    log: Log = lambda record: None,
    device: torch.device | str = "cpu",
    is_stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """Train, or go on where the folder's checkpoint stands, and export the model.

    Args:
        recipe: What to do.
        out_dir: The folder of the run; made if missing.
        max_steps: Optimiser steps of this call; None runs to the end of the recipe.
        log: Called with every log record.
        device: Where to train.
        is_stopped: Asked before each step whether to stop there, as after `max_steps`.

    Returns:
        ``out_dir / "model"``, for :func:`pdiff_runtime.load_model`.

    Raises:
        ValueError: Tokenizer or data are missing or do not fit, or the folder holds another run.
        FloatingPointError: The loss is not finite; the last checkpoint stays as it was.
    """
    trainer = prepare(recipe, out_dir, log=log, device=device)
    trainer.train(max_steps, is_stopped=is_stopped)
    return export(trainer, tokenizer_dir(recipe.tokenizer), out_dir / "model")


def prepare(
    recipe: Recipe,
    out_dir: Path,
    *,
    log: Log = lambda record: None,
    device: torch.device | str = "cpu",
) -> Trainer:
    """A trainer with the recipe's tokenizer and documents, at the folder's checkpoint if any."""
    encoder = load_encoder(recipe.tokenizer, recipe.model.length_unit)
    if encoder.tokenizer.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: expected at least {encoder.tokenizer.vocab_size}, the tokenizer's, "
            f"got {recipe.model.vocab_size}"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim(recipe, out_dir)
    documents = load_documents(recipe, out_dir / "data")
    return Trainer(recipe, documents, encoder, out_dir, log, device)


def tokenizer_dir(name_or_path: str) -> Path:
    """The folder of a tokenizer; "atlas" is the bundled one."""
    return BUNDLED_MODEL if name_or_path == ATLAS else Path(name_or_path)


def length_unit_of(tokenizer: str) -> int:
    """Tokens per unit of a topic's number, from the ``config.json`` beside the tokenizer.

    Raises:
        ValueError: None is there.
    """
    file = tokenizer_dir(tokenizer) / "config.json"
    if file.is_file():
        return ModelConfig.from_file(file).length_unit
    if tokenizer == ATLAS:
        return LENGTH_UNIT
    raise ValueError(f"length_unit: expected one to be given, there is no {file} to say it")


def load_encoder(tokenizer: str, length_unit: int) -> DocumentEncoder:
    """Documents to token ids, with the tokenizer at a path or "atlas".

    Raises:
        ValueError: No tokenizer there, or one without the control tags.
    """
    loaded = Tokenizer.from_dir(tokenizer_dir(tokenizer))
    tags = ControlTokens.from_tokenizer(loaded, names=loaded.tag_names or None)
    return DocumentEncoder(loaded, tags, length_unit)


def load_documents(recipe: Recipe, data_dir: Path) -> list[TaggedDocument]:
    """The recipe's documents; those of the atlas are composed into ``data_dir`` once.

    Raises:
        ValueError: No such file, an empty one, or a line that is no document.
    """
    path = Path(recipe.data)
    if recipe.data == ATLAS:
        path = data_dir / "train.jsonl"
        if not path.is_file():
            scratch = data_dir.with_suffix(".tmp")
            synth(scratch, num_documents=recipe.num_documents)
            scratch.replace(data_dir)
    if not path.is_file():
        raise ValueError(f"data: expected 'atlas' or a JSONL file, got {recipe.data!r}")
    documents = list(read_documents(path))
    if not documents:
        raise ValueError(f"data: {path} has no documents")
    return documents


def export(trainer: Trainer, tokenizer: Path, folder: Path) -> Path:
    """Write the model as it is now, in bfloat16, with its tokenizer and what it recommends.

    Returns ``folder``.
    """
    save_model(trainer.model, folder)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if trainer.recipe.generation:
        text = json.dumps({"pdiff": trainer.recipe.generation}, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, "utf-8")
    return folder


def _claim(recipe: Recipe, out_dir: Path) -> None:
    """Write down whose folder this is, or refuse to go on with the checkpoint of another recipe."""
    fields = json.loads(json.dumps(dataclasses.asdict(recipe)))
    file = out_dir / "recipe.json"
    if file.is_file() and (out_dir / "checkpoint.safetensors").is_file():
        earlier = read_json(file)
        free = {"name", "log_every", "save_every"}
        changed = sorted(k for k in fields if k not in free and fields[k] != earlier.get(k))
        if changed:
            raise ValueError(
                f"out: {out_dir} holds a run with other settings ({', '.join(changed)}); "
                "choose another folder, or the recipe it was started with"
            )
    file.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
