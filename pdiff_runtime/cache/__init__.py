"""Keys and values of every request, in fixed-size pages."""

from pdiff_runtime.cache.kv_cache import KVCache
from pdiff_runtime.cache.page_allocator import OutOfPagesError, PageAllocator, PageTable

__all__ = ["KVCache", "OutOfPagesError", "PageAllocator", "PageTable"]
