"""Denoising steps that follow one another without the host in between.

While a batch is open spans only, and none of them can become full in the step under way, the next
step is the same rows again, and their tokens are where the last step wrote them, on the device. So
it can be launched before the last one's results are read, and on a GPU replayed as a captured
graph. Which positions still hold the mask is found on the device too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.denoise import Progress
from pdiff_runtime.engine.graphs import (
    MAX_SIZES,
    Captured,
    ForwardBuffers,
    ForwardSize,
    Recent,
    round_up,
    set_front,
)
from pdiff_runtime.engine.paged_attention import PagedAttention
from pdiff_runtime.engine.request import Request, Work, Write
from pdiff_runtime.engine.runner import Predicted, Runner
from pdiff_runtime.engine.span import Span, SpanKind

_ROW_STEP, _SPAN_STEP = 64, 8


@dataclasses.dataclass(frozen=True)
class OpenSpan:
    """A span as it is known ahead of a step.

    Attributes:
        row: Batch row of its ``<async>``.
        num_masked: Masks left; without a quota an upper bound.
        step_idx: Of the step.
    """

    work_idx: int
    request: Request
    span: Span
    row: int
    num_masked: int
    step_idx: int

    @functools.cached_property
    def quota(self) -> int:
        """How many positions the step writes at most."""
        at = Progress(self.num_masked, self.step_idx, self.span.num_steps)
        return self.request.rule.quota(at)

    @property
    def becomes_full(self) -> bool:
        """Whether the step is known to write the last masks."""
        return self.num_masked > 0 and self.has_fixed_quota and self.quota == self.num_masked

    @property
    def order_temperature(self) -> float:
        """Temperature of the order of its positions."""
        return self.request.rule.order_temperature(self.request.params.alg_temp)

    def after_step(self) -> OpenSpan:
        """What is known of it once the step has run."""
        written = self.quota if self.has_fixed_quota else 0
        return dataclasses.replace(
            self, num_masked=self.num_masked - written, step_idx=self.step_idx + 1
        )

    @property
    def has_fixed_quota(self) -> bool:
        """Whether what a step writes at most is known ahead."""
        return self.request.rule.has_fixed_quota


class DenoiseLoop:
    """Launches the steps of batches of open spans.

    Args:
        runner: Its model, cache and settings.
        mask_id: The mask token.
    """

    def __init__(self, runner: Runner, mask_id: int) -> None:
        self.runner, self.mask_id = runner, mask_id
        self._steps: Recent[_Shape, _Step] = Recent(MAX_SIZES)
        self._step: _Step | None = None
        self._row_place: list[tuple[int, int]] = []

    def takes(self, works: Sequence[Work]) -> bool:
        """Whether a batch is open spans only, alike and steady, with logits that nobody reads."""
        requests = [work.request for work in works]
        return (
            len({(r.rule, r.span_kind) for r in requests}) == 1
            and requests[0].rule.runs_ahead
            and requests[0].span_kind is not SpanKind.PUBLISHED  # a mask may be written there
            and not any(r.params.logprobs for r in requests)
            and all(w.spans and not w.context for w in works)
            and all(span.is_steady for work in works for span in work.spans)
            and sum(work.num_rows for work in works) <= self.runner.max_logits_rows
        )

    @staticmethod
    def may_run_ahead(spans: Sequence[OpenSpan]) -> bool:
        """Whether the step after the one that is under way is over the same rows."""
        return not any(
            span.becomes_full or (span.request.is_pinned and not span.has_fixed_quota)
            for span in spans
        )

    def start(self, works: list[Work]) -> list[OpenSpan]:
        """Bring a batch to the device; its spans, for :meth:`launch`."""
        _, token_ids, attend = self.runner.inputs(works, split_keys=False)
        spans, self._row_place = [], []
        for work_idx, work in enumerate(works):
            for span in work.spans:
                spans.append(
                    OpenSpan(
                        work_idx, work.request, span, len(self._row_place), len(span.masked),
                        span.step_idx,
                    )
                )  # fmt: skip
                self._row_place += [(work_idx, position) for position in range(span.lo, span.hi)]
        self._step = self._step_of(self._shape(attend, spans), attend)
        self._step.load(token_ids, attend, spans)
        return spans

    def launch(self, spans: Sequence[OpenSpan]) -> Launched:
        """Start the batch's next step; nothing waits for it."""
        assert self._step is not None
        return Launched(self._step.launch(spans), self._row_place)

    def _step_of(self, shape: _Shape, attend: PagedAttention) -> _Step:
        def new_step() -> _Step:
            return _Step(shape, self.runner, self.mask_id, ForwardBuffers(shape.forward, attend))

        # What was captured is worth keeping.
        return new_step() if self.runner.graphs is None else self._steps.get(shape, new_step)

    def _shape(self, attend: PagedAttention, spans: Sequence[OpenSpan]) -> _Shape:
        forward, num_spans = ForwardSize.of(attend), len(spans)
        if self.runner.graphs is not None:
            forward, num_spans = forward.rounded_up(_ROW_STEP), round_up(num_spans, _SPAN_STEP)
        params = [span.request.params for span in spans]
        first = spans[0].request
        return _Shape(
            forward, num_spans, first.rule.kernel_rule, first.span_kind,
            samples=any(p.temperature for p in params),
            filters=any(p.top_p < 1.0 or p.top_k for p in params),
            shuffles=any(span.order_temperature for span in spans),
        )  # fmt: skip


class Launched:
    """A step under way."""

    def __init__(self, read: Callable[[], list[list[int]]], place: list[tuple[int, int]]) -> None:
        self._read, self._place = read, place

    def result(self, num_works: int) -> list[Predicted]:
        """Wait for it; what it wrote, per work."""
        predicted = [Predicted() for _ in range(num_works)]
        for row, token_id, is_written, is_nan in zip(*self._read(), strict=True):
            if row < len(self._place):
                work_idx, position = self._place[row]
                predicted[work_idx].is_nan |= bool(is_nan)
                if is_written:
                    predicted[work_idx].writes.append(Write(position, token_id))
        return predicted


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a step is good for; sizes are rounded up if it is captured."""

    forward: ForwardSize
    num_spans: int
    rule: ops.Rule
    kind: SpanKind
    samples: bool
    filters: bool
    shuffles: bool


class _Step:
    """Buffers of one shape, and the step over them."""

    def __init__(self, shape: _Shape, runner: Runner, mask_id: int, inputs: ForwardBuffers) -> None:
        self.shape, self.runner, self.mask_id, self.inputs = shape, runner, mask_id, inputs
        device, rows, spans = runner.device, shape.forward.num_rows, shape.num_spans

        def buffer(size: int, dtype: torch.dtype, value: float = 0) -> Tensor:
            return torch.full((size,), value, dtype=dtype, device=device)

        self.span_of_row = buffer(rows, torch.int64, spans)
        self.is_content = buffer(rows, torch.bool)
        self.seeds = buffer(rows, torch.int64)
        self.row_ids = torch.arange(rows, device=device)
        self.quota = buffer(spans, torch.int32)
        self.step_idx = buffer(spans, torch.int32)
        self.threshold = buffer(spans, torch.float32)
        self.temperature = buffer(spans, torch.float32)
        self.top_p = buffer(spans, torch.float32, 1.0)
        self.top_k = buffer(spans, torch.int32)
        self.alg_temp = buffer(spans, torch.float32)
        self.run = Captured(self._run, runner.graphs, runner.model)

    def load(self, token_ids: list[int], attend: PagedAttention, spans: Sequence[OpenSpan]) -> None:
        """Take a batch; rows and spans beyond it do nothing."""
        self.inputs.load(token_ids, attend)
        num_rows = self.shape.forward.num_rows
        span_of_row = np.full(num_rows, self.shape.num_spans, np.int64)
        is_content = np.zeros(num_rows, bool)
        seeds = np.zeros(num_rows, np.int64)
        for idx, each in enumerate(spans):
            end = each.row + each.span.num_rows
            span_of_row[each.row : end] = idx
            lo, hi = (each.row + position - each.span.lo for position in each.span.content)
            is_content[lo:hi] = True
            seeds[each.row : end] = each.request.seed
        set_front(self.span_of_row, span_of_row)
        set_front(self.is_content, is_content)
        set_front(self.seeds, seeds)
        params = [span.request.params for span in spans]
        set_front(self.threshold, [p.threshold or 0.0 for p in params])
        set_front(self.temperature, [p.temperature or 0.0 for p in params])
        set_front(self.top_p, [p.top_p for p in params])
        set_front(self.top_k, [p.top_k or 0 for p in params])
        set_front(self.alg_temp, [span.order_temperature for span in spans])

    def launch(self, spans: Sequence[OpenSpan]) -> Callable[[], list[list[int]]]:
        """Run the step; the answer waits for it and reads ``[4][rows]``: see :meth:`_run`."""
        set_front(self.quota, [span.quota for span in spans])
        set_front(self.step_idx, [span.step_idx for span in spans])
        result = self.run()
        on_host = torch.empty(
            result.shape, dtype=result.dtype, device="cpu", pin_memory=result.is_cuda
        )
        on_host.copy_(result, non_blocking=True)  # the next step may write over it
        if not result.is_cuda:
            return on_host.tolist
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[list[int]]:
            copied.synchronize()
            return on_host.tolist()

        return read

    def _run(self) -> Tensor:
        """Forward, and write the most certain tokens of each span to ``token_ids``.

        Returns:
            ``[4, num_rows]`` int64: batch row of each scored position (``num_rows`` where there is
            none), candidate, whether it was written, whether its logits were no numbers.
        """
        runner, shape, num_rows = self.runner, self.shape, self.shape.forward.num_rows
        token_ids, attend = self.inputs.token_ids, self.inputs.attend
        hidden = runner.model(token_ids, attend, runner.project)
        is_masked = (token_ids == self.mask_id) & self.is_content
        # The masked rows in order; the others meet in one place behind them.
        place = torch.where(is_masked, is_masked.cumsum(0) - 1, num_rows)
        rows = self.row_ids.new_full((num_rows + 1,), num_rows)
        rows.scatter_(0, place, self.row_ids)
        rows = rows[:-1]
        counts = self.row_ids.new_zeros(shape.num_spans + 1)
        counts.index_add_(0, self.span_of_row, is_masked.long())
        cu_rows = torch.zeros(shape.num_spans + 1, dtype=torch.int32, device=runner.device)
        cu_rows[1:] = counts[:-1].cumsum(0)
        if runner.graphs is None and runner.device.type == "cpu":
            rows = rows[: int(cu_rows[-1])]  # free to read here
        at = rows.clamp(max=num_rows - 1)
        logits = runner.model.logits(hidden[at - runner.model.config.logits_shift], runner.project)
        stats = ops.unmask_(
            token_ids, logits, rows.int(), cu_rows, self.quota,
            rule=shape.rule,
            threshold=self.threshold,
            temperature=self.temperature if shape.samples else 0.0,
            top_p=self.top_p if shape.filters else 1.0,
            top_k=self.top_k if shape.filters else 0,
            alg_temp=self.alg_temp if shape.shuffles else 0.0,
            banned_ids=runner.banned[shape.kind],
            seeds=self.seeds[at],
            step_idx=self.step_idx,
            positions=attend.positions[at].int(),
        )  # fmt: skip
        return torch.stack([rows, stats.candidate, stats.is_written.long(), stats.is_nan.long()])
