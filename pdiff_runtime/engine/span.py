"""Open spans: which rows the next forward has of one, and which positions it may write.

A decoding mode is a kind of span. :class:`Span` is denoised as a whole; a :class:`BlockSpan` block
by block, with the keys and values of the rest as they were (Fast-dLLM); a :class:`BranchSpan` is
written token by token (skeleton-of-thought). All of them run in the same batches.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import Literal

from pdiff_runtime.denoise import Progress

Window = tuple[int, int, Literal["causal", "full"]]
"""Rows ``[lo, hi)`` to forward; causal ones see their span up to themselves, others all of it."""

BlockCache = Literal["prefix", "dual"]


class SpanKind(enum.Enum):
    """Where a span lies, which decides what it must not contain."""

    TAGGED = enum.auto()  # between its tags: no tag, no eos, no mask
    CANVAS = enum.auto()  # a whole answer: eos ends it
    PUBLISHED = enum.auto()  # whatever the model likes


class Span:
    """A span at positions ``[lo, hi)`` that is denoised as a whole.

    Attributes:
        content: Positions ``[lo, hi)`` between its tags, or behind the prompt.
        masked: Positions that still hold the mask, ascending.
        num_steps: Steps that the schedule has planned.
        step_idx: Denoising steps it has seen.
        carry: What the last step hands on to the next one's quota.
        is_started: It takes part in every forward from now on, and has its pages.
    """

    def __init__(self, lo: int, hi: int, content: tuple[int, int]) -> None:
        self.lo, self.hi, self.content = lo, hi, content
        self.masked = list(range(*content))
        self.num_steps = 1
        self.step_idx = 0
        self.carry = 0
        self.is_started = False

    @property
    def window(self) -> Window:
        """The rows of the next forward."""
        return self.lo, self.hi, "full"

    @property
    def num_rows(self) -> int:
        """How many rows those are."""
        lo, hi, _ = self.window
        return hi - lo

    @property
    def candidates(self) -> list[int]:
        """Masked positions that the next step may write."""
        return self.masked

    @property
    def progress(self) -> Progress:
        """Where the schedule is."""
        return Progress(len(self.masked), self.step_idx, self.num_steps, self.carry)

    @property
    def is_steady(self) -> bool:
        """Whether every step has the same rows and may write any mask."""
        return True

    def stepped(self, carry: int) -> None:
        """A step has run, and hands this on to the next one's quota."""
        self.step_idx += 1
        self.carry = carry

    def unmasked(self, positions: Collection[int]) -> None:
        """These positions have their tokens."""
        self.masked = [p for p in self.masked if p not in positions]

    def implied_pads(self, written: Mapping[int, int], pad: int) -> list[int]:
        """Masked positions that hold a pad too after a step that has written these tokens."""
        return []

    def lose_pages(self) -> None:
        """What was computed of it is lost."""
        self.is_started = False


class BlockSpan(Span):
    """A span whose blocks are filled from left to right.

    The first forward of a block has all rows of the span. With ``cache="prefix"`` the further ones
    have the block and what lies behind it, with "dual" the block alone: the other rows keep the
    keys and values of the block's first forward. None recomputes the span in every step.

    Attributes:
        block_len: Content positions of a block; the last one may be shorter.
        lead: Rows before the block that predict its positions: 1 with the usual shift of logits.
    """

    def __init__(
        self, lo: int, hi: int, content: tuple[int, int], *, block_len: int,
        cache: BlockCache | None, lead: int,
    ) -> None:  # fmt: skip
        super().__init__(lo, hi, content)
        self.block_len, self.cache, self.lead = block_len, cache, lead
        self._start_step = 0  # of the block

    @property
    def block(self) -> tuple[int, int]:
        """Positions of the first block that has masks."""
        start, end = self.content
        lo = start + (self.masked[0] - start) // self.block_len * self.block_len
        return lo, min(lo + self.block_len, end)

    @property
    def window(self) -> Window:
        lo, hi = self.block
        if self.cache is None or self.step_idx == self._start_step:
            return self.lo, self.hi, "full"
        return lo - self.lead, hi if self.cache == "dual" else self.hi, "full"

    @property
    def candidates(self) -> list[int]:
        end = self.block[1]
        return [p for p in self.masked if p < end]

    @property
    def progress(self) -> Progress:
        step_idx = self.step_idx - self._start_step
        return Progress(len(self.candidates), step_idx, self.num_steps, self.carry)

    @property
    def is_steady(self) -> bool:
        return False

    def unmasked(self, positions: Collection[int]) -> None:
        end = self.block[1]
        super().unmasked(positions)
        if not self.masked or self.masked[0] >= end:
            self._start_step = self.step_idx


class BranchSpan(Span):
    """A span that is written token by token, each seeing the context and the tokens before it.

    Attributes:
        computed: Positions before it have their keys and values.
    """

    def __init__(self, lo: int, hi: int, content: tuple[int, int]) -> None:
        super().__init__(lo, hi, content)
        self.computed = lo

    @property
    def window(self) -> Window:
        return self.computed, self.masked[0], "causal"

    @property
    def candidates(self) -> list[int]:
        return self.masked[:1]

    @property
    def progress(self) -> Progress:
        return Progress(1, 0, 1)

    @property
    def is_steady(self) -> bool:
        return False

    def stepped(self, carry: int) -> None:
        self.computed = self.masked[0]
        super().stepped(carry)

    def implied_pads(self, written: Mapping[int, int], pad: int) -> list[int]:
        """A branch that has come to its pads says no more."""
        return self.masked[1:] if written.get(self.masked[0]) == pad else []

    def lose_pages(self) -> None:
        super().lose_pages()
        self.computed = self.lo
