"""The header of a GGUF file, with every length it announces checked against the file.

The ``gguf`` package, which knows the formats of tensors, trusts what a file says of itself.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

_MAX_KEYS, _MAX_TENSORS, _MAX_DIMS, _MAX_ALIGNMENT = 1 << 12, 1 << 16, 4, 1 << 16
_MAX_ITEMS = 1 << 22  # of all arrays together; those of a vocabulary of 256 Ki have about 1 Mi

# Value type -> its struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9

BlockSize = Callable[[int], tuple[int, int]]
"""Elements and bytes of a block, by the number of a tensor type; ValueError if there is none."""


class DamagedError(Exception):
    """What is wrong with a file."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        shape: Outermost dimension first.
        kind: Number of its type.
        start, num_bytes: Its place in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    num_bytes: int


def read_header(
    buffer: memoryview, block_size: BlockSize
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors by name.

    Raises:
        DamagedError: The file is cut off, or announces what it does not hold.
    """
    try:
        return _read_header(_Cursor(buffer), block_size)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise DamagedError(str(error)) from error


def _read_header(
    cursor: _Cursor, block_size: BlockSize
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if bytes(cursor.take(4)) != b"GGUF":
        raise DamagedError("it does not start with GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise DamagedError(f"expected version 2 or 3, got {version}")
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
        raise DamagedError(f"it announces {num_tensors} tensors and {num_keys} keys")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [(cursor.string(), _tensor_info(cursor, block_size)) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT:
        raise DamagedError(f"expected an alignment up to {_MAX_ALIGNMENT}, got {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, info in infos:
        placed = dataclasses.replace(info, start=data_start + info.start)
        if placed.start + placed.num_bytes > cursor.size:
            raise DamagedError(f"tensor {name[:80]!r} lies beyond its end")
        if name in tensors:
            raise DamagedError(f"tensor {name[:80]!r} comes twice")
        tensors[name] = placed
    return metadata, tensors


def _tensor_info(cursor: _Cursor, block_size: BlockSize) -> StoredTensor:
    """One entry; its start counts from where the data begin."""
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise DamagedError(f"expected 1 to {_MAX_DIMS} dimensions, got {num_dims}")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dims)]))
    kind, start = cursor.scalar("I"), cursor.scalar("Q")
    num_elements, num_bytes = block_size(kind)
    if min(shape) < 1 or shape[-1] % num_elements:
        raise DamagedError(f"a tensor of {list(shape)} has no whole blocks of {num_elements}")
    return StoredTensor(shape, kind, start, math.prod(shape) // num_elements * num_bytes)


class _Cursor:
    """Reads a buffer from its start, and never past its end."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._items_left = _MAX_ITEMS
        self.position = 0

    @property
    def size(self) -> int:
        return len(self._buffer)

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > self.size - self.position:
            raise DamagedError(f"{num_bytes} bytes announced at {self.position}, past its end")
        self.position += num_bytes
        return self._buffer[self.position - num_bytes : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return str(self.take(self.scalar("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise DamagedError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if count > self.size - self.position:  # an item has a byte at least
            raise DamagedError(f"an array of {count} announced at {self.position}, past its end")
        self._items_left -= count
        if self._items_left < 0:
            raise DamagedError(f"expected arrays of {_MAX_ITEMS} items in all, got more")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise DamagedError(f"unknown type {kind} of an array")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))
