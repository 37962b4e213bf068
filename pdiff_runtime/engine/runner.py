"""One ragged forward over the rows of many requests, and what their logits decide."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.cache import KVCache
from pdiff_runtime.denoise import RULES
from pdiff_runtime.engine.request import Request, Span, Work
from pdiff_runtime.models.decoder import Decoder
from pdiff_runtime.plan import SpanLayout


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the forward decided for one request.

    Attributes:
        token_ids: What follows each of the last rows, for a request that writes one by one.
        writes: ``(position, token_id)`` pairs, for one that denoises.
        is_nan: Some logits of the request were not numbers; nothing else is meaningful then.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    writes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    is_nan: bool = False


class PagedAttention:
    """Writes the rows' keys and values into their pages, then attends to the pages."""

    def __init__(
        self, plan: ops.AttentionPlan, cache: KVCache, model: Decoder, positions: Tensor,
        slots: Tensor,
    ) -> None:  # fmt: skip
        self.plan, self.cache, self.model = plan, cache, model
        self.positions, self.slots = positions, slots

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :data:`pdiff_runtime.models.decoder.Attend`."""
        k_cache, v_cache = self.cache.layer(layer_idx)
        ops.rope_kv_write_(
            q, k, v, self.model.cos, self.model.sin, self.positions, self.slots, k_cache, v_cache
        )
        return ops.hybrid_attention(q, k_cache, v_cache, self.plan)


class Runner:
    """Executes the :class:`Work` of all running requests.

    Args:
        model: The decoder.
        cache: Its paged keys and values.
        banned_in_span: ``[num_banned]`` int64 ids that no span may contain.
        plan_masks: ``[num_states, vocab_size]`` bool, what each grammar state allows.
        ar_mask: ``[vocab_size]`` bool, what mode "ar" allows.
        max_logits_rows: Logits rows computed at once; one span is never cut.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        banned_in_span: Tensor,
        plan_masks: Tensor,
        ar_mask: Tensor,
        max_logits_rows: int,
    ) -> None:
        self.model, self.cache = model, cache
        self.device = cache.k[0].device
        self.banned_in_span = banned_in_span.to(self.device)
        self.plan_masks, self.ar_mask = plan_masks.to(self.device), ar_mask.to(self.device)
        self.max_logits_rows = max_logits_rows
        self._prepared: tuple[list[SpanLayout], PagedAttention] | None = None

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Predicted]:
        """Forward every row once; the results are in the order of ``works``."""
        token_ids = self._tensor([token_id for work in works for token_id in work.token_ids])
        hidden = self.model(token_ids, self._attend(works))
        first_row = list(itertools.accumulate((len(w.positions) for w in works), initial=0))
        predicted: list[Predicted] = [Predicted()] * len(works)

        writers = [
            _RowJob(i, row) for i, work in enumerate(works) for row in range(len(work.mask_idx))
        ]
        for part in _parts(writers, self.max_logits_rows):
            for job, token_id, is_nan in self._next_tokens(hidden, part, works, first_row):
                seen = predicted[job.work_idx]
                predicted[job.work_idx] = Predicted(
                    token_ids=[*seen.token_ids, token_id], is_nan=seen.is_nan or is_nan
                )

        for rule in RULES:
            span_jobs = [
                _SpanJob(i, work.request, span, masked, quota, _row_of(work, span) + first_row[i])
                for i, work in enumerate(works)
                if work.request.params.unmask == rule
                for span, masked, quota in work.spans
            ]
            for span_part in _span_parts(span_jobs, self.max_logits_rows):
                for span_job, writes, is_nan in self._denoise(hidden, span_part, rule):
                    seen = predicted[span_job.work_idx]
                    predicted[span_job.work_idx] = Predicted(
                        writes=seen.writes + writes, is_nan=seen.is_nan or is_nan
                    )
        return predicted

    def _attend(self, works: Sequence[Work]) -> PagedAttention:
        """The attention of this forward; kept while no request changes its rows."""
        layouts = [work.layout for work in works]
        if self._prepared is not None:
            kept = self._prepared[0]
            if len(kept) == len(layouts) and all(map(_is, kept, layouts)):
                return self._prepared[1]
        config = self.model.config
        tables = [work.request.pages for work in works]
        max_pages = max(len(table.pages) for table in tables)
        page_table = torch.tensor(
            [table.pages + [-1] * (max_pages - len(table.pages)) for table in tables],
            dtype=torch.int32,
            device="cpu",
        )
        plan = ops.AttentionPlan.pack(
            layouts, num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
            head_dim=config.head_dim, device=self.device, page_table=page_table,
            page_size=self.cache.page_size,
        )  # fmt: skip
        positions = self._tensor([p for work in works for p in work.positions])
        slots = self._tensor(
            [table.slot(p) for work, table in zip(works, tables, strict=True)
             for p in work.positions]
        )  # fmt: skip
        attend = PagedAttention(plan, self.cache, self.model, positions, slots)
        self._prepared = layouts, attend
        return attend

    def _next_tokens(
        self,
        hidden: Tensor,
        jobs: Sequence[_RowJob],
        works: Sequence[Work],
        first_row: Sequence[int],
    ) -> Iterator[tuple[_RowJob, int, bool]]:
        """Sample one token per row; a row is a span of one position to the kernel."""
        of_job = [works[job.work_idx] for job in jobs]
        # Rows count from the end of their work, the last of `mask_idx` being the last row.
        rows = [
            first_row[job.work_idx + 1] - len(work.mask_idx) + job.row_idx
            for job, work in zip(jobs, of_job, strict=True)
        ]
        logits = self.model.logits(hidden[self._tensor(rows)])
        for row, (job, work) in enumerate(zip(jobs, of_job, strict=True)):
            mask_idx = work.mask_idx[job.row_idx]
            if work.request.params.mode == "ar":
                logits[row].masked_fill_(~self.ar_mask, float("-inf"))
            elif mask_idx is not None:
                logits[row].masked_fill_(~self.plan_masks[mask_idx], float("-inf"))
        num = len(jobs)
        requests = [work.request for work in of_job]
        stats = ops.unmask_(
            torch.zeros(num, dtype=torch.int64, device=self.device),
            logits,
            self._count(num),
            self._count(num + 1),
            self._tensor([1] * num, torch.int32),
            seeds=self._tensor([request.seed for request in requests]),
            positions=self._tensor(
                [len(request.token_ids) + job.row_idx
                 for job, request in zip(jobs, requests, strict=True)],
                torch.int32,
            ),
            **self._sampling(requests),
        )  # fmt: skip
        yield from zip(jobs, stats.candidate.tolist(), stats.is_nan.tolist(), strict=True)

    def _denoise(
        self, hidden: Tensor, jobs: Sequence[_SpanJob], rule: str
    ) -> Iterator[tuple[_SpanJob, list[tuple[int, int]], bool]]:
        """One unmasking step over the open spans of many requests."""
        positions = [p for job in jobs for p in job.masked]
        rows = [job.first_row + p - job.span.lo - 1 for job in jobs for p in job.masked]
        cu_rows = list(itertools.accumulate((len(job.masked) for job in jobs), initial=0))
        requests = [job.request for job in jobs]
        token_ids = torch.full((len(rows),), -1, dtype=torch.int64, device=self.device)
        stats = ops.unmask_(
            token_ids,
            self.model.logits(hidden[self._tensor(rows)]),
            self._count(len(rows)),
            self._tensor(cu_rows, torch.int32),
            self._tensor([job.quota for job in jobs], torch.int32),
            rule=RULES[rule].kernel_rule,
            threshold=self._tensor([r.params.threshold or 0.0 for r in requests], torch.float32),
            alg_temp=self._tensor([r.params.alg_temp for r in requests], torch.float32),
            banned_ids=self.banned_in_span,
            seeds=self._tensor([job.request.seed for job in jobs for _ in job.masked]),
            step_idx=self._tensor([r.rounds[-1].step_idx for r in requests], torch.int32),
            positions=self._tensor(positions, torch.int32),
            **self._sampling(requests),
        )
        written, is_nan = token_ids.tolist(), stats.is_nan.tolist()
        for job, (lo, hi) in zip(jobs, itertools.pairwise(cu_rows), strict=True):
            pairs = zip(positions[lo:hi], written[lo:hi], strict=True)
            yield job, [(p, token_id) for p, token_id in pairs if token_id >= 0], any(is_nan[lo:hi])

    def _sampling(self, requests: Sequence[Request]) -> _Sampling:
        """Per-span sampling settings for the kernel."""
        params = [request.params for request in requests]
        return {
            "temperature": self._tensor([p.temperature or 0.0 for p in params], torch.float32),
            "top_p": self._tensor([p.top_p for p in params], torch.float32),
            "top_k": self._tensor([p.top_k or 0 for p in params], torch.int32),
        }

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Host numbers on the device of the model; a GPU gets them without a wait."""
        if self.device.type == "cuda":
            pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
            return pinned.to(self.device, non_blocking=True)
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _count(self, end: int) -> Tensor:
        """``0 .. end - 1``, int32."""
        return torch.arange(end, dtype=torch.int32, device=self.device)


@dataclasses.dataclass(frozen=True)
class _RowJob:
    """One of the last rows of a work, which predicts the token that follows it."""

    work_idx: int
    row_idx: int


@dataclasses.dataclass(frozen=True)
class _SpanJob:
    """One open span in a batch; ``first_row`` is the batch row of its ``<async>``."""

    work_idx: int
    request: Request
    span: Span
    masked: list[int]
    quota: int
    first_row: int


def _row_of(work: Work, span: Span) -> int:
    """Index of the span's ``<async>`` among the rows of ``work``."""
    return work.positions.index(span.lo)


def _is(a: object, b: object) -> bool:
    return a is b


class _Sampling(TypedDict):
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor


def _parts(items: list[_RowJob], size: int) -> Iterator[list[_RowJob]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _span_parts(jobs: list[_SpanJob], max_rows: int) -> Iterator[list[_SpanJob]]:
    """Cut between spans so that no part has more than ``max_rows`` rows, if spans allow."""
    part: list[_SpanJob] = []
    rows = 0
    for job in jobs:
        if part and rows + len(job.masked) > max_rows:
            yield part
            part, rows = [], 0
        part.append(job)
        rows += len(job.masked)
    if part:
        yield part
