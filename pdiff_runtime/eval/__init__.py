"""How good a model's answers are and what they cost; every prompt is tried once."""

from pdiff_runtime.eval.atlas import Report, Scores, evaluate, held_out_records

__all__ = ["Report", "Scores", "evaluate", "held_out_records"]
