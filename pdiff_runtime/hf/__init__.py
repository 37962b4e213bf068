"""Stock Hugging Face models: hybrid attention for them, and planned diffusion from their weights.

Nothing here imports transformers before it is called.
"""

from pdiff_runtime.hf.attention import register_hf
from pdiff_runtime.hf.generation import generate

__all__ = ["generate", "register_hf"]
