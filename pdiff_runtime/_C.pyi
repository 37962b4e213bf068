"""The compiled core. Private: `pdiff_runtime.ops` is the interface."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__version__: str
compiler: str
build_type: str
cuda_architectures: str
built_with_cuda: bool
emulates_cuda: bool
built_with_openmp: bool

class CudaDevice(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_bytes: int

class Error(ValueError): ...

def isa_built() -> list[str]: ...
def isa_detected() -> str: ...
def isa_selected() -> str: ...
def select_isa(name: str | None) -> None: ...
def cuda_device_count() -> int: ...
def cuda_unavailable_reason() -> str: ...
def cuda_runtime_version() -> int: ...
def cuda_device(device_idx: int) -> CudaDevice: ...
def cuda_kernels(device_idx: int) -> str: ...
def select_cuda_kernels(name: str | None) -> None: ...
def cuda_can_launch(device_idx: int) -> bool: ...

class SpanLayout:
    @staticmethod
    def from_tokens(
        token_ids: npt.NDArray[np.int64],
        async_start: int,
        async_end: int,
        sync: int,
        isolate_spans: bool,
    ) -> SpanLayout: ...
    @staticmethod
    def from_segments(
        num_keys: int,
        num_rows: Sequence[int],
        kind: Sequence[int],
        interval_ptr: Sequence[int],
        intervals: Sequence[int],
    ) -> SpanLayout: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_keys(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def segments(self) -> npt.NDArray[np.int32]: ...
    @property
    def interval_ptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def intervals(self) -> npt.NDArray[np.int32]: ...
    @property
    def nbytes(self) -> int: ...
    def num_visible_pairs(self) -> int: ...
    def dense_mask(self) -> npt.NDArray[np.bool_]: ...
    def key_major(self) -> KeyMajorLayout: ...

class KeyMajorLayout:
    @property
    def segments(self) -> npt.NDArray[np.int32]: ...
    @property
    def range_ptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def ranges(self) -> npt.NDArray[np.int32]: ...
    @property
    def nbytes(self) -> int: ...

class PlanState:
    def __init__(self, max_topic_tokens: int, max_topics: int, budget: int) -> None: ...
    def advance(self, token_class: int) -> bool: ...
    def __copy__(self) -> PlanState: ...
    @property
    def mask_idx(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def num_topic_tokens(self) -> int: ...
    @property
    def finish(self) -> int: ...

def plan_mask_table() -> npt.NDArray[np.bool_]: ...

class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""

class PageAllocator:
    """Who holds which page of a KV cache, and which pages hold prefixes to find again.

    A page is held, by one reference or more, or evictable, which is cached and not held, or free.
    The prefix cache is a tree: an entry is a page under what determines its content, the serial of
    its parent (0 for none) and tokens, which are compared in full. A serial is never used twice.
    Whoever holds a page of the cache shall hold its parent as long: what is below an evicted page
    leaves the cache with it.

    Args:
        num_pages: Pages are numbered from 0 to ``num_pages - 1``.

    Raises:
        ValueError: Here and below, an argument is wrong; nothing was changed.
    """

    def __init__(self, num_pages: int) -> None: ...
    @property
    def num_pages(self) -> int:
        """Pages in all."""
    @property
    def num_free(self) -> int:
        """Pages that nobody holds, evictable ones included."""
    @property
    def num_cached(self) -> int:
        """Pages in the prefix cache, held or not."""
    @property
    def num_evictions(self) -> int:
        """Entries that had to leave the cache for allocations so far."""
    def allocate(self, count: int) -> list[int]:
        """Take pages, with one reference each.

        Free ones come first, last freed first; then those evictable that were released longest ago.

        Raises:
            OutOfPagesError: Fewer are free; none is taken.
        """
    def retain(self, pages: Sequence[int]) -> None:
        """Add one reference to each page, and to one listed twice two.

        Raises:
            ValueError: A page is neither held nor cached.
        """
    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; without any it is evictable if cached, else free.

        Args:
            pages: In the order of positions; the last is released first, and so evicted first.

        Raises:
            ValueError: A page is listed more often than it is held.
        """
    def reference_count(self, page: int) -> int:
        """How often a page is held."""
    def publish(self, page: int, parent: int, tokens: npt.NDArray[np.int64]) -> int:
        """Enter a page into the prefix cache.

        Args:
            page: Held and not cached.
            parent: Serial of the entry before it; 0 for none.
            tokens: ``[num_tokens]`` of any numbers, at least one: with ``parent``, all that
                determines what the page holds.

        Returns:
            The page's serial; 0, with nothing changed, if another page has this key.

        Raises:
            ValueError: ``page`` or ``tokens`` is not as above, or ``parent`` has left the cache.
        """
    def find(self, parent: int, tokens: npt.NDArray[np.int64]) -> tuple[int, int] | None:
        """Page and serial of the entry with this key.

        The page is not held by this, nor evicted later for it.
        """
    def clear_cache(self) -> None:
        """Take every page out of the prefix cache; held ones stay held."""
    def check_integrity(self) -> None:
        """Check that all the books agree, in time proportional to the pages.

        Raises:
            RuntimeError: They do not; it says where.
        """

class AttentionPlan:
    def __init__(
        self,
        layouts: Sequence[SpanLayout],
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        page_table: Tensor | None,
        page_size: int,
        for_gpu: bool,
        split_keys: bool,
        num_threads: int,
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def total_q(self) -> int: ...
    @property
    def total_kv(self) -> int: ...
    @property
    def num_tiles(self) -> int: ...
    @property
    def tile_rows(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_key_tiles(self) -> int: ...
    @property
    def num_pages(self) -> int: ...

# A tensor that is not there is None.
def use_tensor_type(tensor_type: type[Tensor]) -> None: ...
def fits(
    tensor: object,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | str | None, ...],
    like: Tensor,
    contiguous: bool,
) -> bool: ...
def hybrid_attention(
    plan: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    softmax_scale: float,
    num_threads: int,
) -> None: ...
def hybrid_attention_backward(
    plan: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    num_threads: int,
) -> None: ...
def unmask(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    num_masked: Tensor | None,
    banned_ids: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    confidence: Tensor,
    candidate: Tensor,
    is_nan: Tensor,
    is_written: Tensor,
    rule: int,
    settings: tuple[float | Tensor | None, ...],
    num_threads: int,
) -> None: ...
def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float, num_threads: int) -> None: ...
def swiglu(gate: Tensor, up: Tensor, out: Tensor, num_threads: int) -> None: ...
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    num_threads: int,
) -> None: ...
def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    kind: Tensor,
    dlogits: Tensor | None,
    loss: Tensor,
    weighted_sums: Tensor,
    unweighted_sums: Tensor,
    counts: Tensor,
    normaliser: float,
    num_threads: int,
) -> None: ...

plan_error_word: int

# Built with CUDA only; nothing waits for the device.
def hybrid_attention_workspace_bytes(num_slots: int, num_heads_kv: int, head_dim: int) -> int: ...
def hybrid_attention_cuda(
    plan: Tensor,
    num_slots: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    softmax_scale: float,
    workspace: Tensor,
    device_idx: int,
    stream: int,
) -> None: ...
def hybrid_attention_backward_workspace_bytes(total_q: int, num_heads_q: int) -> int: ...
def hybrid_attention_backward_fits(head_dim: int, device_idx: int) -> bool: ...
def hybrid_attention_backward_cuda(
    plan: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    workspace: Tensor,
    device_idx: int,
    stream: int,
) -> None: ...
def unmask_workspace_bytes(num_rows: int, vocab_size: int, filters: bool) -> int: ...
def unmask_cuda(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    num_masked: Tensor | None,
    banned_ids: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    confidence: Tensor,
    candidate: Tensor,
    is_nan: Tensor,
    is_written: Tensor,
    rule: int,
    settings: tuple[float | Tensor | None, ...],
    workspace: Tensor,
    device_idx: int,
    stream: int,
) -> None: ...
def plan_from_tokens_sizes(
    total_tokens: int,
    num_sequences: int,
    max_tags: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
) -> tuple[int, int]: ...
def plan_from_tokens_cuda(
    token_ids: Tensor,
    cu_seqlens: Tensor,
    max_tags: int,
    async_start: int,
    async_end: int,
    sync: int,
    isolate_spans: bool,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    words: Tensor,
    workspace: Tensor,
    device_idx: int,
    stream: int,
) -> None: ...
def rope_kv_write_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    device_idx: int,
    stream: int,
) -> None: ...
def weighted_cross_entropy_workspace_bytes(num_rows: int) -> int: ...
def weighted_cross_entropy_cuda(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    kind: Tensor,
    dlogits: Tensor | None,
    loss: Tensor,
    weighted_sums: Tensor,
    unweighted_sums: Tensor,
    counts: Tensor,
    normaliser: Tensor,
    workspace: Tensor,
    device_idx: int,
    stream: int,
) -> None: ...
def scale_gradient_cuda(dlogits: Tensor, factor: Tensor, device_idx: int, stream: int) -> None: ...
