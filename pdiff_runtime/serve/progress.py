"""How a training run is doing: a bar per stage on a terminal, else a line per log record; and the
signals that stop it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import click
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pdiff_runtime.train.recipe import Recipe

Record = dict[str, float | int | str]


class TrainingProgress:
    """Shows the log records of a :class:`pdiff_runtime.train.loop.Trainer`.

    Args:
        recipe: Names and lengths of its stages.
        is_live: Draw bars instead of printing lines.
    """

    def __init__(self, recipe: Recipe, *, is_live: bool) -> None:
        self.num_tokens = {stage.name: stage.num_tokens for stage in recipe.stages}
        self._bars: Progress | None = None
        self._task_of: dict[str, TaskID] = {}
        self._preparing = TaskID(0)
        if is_live:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(),
                TextColumn("{task.percentage:>5.1f}%"),
                TextColumn("{task.fields[note]}", style="dim"), TimeRemainingColumn(),
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._preparing = self._bars.add_task("preparing data", total=None, note="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bars is not None:
            self._bars.update(self._preparing, visible=False)
            self._bars.stop()

    def log(self, record: Record) -> None:
        """Show one record."""
        stage, total = str(record["stage"]), self.num_tokens[str(record["stage"])]
        losses = f"ar {record['loss_ar']:.3f}  span {record['loss_span']:.3f}"
        if self._bars is None:
            click.echo(
                f"{stage}  step {record['step']}  tokens {record['tokens']}/{total}  "
                f"loss {record['loss']:.4f}  {losses}  lr {record['lr']:.2e}  "
                f"{record['seconds']:.0f} s"
            )
            return
        self._bars.update(self._preparing, visible=False)
        note = f"step {record['step']}  {losses}"
        if stage not in self._task_of:
            self._task_of[stage] = self._bars.add_task(stage, total=total, note=note)
        self._bars.update(
            self._task_of[stage], completed=min(int(record["tokens"]), total), note=note
        )


class StopSignals:
    """Ctrl-C and SIGTERM as a wish to stop after the step under way; a second one ends at once.

    They are taken from the first time it is asked for the wish, so that what comes before training
    ends as ever.

    Attributes:
        number: Of the signal that came, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._give_back()

    def __call__(self) -> bool:
        """Whether to stop."""
        if self.number is None and not self._earlier:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._take)
        return self.number is not None

    def _take(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._give_back()
        click.echo("stopping after this step; once more to stop at once", err=True)

    def _give_back(self) -> None:
        while self._earlier:
            signal.signal(*self._earlier.popitem())
