"""Control tokens, the grammar of plans, and the attention layout they imply."""

from pdiff_runtime.plan.control_tokens import PLAN_TAGS, PUBLISHED_NAMES, ControlTokens
from pdiff_runtime.plan.grammar import PlanGrammar, PlanState, Topic
from pdiff_runtime.plan.parse import PlanError, parse_plan
from pdiff_runtime.plan.span_layout import SpanLayout
from pdiff_runtime.plan.visible import published_text, visible_parts, visible_text
