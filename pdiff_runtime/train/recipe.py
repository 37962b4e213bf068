"""One TOML file describes a training run: model, tokenizer, data and stages."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from pdiff_runtime.engine.params import recommended
from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.train.data import FORMATS

RECIPES = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run with its own mixture of document formats and its own schedule.

    The learning rate warms up linearly over ``warmup_steps`` and falls as a cosine to
    ``final_learning_rate``.
    """

    name: str
    num_tokens: int
    formats: dict[str, float]
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    batch_tokens: int = 3072

    def __post_init__(self) -> None:
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown or not self.formats or any(not share > 0 for share in self.formats.values()):
            raise ValueError(
                f"stage {self.name}: formats must map some of {FORMATS} to positive shares, "
                f"got {self.formats}"
            )
        for field in ("num_tokens", "batch_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"stage {self.name}: {field} must be >= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    ``data`` is "atlas" (composed from the shipped facts) or the path of a tagged JSONL file;
    ``tokenizer`` a tokenizer folder, "atlas" for the shipped one. Without ``isolate_spans`` the
    spans of a round see each other, as they must then at inference too. ``autocast`` runs the
    linear layers and attention in bfloat16, with fp32 weights; ``compile`` fuses element-wise work
    with ``torch.compile``, which takes a minute at the start. ``generation`` are the parameters
    that the finished model recommends, see :class:`pdiff_runtime.GenerationParams`.
    """

    name: str
    model: ModelConfig
    data: str
    tokenizer: str
    stages: tuple[Stage, ...]
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_documents: int = 60_000
    isolate_spans: bool = True
    seed: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    autocast: bool = True
    compile: bool = False
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        recommended(self.generation, f"recipe {self.name}: generation")  # said now, not at the end


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by its name, or one of your own by its path.

    Raises:
        ValueError: No such recipe, or a key it should not have or lacks.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise ValueError(f"recipe: no file {name_or_path!r}, and the shipped ones are: {shipped}")
    try:
        fields = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    fields.setdefault("name", path.stem)
    model = _build(ModelConfig, fields.pop("model", {}), "model")
    stages = tuple(_build(Stage, stage, "stage") for stage in fields.pop("stage", []))
    if not stages:
        raise ValueError(f"recipe {path}: expected at least one [[stage]]")
    if "betas" in fields:
        fields["betas"] = tuple(fields["betas"])
    return _build(Recipe, {**fields, "model": model, "stages": stages}, "recipe")


def _build(cls: type, fields: dict[str, Any], where: str) -> Any:
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    missing = [
        name
        for name, field in known.items()
        if name not in fields
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    return cls(**fields)
