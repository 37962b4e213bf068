"""Hybrid attention's mask in O(segments): who sees whom among prompt, plan and spans."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdiff_runtime.ops import structures
from pdiff_runtime.plan.control_tokens import ControlTokens

Int32Array = npt.NDArray[np.int32]
SegmentRows = tuple[int, Literal["causal", "full"], Sequence[tuple[int, int]]]
"""``(num_rows, kind, [(lo, hi), ...])``: rows of one kind and the key intervals they see."""

_KINDS = {"causal": 0, "full": 1}


class SpanLayout:
    """Which keys each query row of one sequence sees.

    Rows fall into segments, each with key intervals ``[lo, hi)``. In a *full* segment every row
    sees all of them. In a *causal* segment the last interval's ``hi`` belongs to the last row, one
    less to the row above it, and so on. Nothing here is quadratic but :meth:`dense_mask`.
    """

    def __init__(self, handle: structures.SpanLayout) -> None:
        self.handle = handle
        """The compiled layout that ``ops.AttentionPlan`` packs."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and other processes: the layout alone, without what was derived from it."""
        return type(self), (self.handle,)

    @classmethod
    def from_tokens(
        cls,
        token_ids: Sequence[int] | npt.NDArray[np.integer] | Tensor,
        tags: ControlTokens,
        isolate_spans: bool = True,
    ) -> Self:
        """The layout of a whole sequence; rows and keys are its tokens.

        A key inside a span (tags included) is visible to its own span and to every row at or after
        the first sync after the span; any other key is visible to rows at or after it. Unbalanced
        tags are plain tokens, and so is a sync inside a span.

        Args:
            token_ids: ``[n]`` integers: a sequence, a numpy array or a CPU tensor.
            tags: Ids of the control tokens.
            isolate_spans: False lets spans that directly follow one another see each other.

        Raises:
            ValueError: A span inside a span, or ids of another shape, dtype or device.
        """
        return cls(
            structures.SpanLayout.from_tokens(
                _as_int64(token_ids), tags.async_start, tags.async_end, tags.sync, isolate_spans
            )
        )

    @classmethod
    def from_segments(cls, num_keys: int, segments: Iterable[SegmentRows]) -> Self:
        """Rows listed in order, each run of them with the key intervals it sees.

        Args:
            num_keys: Length of the keys.
            segments: ``(num_rows, "causal" | "full", [(lo, hi), ...])``; intervals ascend, and a
                causal run's last one has at least ``num_rows`` keys. Runs without rows are dropped.

        Raises:
            ValueError: Naming the segment, what was expected and what came.
        """
        rows: list[int] = []
        kinds: list[int] = []
        ptr = [0]
        bounds: list[int] = []
        for num_rows, kind, intervals in segments:
            if kind not in _KINDS:
                raise ValueError(
                    f"segments[{len(rows)}]: expected kind 'causal' or 'full', got {kind!r}"
                )
            rows.append(num_rows)
            kinds.append(_KINDS[kind])
            ptr.append(ptr[-1] + len(intervals))
            for lo, hi in intervals:
                bounds += (lo, hi)
        return cls(structures.SpanLayout.from_segments(num_keys, rows, kinds, ptr, bounds))

    @classmethod
    def from_spans(
        cls, context_len: int, span_lens: Sequence[int], *, isolate_spans: bool = True
    ) -> Self:
        """Rows of open spans, one after another, right behind a context they all see.

        Args:
            context_len: Number of keys before the spans.
            span_lens: Lengths of the spans, tags included.
            isolate_spans: False lets the spans see one another.
        """
        ends = list(itertools.accumulate(span_lens, initial=context_len))
        num_keys = ends[-1]
        if isolate_spans:
            runs = zip(span_lens, itertools.pairwise(ends), strict=True)
            return cls.from_segments(
                num_keys, [(n, "full", [(0, context_len), own]) for n, own in runs]
            )
        return cls.from_segments(num_keys, [(num_keys - context_len, "full", [(0, num_keys)])])

    @classmethod
    def causal(cls, num_rows: int, num_keys: int) -> Self:
        """Plain causal rows at the end of ``num_keys`` keys; the last row sees all of them."""
        return cls.from_segments(num_keys, [(num_rows, "causal", [(0, num_keys)])])

    @property
    def num_rows(self) -> int:
        return self.handle.num_rows

    @property
    def num_keys(self) -> int:
        return self.handle.num_keys

    @property
    def num_segments(self) -> int:
        return self.handle.num_segments

    @property
    def segments(self) -> Int32Array:
        """``[num_segments, 3]`` int32 ``{q_lo, q_hi, kind}``; kind 0 causal, 1 full."""
        return self.handle.segments

    @property
    def interval_ptr(self) -> Int32Array:
        """``[num_segments + 1]`` int32: where each segment's intervals start."""
        return self.handle.interval_ptr

    @property
    def intervals(self) -> Int32Array:
        """``[num_intervals, 2]`` int32 ``{lo, hi}`` in keys."""
        return self.handle.intervals

    @functools.cached_property
    def key_major(self) -> structures.KeyMajorLayout:
        """The same by keys, built when first asked for.

        ``.segments`` ``[num_key_segments, 2]`` ``{k_lo, k_hi}``, ``.range_ptr``
        ``[num_key_segments + 1]`` and ``.ranges`` ``[num_ranges, 3]`` ``{q_lo, q_hi, kind}``, all
        int32. In a causal range key ``k_lo + j`` is seen by rows ``[q_lo + j, q_hi)``.
        """
        return self.handle.key_major()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, those of :attr:`key_major` included once it is built."""
        twin = self.__dict__.get("key_major")
        return self.handle.nbytes + (twin.nbytes if twin is not None else 0)

    @functools.cached_property
    def num_visible_pairs(self) -> int:
        """How many (query, key) pairs are visible."""
        return self.handle.num_visible_pairs()

    def dense_mask(self) -> Tensor:
        """``[num_rows, num_keys]`` bool, True where the row sees the key. For tests."""
        return torch.from_numpy(self.handle.dense_mask())

    def __repr__(self) -> str:
        return (
            f"SpanLayout(num_rows={self.num_rows}, num_keys={self.num_keys}, "
            f"num_segments={self.num_segments})"
        )


def _as_int64(
    token_ids: Sequence[int] | npt.NDArray[np.integer] | Tensor,
) -> npt.NDArray[np.int64]:
    if isinstance(token_ids, Tensor):
        if token_ids.device.type != "cpu":
            raise ValueError(f"token_ids: expected a CPU tensor, got one on {token_ids.device}")
        token_ids = token_ids.numpy()
    array = np.asarray(token_ids)
    if array.size == 0 and not isinstance(token_ids, np.ndarray):
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"token_ids: expected integers [n], got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.int64)
