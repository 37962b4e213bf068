"""The picture of an answer that fills in: one panel per span, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdiff_runtime.engine import PlanReady, SpanUpdate

Decode = Callable[[Sequence[int]], str]

MIN_PANEL_WIDTH = 26
_MASK, _FRESH, _PAD = "dim", "bold green", "dim"


@dataclasses.dataclass
class SpanView:
    """One span as it is known so far: a token id per position, None where it is still masked."""

    topic: str
    lo: int
    token_ids: list[int | None]
    fresh: set[int] = dataclasses.field(default_factory=set)

    @property
    def is_done(self) -> bool:
        """Whether no position is masked."""
        return None not in self.token_ids

    @property
    def num_written(self) -> int:
        """Positions that have their token."""
        return len(self.token_ids) - self.token_ids.count(None)

    def update(self, event: SpanUpdate) -> None:
        """Take the writes that fall into this span; they alone are fresh now."""
        self.fresh = set()
        for position, token_id in zip(event.positions, event.token_ids, strict=True):
            offset = position - self.lo
            if 0 <= offset < len(self.token_ids):
                self.token_ids[offset] = token_id
                self.fresh.add(offset)


class LiveRound:
    """The spans of one round.

    Args:
        event: The plan they come from.
        decode: Token ids to text.
        pad_id: Shown as a dot while the span is open, not at all when it is done.
        console: Where it will be drawn; its size decides the layout.
    """

    def __init__(self, event: PlanReady, decode: Decode, pad_id: int, console: Console) -> None:
        self.decode, self.pad_id, self.console = decode, pad_id, console
        names = event.topics or ["answer"]  # mode "diffusion" has no plan
        self.spans = [
            SpanView(name, lo, [None] * (hi - lo))
            for name, (lo, hi) in zip(names, event.bounds, strict=False)
        ]
        self.dropped = names[len(event.bounds) :]
        is_plain = console.options.ascii_only
        self.mask, self.pad, self.done = ("###", ".", "*") if is_plain else ("░░░", "·", "✓")
        self.step = 0
        self._heights: list[int] = []

    def update(self, event: SpanUpdate) -> None:
        """Take one denoising step."""
        self.step = event.step_idx + 1
        for span in self.spans:
            span.update(event)

    def finish(self) -> None:
        """Nothing is fresh any more."""
        for span in self.spans:
            span.fresh = set()

    def __rich__(self) -> RenderableType:
        grid, height = self._panels()
        if height > self.console.height - 2:
            grid = self._lines()
        caption = Text(f"step {self.step}", style="dim")
        if self.dropped:
            caption.append(f", no room for {', '.join(self.dropped)}")
        return Group(grid, caption)

    def _panels(self) -> tuple[Table, int]:
        """The panels in as many equal columns as fit, and their height."""
        width = self.console.width
        num_rows = -(-len(self.spans) // max(1, width // MIN_PANEL_WIDTH))
        num_columns = -(-len(self.spans) // max(1, num_rows))
        grid = Table.grid(expand=True)
        for _ in range(num_columns):
            grid.add_column(ratio=1)
        self._heights = self._heights or [0] * num_rows
        inner = max(1, width // max(1, num_columns) - 4)
        for row_idx in range(num_rows):
            spans = self.spans[row_idx * num_columns : (row_idx + 1) * num_columns]
            texts = [self._text(span) for span in spans]
            lines = max(len(text.wrap(self.console, inner)) for text in texts)
            # Rows grow but never shrink, so that nothing jumps.
            self._heights[row_idx] = max(self._heights[row_idx], lines + 2)
            grid.add_row(*map(self._panel, spans, texts, [self._heights[row_idx]] * len(spans)))
        return grid, sum(self._heights)

    def _panel(self, span: SpanView, text: Text, height: int) -> Panel:
        mark = f"{self.done} " if span.is_done else ""
        count = f" {span.num_written}/{len(span.token_ids)}"
        title = Text.assemble((f"{mark}{span.topic}", "bold"), (count, "dim"))
        border = "green" if span.is_done else "dim"
        return Panel(text, title=title, title_align="left", border_style=border, height=height)

    def _lines(self) -> Table:
        """One line per span, for plans that are too long for panels."""
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=1)
        table.add_column(max_width=max(8, self.console.width // 4), no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for span in self.spans:
            mark = Text(self.done if span.is_done else "", style="green")
            count = Text(f"{span.num_written}/{len(span.token_ids)}", style="dim")
            table.add_row(mark, Text(span.topic, style="bold"), count, self._text(span))
        return table

    def _text(self, span: SpanView) -> Text:
        """The span's text so far: runs of written tokens, marks for the rest."""
        text = Text()
        run: list[int] = []
        is_fresh = False

        def flush() -> None:
            if run:
                text.append(self.decode(run), style=_FRESH if is_fresh else "")
                run.clear()

        for offset, token_id in enumerate(span.token_ids):
            if token_id is not None and token_id != self.pad_id:
                if is_fresh != (offset in span.fresh):
                    flush()
                    is_fresh = not is_fresh
                run.append(token_id)
                continue
            flush()
            if token_id is None:
                text.append(f" {self.mask}", style=_MASK)
            elif not span.is_done:
                text.append(f" {self.pad}", style=_FRESH if offset in span.fresh else _PAD)
        flush()
        return text[1:] if text.plain.startswith(" ") else text
