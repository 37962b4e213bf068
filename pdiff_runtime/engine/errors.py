"""What can go wrong with a request, as types a server can tell apart.

A bad argument is a ``ValueError`` that names it, before anything is queued.
"""

from __future__ import annotations


class RequestTooLongError(ValueError):
    """A request that could never fit, whatever the engine does."""


class DuplicateRequestError(ValueError):
    """A request id that the engine already holds."""


class OverloadedError(RuntimeError):
    """The queue is full, or the engine takes no more requests; later it may again."""


class EngineDeadError(RuntimeError):
    """A step raised something unforeseen; the engine answers nothing any more."""


class GenerationError(RuntimeError):
    """Why one answer failed. It is kept in its output, where nobody else's is touched."""


class InvalidPlanError(GenerationError):
    """The model wrote a plan that breaks the grammar (only without ``use_grammar``)."""


class BadLogitsError(GenerationError):
    """The model's logits are not numbers."""


class OutOfMemoryError(GenerationError):
    """A forward did not fit into memory, not even with half of the batch."""
