"""The compiled host structures that the packages above build on; they come without tensors."""

from pdiff_runtime._C import (
    KeyMajorLayout,
    OutOfPagesError,
    PageAllocator,
    PlanState,
    SpanLayout,
    plan_mask_table,
)

__all__ = [
    "KeyMajorLayout",
    "OutOfPagesError",
    "PageAllocator",
    "PlanState",
    "SpanLayout",
    "plan_mask_table",
]
