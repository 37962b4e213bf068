"""Generation parameters as a command line or an argument string names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pdiff_runtime.engine import GenerationParams


def with_knobs(params: GenerationParams, knobs: Mapping[str, Any]) -> GenerationParams:
    """Parameters with fields replaced; a knob that is None leaves its field.

    ``steps_ratio`` or ``num_steps`` alone also take the rule "entropy": the model's own may not
    count steps. Another rule does not keep the threshold, which means something else to it.

    Raises:
        ValueError: No such field, or a value out of its range.
    """
    given = {name: value for name, value in knobs.items() if value is not None}
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(params)})
    if unknown:
        raise ValueError(f"{unknown[0]}: no such generation parameter")
    if given.keys() & {"steps_ratio", "num_steps"}:
        given.setdefault("unmask", "entropy")
    if given.get("unmask", params.unmask) != params.unmask:
        given.setdefault("threshold", None)
    return dataclasses.replace(params, **given)
