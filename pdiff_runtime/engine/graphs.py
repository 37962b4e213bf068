"""Forwards as captured graphs: to replay one costs the host a launch in place of hundreds.

A graph works on the memory it was captured over. So what a forward reads is brought into buffers
that stay, and batches are rounded up to few sizes; the rows beyond a batch write nothing, and
nobody reads them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pdiff_runtime import ops
from pdiff_runtime.engine.paged_attention import PagedAttention
from pdiff_runtime.models.decoder import Decoder, Project

MAX_SIZES = 32
"""Sizes that are kept; the least recently used one goes."""

_WARM_UP = 2  # calls before a function is captured
_WORD_STEP, _SLOT_STEP = 4096, 256

Run = Callable[[], Tensor]
K = TypeVar("K")
V = TypeVar("V")


class Graphs:
    """Captures work on a GPU, the current device.

    Captured graphs run one after another, and what one returns is read before the next one runs, so
    they share their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one for all, as memory is shared by stream

    def capture(self, run: Run) -> Run:
        """What replays the work that ``run`` launches; it returns the same memory each time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream,
            capture_error_mode="thread_local",  # other threads may use the GPU as they like
        ):  # fmt: skip
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class Captured:
    """A function over memory that stays: run as it is until it is warm, then replayed.

    Where the model's tensors are replaced by others, it gets warm again.

    Args:
        run: Launches the same work in every call.
        graphs: None runs it as it is for ever.
        model: What it runs.
    """

    def __init__(self, run: Run, graphs: Graphs | None, model: nn.Module) -> None:
        self._run, self._graphs = run, graphs
        self._tensors = [
            held for m in model.modules() for held in (m._parameters, m._buffers) if held
        ]
        self._addresses: list[int] = []
        self._num_run = 0
        self._replay: Run | None = None

    def __call__(self) -> Tensor:
        if self._graphs is None:
            return self._run()
        addresses = [
            0 if tensor is None else tensor.data_ptr()
            for held in self._tensors
            for tensor in held.values()
        ]
        if addresses != self._addresses:
            self._addresses, self._num_run, self._replay = addresses, 0, None
        if self._replay is None and self._num_run < _WARM_UP:
            self._num_run += 1
            return self._run()
        if self._replay is None:
            self._replay = self._graphs.capture(self._run)
        return self._replay()


class Recent(Generic[K, V]):
    """The things that were asked for last, by a key of each."""

    def __init__(self, max_size: int) -> None:
        self._things: collections.OrderedDict[K, V] = collections.OrderedDict()
        self._max_size = max_size

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The thing of a key; made where there is none."""
        thing = self._things.pop(key, None) or make()
        self._things[key] = thing
        if len(self._things) > self._max_size:
            self._things.popitem(last=False)
        return thing


@dataclasses.dataclass(frozen=True)
class ForwardSize:
    """How much memory the inputs of a forward take.

    Attributes:
        num_words: Of the attention plan.
        num_slots: Of its partial results, see :class:`pdiff_runtime.ops.AttentionPlan`.
    """

    num_rows: int
    num_words: int
    num_slots: int

    @classmethod
    def of(cls, attend: PagedAttention) -> ForwardSize:
        """Of a forward as it is."""
        return cls(len(attend.positions), len(attend.plan.words), attend.plan.num_slots)

    def rounded_up(self, row_step: int) -> ForwardSize:
        """So that many forwards have the same."""
        return ForwardSize(
            self.num_rows if self.num_rows == 1 else round_up(self.num_rows, row_step),
            round_up(self.num_words, _WORD_STEP),
            round_up(self.num_slots, _SLOT_STEP),
        )


class ForwardBuffers:
    """The inputs of forwards of one size, in memory that stays.

    Attributes:
        token_ids: ``[num_rows]`` int64.
        attend: How its rows attend, by the plan that was loaded last.
    """

    def __init__(self, size: ForwardSize, like: PagedAttention) -> None:
        plan = like.plan
        self.token_ids = torch.zeros(size.num_rows, dtype=torch.int64, device=plan.device)
        self.attend = PagedAttention(
            ops.AttentionPlan(
                torch.zeros(size.num_words, dtype=torch.int32, device=plan.device), None,
                plan.num_heads_q, plan.num_heads_kv, plan.head_dim, plan.impl,
                num_sequences=plan.num_sequences, total_q=size.num_rows, total_kv=plan.total_kv,
                num_slots=size.num_slots, page_size=plan.page_size,
            ),
            like.cache, like.model,
            positions=torch.zeros_like(self.token_ids),
            slots=torch.zeros_like(self.token_ids),
        )  # fmt: skip

    def load(self, token_ids: Sequence[int], attend: PagedAttention) -> None:
        """Take a forward of this size or less."""
        set_front(self.token_ids, token_ids)
        set_front(self.attend.plan.words, attend.plan.words)
        set_front(self.attend.positions, attend.positions)
        self.attend.slots[len(token_ids) :] = -1  # written nowhere
        set_front(self.attend.slots, attend.slots)


class CapturedForwards:
    """The decoder over few rows, which take longer to launch than to run.

    Args:
        model: The decoder.
        project: Applies its matrices.
        graphs: Captures the forwards of each size.
    """

    max_rows = 64

    def __init__(self, model: Decoder, project: Project, graphs: Graphs) -> None:
        self._model, self._project, self._graphs = model, project, graphs
        self._of_size: Recent[ForwardSize, tuple[ForwardBuffers, Captured]] = Recent(MAX_SIZES)

    def __call__(self, token_ids: Sequence[int], attend: PagedAttention) -> Tensor:
        """Hidden states ``[num_rows or more, hidden_size]``, until anything captured runs again."""
        size = ForwardSize.of(attend).rounded_up(row_step=8)
        buffers, run = self._of_size.get(size, lambda: self._new(ForwardBuffers(size, attend)))
        buffers.load(token_ids, attend)
        return run()

    def _new(self, buffers: ForwardBuffers) -> tuple[ForwardBuffers, Captured]:
        def run() -> Tensor:
            return self._model(buffers.token_ids, buffers.attend, self._project)

        return buffers, Captured(run, self._graphs, self._model)


def on_host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in memory of the host from which a GPU copies them without a wait."""
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def set_front(buffer: Tensor, values: Any) -> None:
    """Write values to the front of a buffer; a GPU gets them without a wait."""
    if not isinstance(values, Tensor):
        values = on_host(values, buffer.dtype, buffer.device)
    buffer[: len(values)].copy_(values, non_blocking=True)


def round_up(number: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-number // step) * step
