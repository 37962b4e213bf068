"""One ragged forward over the rows of many requests, and what their logits decide."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.cache import KVCache
from pdiff_runtime.engine.graphs import CapturedForwards, Graphs, on_host
from pdiff_runtime.engine.paged_attention import PagedAttention
from pdiff_runtime.engine.request import Request, Rows, Work, Write, count_rows
from pdiff_runtime.engine.span import Span, SpanKind
from pdiff_runtime.models.decoder import Decoder, Project
from pdiff_runtime.plan import SpanLayout

T = TypeVar("T", int, float)


@dataclasses.dataclass
class Predicted:
    """What a forward decided for one request.

    Attributes:
        token_ids, logprobs: What follows each of the last rows, for a request that writes tokens
            one by one; None where no log-probability was asked for.
        writes: What a denoising step wrote.
        is_nan: Some logits of the request were not numbers; nothing else is meaningful then.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float | None] = dataclasses.field(default_factory=list)
    writes: list[Write] = dataclasses.field(default_factory=list)
    is_nan: bool = False


class Runner:
    """Executes the :class:`Work` of all running requests.

    Args:
        model: The decoder.
        cache: Its paged keys and values.
        banned: ``[num_banned]`` int64 ids that a span of each kind must not contain.
        plan_masks: ``[num_states, vocab_size]`` bool, what each grammar state allows.
        ar_mask: ``[vocab_size]`` bool, what mode "ar" allows.
        max_logits_rows: Logits rows computed at once; one span is never cut.
        project: Applies the matrices.
        split_keys: See :meth:`pdiff_runtime.ops.AttentionPlan.pack`.
        graphs: Captures what can be replayed; None on a CPU.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        banned: Mapping[SpanKind, Tensor],
        plan_masks: Tensor,
        ar_mask: Tensor,
        max_logits_rows: int,
        project: Project,
        split_keys: bool,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        self.device = cache.k[0].device
        self.banned = {kind: ids.to(self.device) for kind, ids in banned.items()}
        masks = [*plan_masks, ar_mask]
        self._ar_mask_idx = len(masks) - 1
        self._token_masks = [_TokenMask(mask.to(self.device)) for mask in masks]
        self.max_logits_rows = max_logits_rows
        self.project, self.split_keys = project, split_keys
        self.graphs = graphs
        self._captured = None if graphs is None else CapturedForwards(model, project, graphs)
        self._prepared: tuple[list[Rows], PagedAttention] | None = None

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Makes the model's device the current one: streams and events are that one's."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def run(self, works: Sequence[Work]) -> list[Predicted]:
        """Forward every row once; the results are in the order of ``works``."""
        rows, token_ids, attend = self.inputs(works, split_keys=self.split_keys)
        with self._phase("forward"):
            if self._captured is not None and len(token_ids) <= self._captured.max_rows:
                hidden = self._captured(token_ids, attend)
            else:
                hidden = self.model(self._tensor(token_ids), attend, self.project)
        predicted = [Predicted() for _ in works]
        first_row = list(itertools.accumulate((r.num_rows for r in rows), initial=0))

        next_rows = [
            _NextRow(work, seen, end - len(work.mask_idx) + idx, idx)
            for work, seen, end in zip(works, predicted, first_row[1:], strict=True)
            for idx in range(len(work.mask_idx))
        ]
        with self._phase("plan"):
            for start in range(0, len(next_rows), self.max_logits_rows):
                self._write_next(hidden, next_rows[start : start + self.max_logits_rows])

        open_spans = [
            _OpenSpan(work, seen, span, row - span.window[0])
            for work, seen, end in zip(works, predicted, first_row[1:], strict=True)
            for span, row in _span_rows(work, end)
            if span.masked
        ]
        with self._phase("denoise"):
            for call in dict.fromkeys(span.call for span in open_spans):
                alike = [span for span in open_spans if span.call == call]
                for part in _parts(alike, self.max_logits_rows):
                    self._denoise(hidden, part, *call)
        return predicted

    def inputs(
        self, works: Sequence[Work], *, split_keys: bool
    ) -> tuple[list[Rows], list[int], PagedAttention]:
        """The rows of each work, the token ids of all of them, and how they attend."""
        rows = [work.request.rows(work) for work in works]
        token_ids = [
            token_id
            for work, of_work in zip(works, rows, strict=True)
            for token_id in work.request.row_tokens(of_work)
        ]
        return rows, token_ids, self._attend(works, rows, split_keys=split_keys)

    def _attend(
        self, works: Sequence[Work], rows: list[Rows], *, split_keys: bool
    ) -> PagedAttention:
        """The attention of this forward; kept while no request changes its rows."""
        if self._prepared is not None and split_keys == self.split_keys:
            kept, attend = self._prepared
            if len(kept) == len(rows) and all(a is b for a, b in zip(kept, rows, strict=True)):
                return attend
        config = self.model.config
        tables = [work.request.pages for work in works]
        page_table = np.full((len(tables), max(t.num_pages for t in tables)), -1, np.int32)
        for table, pages in zip(tables, page_table, strict=True):
            table.fill_row(pages)
        layouts: list[SpanLayout] = [of_work.layout for of_work in rows]
        plan = ops.AttentionPlan.pack(
            layouts, num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
            head_dim=config.head_dim, device=self.device, page_table=torch.from_numpy(page_table),
            page_size=self.cache.page_size, split_keys=split_keys,
        )  # fmt: skip
        positions, slots = np.empty((2, plan.total_q), np.int64)
        row = 0
        for of_work, layout in zip(rows, layouts, strict=True):
            end = row + layout.num_rows
            positions[row:end], slots[row:end] = of_work.positions, of_work.slots
            row = end
        attend = PagedAttention(
            plan, self.cache, self.model, self._tensor(positions), self._tensor(slots)
        )
        if split_keys == self.split_keys:
            self._prepared = rows, attend
        return attend

    def _write_next(self, hidden: Tensor, rows: Sequence[_NextRow]) -> None:
        """Sample one token per row; a row is a span of one position to the kernel."""
        num = len(rows)
        if num == 0:
            return
        requests = [row.request for row in rows]
        logits = self._logits(hidden, [row.row for row in rows])
        wants_logprob = [i for i, r in enumerate(requests) if r.params.logprobs]
        raw = logits[self._tensor(wants_logprob)] if wants_logprob else None
        by_mask: dict[int, list[int]] = {}
        for idx, row in enumerate(rows):
            mask_idx = row.work.mask_idx[row.idx]
            if row.request.params.mode == "ar":
                mask_idx = self._ar_mask_idx
            if mask_idx is not None:
                by_mask.setdefault(mask_idx, []).append(idx)
        for mask_idx, masked in by_mask.items():
            is_all = len(masked) == num
            self._token_masks[mask_idx].apply(logits, None if is_all else self._tensor(masked))
        stats = ops.unmask_(
            torch.zeros(num, dtype=torch.int64, device=self.device),
            logits,
            self._count(num),
            self._count(num + 1),
            torch.ones(num, dtype=torch.int32, device=self.device),
            seeds=self._tensor([request.seed for request in requests]),
            positions=self._tensor(
                [len(row.request.token_ids) + row.idx for row in rows], torch.int32
            ),
            **self._sampling(requests),
        )
        token_ids = stats.candidate
        logprobs = self._logprobs(raw, token_ids, wants_logprob)
        for row, token_id, is_nan, logprob in zip(
            rows, token_ids.tolist(), stats.is_nan.tolist(), logprobs, strict=True
        ):
            row.predicted.token_ids.append(token_id)
            row.predicted.logprobs.append(logprob)
            row.predicted.is_nan |= is_nan

    def _denoise(
        self, hidden: Tensor, spans: Sequence[_OpenSpan], rule: ops.Rule, kind: SpanKind
    ) -> None:
        """One unmasking step over the open spans of many requests."""
        candidates = [span.span.candidates for span in spans]
        positions = [position for of_span in candidates for position in of_span]
        rows = [
            span.row_shift + position - self.model.config.logits_shift
            for span, of_span in zip(spans, candidates, strict=True)
            for position in of_span
        ]
        cu_rows = list(itertools.accumulate(map(len, candidates), initial=0))
        requests = [span.request for span in spans]
        wants_logprob = [
            row
            for request, (lo, hi) in zip(requests, itertools.pairwise(cu_rows), strict=True)
            if request.params.logprobs
            for row in range(lo, hi)
        ]
        token_ids = torch.full((len(rows),), -1, dtype=torch.int64, device=self.device)
        logits = self._logits(hidden, rows)
        stats = ops.unmask_(
            token_ids,
            logits,
            self._count(len(rows)),
            self._tensor(cu_rows, torch.int32),
            self._tensor([s.request.rule.quota(s.span.progress) for s in spans], torch.int32),
            rule=rule,
            threshold=self._tensor([r.params.threshold or 0.0 for r in requests], torch.float32),
            alg_temp=self._setting(
                [r.rule.order_temperature(r.params.alg_temp) for r in requests], torch.float32
            ),
            banned_ids=self.banned[kind],
            seeds=self._tensor(
                [
                    r.seed
                    for r, n in zip(requests, map(len, candidates), strict=True)
                    for _ in range(n)
                ]
            ),
            step_idx=self._tensor([s.span.step_idx for s in spans], torch.int32),
            positions=self._tensor(positions, torch.int32),
            **self._sampling(requests),
        )
        raw = logits[self._tensor(wants_logprob)] if wants_logprob else None
        logprobs = self._logprobs(raw, stats.candidate, wants_logprob)
        written, is_nan = token_ids.tolist(), stats.is_nan.tolist()
        for span, (lo, hi) in zip(spans, itertools.pairwise(cu_rows), strict=True):
            span.predicted.is_nan |= any(is_nan[lo:hi])
            span.predicted.writes += [
                Write(positions[row], written[row], logprobs[row])
                for row in range(lo, hi)
                if written[row] >= 0
            ]

    def _logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        return self.model.logits(hidden[self._tensor(rows)], self.project)

    def _logprobs(
        self, logits: Tensor | None, token_ids: Tensor, rows: list[int]
    ) -> list[float | None]:
        """Log-probability of the tokens of some rows, None for the others."""
        logprobs: list[float | None] = [None] * len(token_ids)
        if logits is not None:
            chosen = token_ids[self._tensor(rows)].clamp(min=0)[:, None]
            values = logits.float().log_softmax(-1).gather(1, chosen)[:, 0].tolist()
            for row, value in zip(rows, values, strict=True):
                logprobs[row] = value
        return logprobs

    def _sampling(self, requests: Sequence[Request]) -> _Sampling:
        """Per-span sampling settings for the kernel."""
        params = [request.params for request in requests]
        return {
            "temperature": self._setting([p.temperature or 0.0 for p in params], torch.float32),
            "top_p": self._setting([p.top_p for p in params], torch.float32),
            "top_k": self._setting([p.top_k or 0 for p in params], torch.int32),
        }

    def _setting(self, values: list[T], dtype: torch.dtype) -> T | Tensor:
        """One number where all agree, which spares a kernel that filters nothing its work."""
        if len(set(values)) == 1:
            return values[0]
        return self._tensor(values, dtype)

    def _tensor(
        self, values: Sequence[float] | np.ndarray, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Host numbers on the device of the model; a GPU gets them without a wait."""
        is_cpu = self.device.type == "cpu"
        if is_cpu and isinstance(values, np.ndarray):
            return torch.from_numpy(values)
        tensor = on_host(values, dtype, self.device)
        return tensor if is_cpu else tensor.to(self.device, non_blocking=True)

    def _count(self, end: int) -> Tensor:
        """``0 .. end - 1``, int32."""
        return torch.arange(end, dtype=torch.int32, device=self.device)

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A range on the timeline of NVIDIA's profilers."""
        if self.device.type == "cuda":
            return torch.cuda.nvtx.range(f"pdiff {name}")
        return contextlib.nullcontext()


class _TokenMask:
    """Which ids a row may predict, applied to few rows of logits without touching all of them."""

    def __init__(self, allowed: Tensor) -> None:
        self._is_few_allowed = int(allowed.sum()) * 2 < len(allowed)
        self._ids = (allowed if self._is_few_allowed else ~allowed).nonzero()[:, 0]

    def apply(self, logits: Tensor, rows: Tensor | None) -> None:
        """Ban ids in the rows of ``[num_rows, vocab_size]`` logits, in place; None: in all."""
        if rows is None:
            if not self._is_few_allowed:
                logits.index_fill_(1, self._ids, float("-inf"))
                return
            kept = logits[:, self._ids]
            logits.fill_(float("-inf"))
            logits[:, self._ids] = kept
            return
        at = rows[:, None], self._ids
        if self._is_few_allowed:
            kept = logits[at]
            logits.index_fill_(0, rows, float("-inf"))
            logits[at] = kept
        else:
            logits[at] = float("-inf")


@dataclasses.dataclass(frozen=True)
class _NextRow:
    """A row of the batch that predicts the token behind it: the ``idx``-th such of its work."""

    work: Work
    predicted: Predicted
    row: int
    idx: int

    @property
    def request(self) -> Request:
        return self.work.request


@dataclasses.dataclass(frozen=True)
class _OpenSpan:
    """A span of the batch; position p lies in batch row ``row_shift + p``."""

    work: Work
    predicted: Predicted
    span: Span
    row_shift: int

    @property
    def request(self) -> Request:
        return self.work.request

    @property
    def call(self) -> tuple[ops.Rule, SpanKind]:
        """Spans where it is the same can be unmasked by one call of the kernel."""
        return self.request.rule.kernel_rule, self.request.span_kind


class _Sampling(TypedDict):
    temperature: float | Tensor
    top_p: float | Tensor
    top_k: int | Tensor


def _span_rows(work: Work, end: int) -> Iterator[tuple[Span, int]]:
    """The open spans, which are the last rows of the work, and the batch row each starts at."""
    row = end - count_rows(work.spans)
    for span in work.spans:
        yield span, row
        row += span.num_rows


def _parts(spans: list[_OpenSpan], max_rows: int) -> Iterator[list[_OpenSpan]]:
    """Cut between spans so that no part has more than ``max_rows`` rows, if spans allow."""
    part: list[_OpenSpan] = []
    rows = 0
    for span in spans:
        num_rows = len(span.span.candidates)
        if part and rows + num_rows > max_rows:
            yield part
            part, rows = [], 0
        part.append(span)
        rows += num_rows
    if part:
        yield part
