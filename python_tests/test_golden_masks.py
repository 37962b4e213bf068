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
def test_spans_laid_out(case):
    """From the plan: the number of spans, where each stands, and the sequence with them."""
    ids = PLANS[f"{case:02}_ids"].tolist()
    topics = parse_plan(ids, PUBLISHED_TAGS, compat="published")
    assert len(topics) == PLANS[f"{case:02}_num_promises"]
    length_scale = PLANS[f"{case:02}_length_scale"]
    unit = 10 if np.isnan(length_scale) else float(length_scale)
    block_info, tags = [], PUBLISHED_TAGS
    for size in (int(topic.number * unit) for topic in topics):
        block_info.append([len(ids), len(ids) + size + 2, size])
        ids += [tags.async_start, *[tags.mask] * size, tags.async_end]
    assert PLANS[f"{case:02}_block_info"].tolist() == block_info
    assert PLANS[f"{case:02}_sequence"].tolist() == ids


@pytest.mark.parametrize("case", WHOLE_PLANS)
def test_mask_at_inference(case):
    ids = PLANS[f"{case:02}_ids"]
    num_context, num_keys = len(ids), len(PLANS[f"{case:02}_sequence"])
    mask = unpack(PLANS[f"{case:02}_mask"], (num_keys, num_keys))
    is_joint = bool(PLANS[f"{case:02}_disable_block_sparsity"])

    span_lens = [int(end - start) for start, end, _ in PLANS[f"{case:02}_block_info"]]
    spans = SpanLayout.from_spans(num_context, span_lens, isolate_spans=not is_joint)
    assert np.array_equal(mask[num_context:], spans.dense_mask().numpy())

    # The context keeps the rows it had, and sees no open span.
    context = mask[:num_context, :num_context]
    assert not mask[:num_context, num_context:].any()
    assert np.array_equal(context, unpack(PLANS[f"{case:02}_prev_mask"], context.shape))
    earlier = [
        SpanLayout.from_tokens(ids, PUBLISHED_TAGS, not joint) for joint in {False, is_joint}
    ]
    assert any(np.array_equal(context, layout.dense_mask().numpy()) for layout in earlier)


@pytest.mark.parametrize("case", BROKEN_PLANS)
def test_plans_that_fail_fail(case):
    with pytest.raises(PlanError):
        parse_plan(PLANS[f"{case:02}_ids"], PUBLISHED_TAGS, compat="published")
