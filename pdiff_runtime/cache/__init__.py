"""Keys and values of every request, in fixed-size pages."""

from pdiff_runtime.cache.kv_cache import KVCache
from pdiff_runtime.cache.page_table import PageTable
from pdiff_runtime.cache.shared_pages import SharedPages
from pdiff_runtime.ops.structures import OutOfPagesError, PageAllocator

__all__ = ["KVCache", "OutOfPagesError", "PageAllocator", "PageTable", "SharedPages"]
