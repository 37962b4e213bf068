"""What the attention layout costs on the host: time to build it, bytes it takes.

Target for 32k tokens in 1k segments: 0.2 ms and 32 KB by rows, 64 KB with the key-major twin.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pdiff_runtime.plan import ControlTokens, SpanLayout

TAGS = ControlTokens(
    topic_start=0, topic_end=1, async_start=2, async_end=3, sync=4, mask=5, pad=6, eos=7,
    digits=tuple(range(8, 18)),
)  # fmt: skip
TEXT = 18

SHAPES = {  # tokens, segments, spans per round
    "4k_100": (4096, 100, 4),
    "32k_1k": (32768, 1000, 8),
    "32k_3k": (32768, 3000, 8),
}


def rounds_of_spans(num_tokens: int, num_segments: int, num_spans: int) -> npt.NDArray[np.int64]:
    """``[num_tokens]``: rounds of a plan, ``num_spans`` spans and a sync, and text to the end."""
    num_rounds = num_segments // (num_spans + 1)
    round_len = num_tokens // num_rounds
    span_len = round_len * 9 // (10 * num_spans)
    span = [TAGS.async_start, *[TEXT] * (span_len - 2), TAGS.async_end]
    plan = [TEXT] * (round_len - num_spans * span_len - 1)
    token_ids = [*plan, *span * num_spans, TAGS.sync] * num_rounds
    token_ids += [TEXT] * (num_tokens - len(token_ids))
    return np.array(token_ids)


def mask_by_rule(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """``[n, n]`` for well-formed ids: a span sees itself, others see it in a later round."""
    is_start, is_end = token_ids == TAGS.async_start, token_ids == TAGS.async_end
    span_idx = np.cumsum(is_start)
    is_span = span_idx > np.cumsum(is_end) - is_end
    round_idx = np.cumsum(token_ids == TAGS.sync)
    own_span = is_span & is_span[:, None] & (span_idx == span_idx[:, None])
    is_open = ~is_span | (round_idx < round_idx[:, None])
    return own_span | (np.tri(len(token_ids), dtype=bool) & is_open)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("with_keys", [False, True], ids=["rows", "rows_and_keys"])
@pytest.mark.benchmark(group="layout from tokens")
def bench_layout_from_tokens(benchmark, shape, with_keys):
    token_ids = rounds_of_spans(*shape)
    # Whole rounds of the first 2048 tokens: the dense mask of all of it would take a gigabyte.
    head = token_ids[: np.flatnonzero(token_ids[:2048] == TAGS.sync)[-1] + 1]
    assert np.array_equal(SpanLayout.from_tokens(head, TAGS).dense_mask(), mask_by_rule(head))

    def build() -> SpanLayout:
        layout = SpanLayout.from_tokens(token_ids, TAGS)
        if with_keys:
            _ = layout.key_major
        return layout

    layout = benchmark(build)
    benchmark.extra_info |= {"num_segments": layout.num_segments, "nbytes": layout.nbytes}
    print(f"\n{layout}: {layout.nbytes} bytes, {layout.nbytes / layout.num_segments:.1f} a segment")


@pytest.mark.benchmark(group="layout of open spans")
def bench_layout_from_spans(benchmark):
    layout = benchmark(lambda: SpanLayout.from_spans(736, [62] * 8))
    assert layout.num_visible_pairs == 8 * 62 * (736 + 62)
