"""Training mask, inference mask and plan parsing, as the published implementation has them."""

import numpy as np
import pytest
from golden_data import load_npz, unpack

from pdiff_runtime.plan import ControlTokens, PlanError, SpanLayout, parse_plan

MASKS = load_npz("masks")
PLANS = load_npz("pd_inputs")

PUBLISHED_TAGS = ControlTokens(
    topic_start=151669, topic_end=151670, async_start=151667, async_end=151668, sync=151671,
    mask=151666, pad=151672, eos=151645, digits=tuple(range(15, 25)),
)  # fmt: skip

RAISES = {"edge_nested_async": "a span inside a span is refused, the published mask follows tags"}


def case_ids(data):
    return [pytest.param(int(case), id=str(data["names"][case])) for case in data["cases"]]


def tags_with(special):
    """Tags of a case; ids its sequences do not name are put out of the way."""
    async_start, async_end, sync, eos, pad = (int(token_id) for token_id in special)
    free = iter(range(200_000, 200_013))
    return ControlTokens(
        topic_start=next(free), topic_end=next(free), async_start=async_start, async_end=async_end,
        sync=sync, mask=next(free), pad=pad, eos=eos, digits=tuple(free),
    )  # fmt: skip


@pytest.mark.parametrize(("version", "isolate_spans"), [("v2", True), ("v3", False)])
@pytest.mark.parametrize("case", case_ids(MASKS))
def test_training_mask(case, version, isolate_spans):
    token_ids, tags = MASKS[f"{case:03}_ids"], tags_with(MASKS[f"{case:03}_special"])
    name = MASKS["names"][case]
    if name in RAISES:
        with pytest.raises(ValueError, match="not nested"):
            SpanLayout.from_tokens(token_ids, tags, isolate_spans=isolate_spans)
        return
    layout = SpanLayout.from_tokens(token_ids, tags, isolate_spans=isolate_spans)
    expected = unpack(MASKS[f"{case:03}_mask_{version}"], (len(token_ids),) * 2)
    assert np.array_equal(layout.dense_mask().numpy(), expected)


WHOLE_PLANS = [case for case in case_ids(PLANS) if not PLANS["errors"][case.values[0]]]
BROKEN_PLANS = [case for case in case_ids(PLANS) if PLANS["errors"][case.values[0]]]


@pytest.mark.parametrize("case", WHOLE_PLANS)
def test_span_rows_at_inference(case):
    num_context = len(PLANS[f"{case:02}_ids"])
    num_keys = len(PLANS[f"{case:02}_sequence"])
    span_lens = [int(end - start) for start, end, _ in PLANS[f"{case:02}_block_info"]]
    is_joint = bool(PLANS[f"{case:02}_disable_block_sparsity"])
    layout = SpanLayout.from_spans(num_context, span_lens, isolate_spans=not is_joint)
    expected = unpack(PLANS[f"{case:02}_mask"], (num_keys, num_keys))[num_context:]
    assert np.array_equal(layout.dense_mask().numpy(), expected)


@pytest.mark.parametrize("case", WHOLE_PLANS)
def test_plan_numbers(case):
    topics = parse_plan(PLANS[f"{case:02}_ids"], PUBLISHED_TAGS, compat="published")
    length_scale = PLANS[f"{case:02}_length_scale"]
    unit = 10 if np.isnan(length_scale) else float(length_scale)
    sizes = PLANS[f"{case:02}_block_info"][:, 2]
    assert [int(topic.number * unit) for topic in topics] == sizes.tolist()


@pytest.mark.parametrize("case", BROKEN_PLANS)
def test_plans_that_fail_fail(case):
    with pytest.raises(PlanError):
        parse_plan(PLANS[f"{case:02}_ids"], PUBLISHED_TAGS, compat="published")
