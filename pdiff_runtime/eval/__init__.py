"""How good a model's answers are and what they cost; every prompt is tried once."""
