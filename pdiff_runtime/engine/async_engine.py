"""The engine for servers: requests come and go from an event loop, one thread does the steps.

The thread owns the engine. What the loop wants of it goes through a queue that is emptied between
two steps, and what the engine says comes back through ``call_soon_threadsafe``; so a slow reader
never holds up a step, and a step never holds up the loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Literal, Self

from pdiff_runtime.engine.errors import DuplicateRequestError, EngineDeadError, OverloadedError
from pdiff_runtime.engine.llm import LLM, Prompt
from pdiff_runtime.engine.output import Event, Finished, RequestOutput
from pdiff_runtime.engine.params import GenerationParams, check_type

logger = logging.getLogger(__name__)

State = Literal["running", "draining", "stopped", "dead"]


@dataclasses.dataclass(frozen=True)
class Health:
    """How the engine is.

    Attributes:
        state: "running", "draining" (takes no new requests), "stopped", or "dead".
        num_waiting, num_running: Requests.
        num_free_pages, num_pages: Of the KV cache; free ones include what only the prefix cache
            holds.
        num_steps, num_preemptions: Since the start.
        error: What killed it, for "dead".
    """

    state: State
    num_waiting: int
    num_running: int
    num_free_pages: int
    num_pages: int
    num_steps: int
    num_preemptions: int
    error: BaseException | None = None


class AsyncEngine:
    """Answers any number of requests at once, for one event loop.

    Use it as ``async with AsyncEngine(llm) as engine``. Meanwhile `llm` itself answers nobody else.
    Leaving the block ends what is still running with "abort"; call :meth:`drain` first to let it
    finish.

    Args:
        llm: The model and its engine.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._engine = llm.engine
        self._streams: dict[str, _Stream] = {}
        self._by_sample: dict[str, _Stream] = {}
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False
        self._is_stopping = False
        self._error: BaseException | None = None
        self._num_requests = 0

    async def __aenter__(self) -> Self:
        """Start the thread.

        Raises:
            RuntimeError: It was started before, the ``LLM`` is answering somebody, or the system
                has no thread left.
        """
        if self._thread is not None:
            raise RuntimeError("AsyncEngine: expected to be started once, got a second start")
        self.llm.acquire()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="pdiff-engine", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # no thread: there may be too many
            self._thread = None
            self.llm.release()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abort what is there, and wait for the step under way."""
        assert self._thread is not None
        self._is_draining = self._is_stopping = True
        self._command(lambda: None)
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event]:
        """Answer one prompt and say what happens on the way.

        Leaving the iteration early (close it: ``contextlib.aclosing``), or cancelling the task that
        runs it, aborts the request: its pages are free after the step that is under way.

        Args:
            prompt: Text, a conversation, or token ids.
            params: How to answer; None for ``llm.default_params``.
            request_id: None makes one up. Events carry it; with ``params.n > 1`` ``id/0`` and on.
            priority: Requests with smaller numbers are served first.
            timeout_s: Seconds after which the answer ends with what it has, and "deadline".

        Raises:
            ValueError: A bad prompt or parameter, or an id in use.
            OverloadedError: The queue is full, or the engine is draining or stopped.
            EngineDeadError: A step has failed in a way that nobody foresaw.
        """
        stream = self._submit(prompt, params, request_id, priority, timeout_s)
        try:
            for _ in range(stream.num_open):
                event: Event | None = None
                while not isinstance(event, Finished):
                    event = await stream.next_event()
                    yield event
        finally:
            if stream.num_open:
                self._command(lambda: self._abort(stream))

    async def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt, with ``params.n`` answers; see :meth:`stream`."""
        outputs = []
        events = self.stream(
            prompt, params, request_id=request_id, priority=priority, timeout_s=timeout_s
        )
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Finished):
                    outputs.append(event.output)
        # They end in any order: "id/10" comes after "id/9".
        return sorted(outputs, key=lambda output: (len(output.request_id), output.request_id))

    def abort(self, request_id: str) -> bool:
        """End a request with what it has: its stream finishes with "abort".

        Returns:
            Whether there was such a request.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._command(lambda: self._abort(stream))
        return True

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait until those that are there have finished.

        Args:
            timeout_s: How long to wait; what runs then is left running.

        Returns:
            Whether all have finished.
        """
        self._is_draining = True
        waiting = [asyncio.ensure_future(s.is_over.wait()) for s in self._streams.values()]
        if not waiting:
            return True
        _, pending = await asyncio.wait(waiting, timeout=timeout_s)
        for task in pending:
            task.cancel()
        return not pending

    def health(self) -> Health:
        """How the engine is; numbers may be those of the step before."""
        state: State = "running"
        if self._error is not None:
            state = "dead"
        elif self._is_stopping or self._thread is None:
            state = "stopped"
        elif self._is_draining:
            state = "draining"
        scheduler, allocator = self._engine.scheduler, self._engine.allocator
        return Health(
            state, len(scheduler.waiting), len(scheduler.running), allocator.num_free,
            allocator.num_pages, self._engine.num_steps, scheduler.num_preemptions, self._error,
        )  # fmt: skip

    # --- in the loop ---

    def _submit(
        self,
        prompt: Prompt,
        params: GenerationParams | None,
        request_id: str | None,
        priority: int,
        timeout_s: float | None,
    ) -> _Stream:
        if self._error is not None:
            raise EngineDeadError(f"engine: dead since {self._error!r}") from self._error
        if self._is_draining or self._thread is None:
            raise OverloadedError("engine: takes no requests, it is not running or is draining")
        if request_id is None:
            self._num_requests += 1
            request_id = f"async-{self._num_requests}"
        check_type("request_id", request_id, str)
        if request_id in self._streams:
            raise DuplicateRequestError(f"request_id: {request_id!r} is already there")
        params = params or self.llm.default_params
        request = self.llm.encode_request(prompt, params)
        self._engine.check(*request, priority=priority, timeout_s=timeout_s)
        stream = self._streams[request_id] = _Stream(request_id, params.n)

        def add() -> None:
            try:
                stream.sample_ids = self._engine.add(
                    request_id, *request, priority=priority, timeout_s=timeout_s, with_text=True
                )
            except (ValueError, OverloadedError) as error:
                self._post(self._fail, stream, error)
            else:
                self._by_sample.update(dict.fromkeys(stream.sample_ids, stream))

        self._command(add)
        return stream

    def _command(self, command: Callable[[], None]) -> None:
        """Have the thread do something before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _receive(self, deliveries: list[tuple[_Stream, Event]]) -> None:
        for stream, event in deliveries:
            stream.put(event)
            if stream.num_open == 0:
                self._streams.pop(stream.request_id, None)

    def _fail(self, stream: _Stream, error: BaseException) -> None:
        stream.fail(error)
        self._streams.pop(stream.request_id, None)

    def _fail_all(self, error: Exception) -> None:
        for stream in list(self._streams.values()):
            self._fail(stream, error)

    # --- in the thread ---

    def _run(self) -> None:
        left: Exception = OverloadedError("engine: stopped before the request came to it")
        try:
            while not self._is_stopping:
                with self._wake:
                    self._wake.wait_for(lambda: self._commands or self._engine.has_work)
                while self._commands:
                    self._commands.popleft()()
                self._deliver(self._engine.step())
            self._deliver(self._engine.abort(self._engine.request_ids))
        except BaseException as error:
            logger.exception("a step failed; the engine is dead")
            self._error = error
            left = EngineDeadError(f"engine: {error!r}")
        self._post(self._fail_all, left)
        self._engine.forget_all()
        self.llm.release()

    def _abort(self, stream: _Stream) -> None:
        self._deliver(self._engine.abort(stream.sample_ids))

    def _deliver(self, events: Sequence[Event]) -> None:
        if not events:
            return
        deliveries = [(self._by_sample[event.request_id], event) for event in events]
        for event in events:
            if isinstance(event, Finished):
                del self._by_sample[event.request_id]
        self._post(self._receive, deliveries)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *args)


class _Stream:
    """One request as its reader sees it; all but ``sample_ids`` belongs to the loop.

    Attributes:
        sample_ids: Its ids in the engine; the thread's.
        num_open: Answers that have not finished.
        is_over: Set when none is left.
    """

    def __init__(self, request_id: str, num_samples: int) -> None:
        self.request_id = request_id
        self.sample_ids: list[str] = []
        self.num_open = num_samples
        self.is_over = asyncio.Event()
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

    async def next_event(self) -> Event:
        """The next one in the order they happened.

        Raises:
            BaseException: What the request failed with, if nothing more can come.
        """
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)
        if isinstance(event, Finished):
            self.num_open -= 1
            if self.num_open == 0:
                self.is_over.set()

    def fail(self, error: BaseException) -> None:
        self._events.put_nowait(error)
        self.num_open = 0
        self.is_over.set()
