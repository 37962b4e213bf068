"""Control tokens, the grammar of plans, and the attention layout they imply."""

from pdiff_runtime.plan.control_tokens import PUBLISHED_NAMES, ControlTokens
from pdiff_runtime.plan.span_layout import SpanLayout
