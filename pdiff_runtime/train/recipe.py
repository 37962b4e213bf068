"""One TOML file describes a training run: model, tokenizer, data and stages."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from pdiff_runtime.engine.params import recommended
from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.train.data import FORMATS

RECIPES = Path(__file__).parent / "recipes"

_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "dict[str, float]": dict,
    "dict[str, Any]": dict,
    "tuple[float, float]": tuple,
}
"""How a field is annotated, and what TOML may give for it."""


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
        if unknown or not self.formats or not all(map(_is_share, self.formats.values())):
            raise ValueError(
                f"stage {self.name}: formats must map some of {FORMATS} to positive shares, "
                f"got {self.formats}"
            )
        lowest = {"num_tokens": 1, "batch_tokens": 1, "warmup_steps": 0}
        lowest |= {"learning_rate": 0, "final_learning_rate": 0}
        _check_range(self, lowest, f"stage {self.name}: ")


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
        _check_range(
            self,
            {"num_documents": 1, "seed": 0, "weight_decay": 0, "max_grad_norm": 0, "log_every": 1,
             "save_every": 1},
        )  # fmt: skip
        are_numbers = all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas)
        if len(self.betas) != 2 or not are_numbers:
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {self.betas}")
        recommended(self.generation, f"recipe {self.name}: generation")  # said now, not at the end


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by its name, or one of your own by its path.

    Raises:
        ValueError: No such recipe, a key it should not have or lacks, or a value of another type
            or out of its range.
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
    if isinstance(fields.get("betas"), list):
        fields["betas"] = tuple(fields["betas"])
    return _build(Recipe, {**fields, "model": model, "stages": stages}, "recipe")


def _build(cls: type, fields: dict[str, Any], where: str) -> Any:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a table, got {fields!r}")
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
    for name, value in fields.items():
        annotation = str(known[name].type)
        if not _is_a(annotation, value):
            raise ValueError(f"{where}: {name}: expected {annotation}, got {value!r}")
    return cls(**fields)


def _is_a(annotation: str, value: object) -> bool:
    if isinstance(value, bool):  # to Python it is an integer as well
        return annotation == "bool" or annotation not in _TYPES
    return isinstance(value, _TYPES.get(annotation, object))


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _check_range(settings: object, lowest: dict[str, int], where: str = "") -> None:
    for name, low in lowest.items():
        value = getattr(settings, name)
        if not low <= value < math.inf:
            raise ValueError(f"{where}{name}: expected a number >= {low}, got {value}")
