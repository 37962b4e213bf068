"""A bar for calls that answer many prompts."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Answers done of all, and tokens a second, on stderr."""

    def __init__(self, total: int, is_shown: bool) -> None:
        self._progress = Progress(
            TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True), disable=not is_shown,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total, rate="")
        self._num_tokens = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, num_tokens: int) -> None:
        """One more answer."""
        self._num_tokens += num_tokens
        seconds = self._progress.tasks[0].elapsed or 0.0
        rate = f"{self._num_tokens / seconds:.0f} tokens/s" if seconds else ""
        self._progress.update(self._task, advance=1, rate=rate)
