"""The tensors of a folder's safetensors files, one or several with an index."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pdiff_runtime.models.files import find_file, read_json, written_whole

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 16 << 20  # some hundred thousand tensors
_CHUNK_BYTES = 8 << 20
_HUGE_BYTES = 4 << 20
_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    start: int
    dtype: torch.dtype


class SafetensorsFolder:
    """Tensors by name.

    Attributes:
        shapes: Of all tensors.

    Raises:
        ValueError: A file is missing, outside the folder, or no sound safetensors file; a tensor is
            in two files; a dtype that is no float.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, _Stored] = {}
        for name in _file_names(folder):
            file = find_file(folder, name)
            if file is None:
                raise ValueError(f"model: no {name} in {folder}")
            header, start = _read_header(file)
            for tensor, fields in header.items():
                self._add(tensor, fields, file, start)

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype on the CPU, read straight into its memory.

        Raises:
            ValueError: The file has become shorter.
        """
        stored = self._stored[name]
        tensor = _empty(self.shapes[name], stored.dtype)
        rest = tensor.view(-1).view(torch.uint8).numpy().data
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            while rest:
                num_read = file.readinto(rest[:_CHUNK_BYTES])
                if not num_read:
                    raise ValueError(f"model: {stored.file} was cut off while it was read")
                rest = rest[num_read:]
        return tensor

    def _add(self, name: str, fields: dict[str, Any], file: Path, start: int) -> None:
        if name in self.shapes:
            raise ValueError(f"model: {name} is in two files, one of them {file}")
        if fields["dtype"] not in _DTYPES:
            raise ValueError(
                f"model: {name} in {file}: expected one of {', '.join(_DTYPES)}, "
                f"got {fields['dtype']}"
            )
        self.shapes[name] = tuple(fields["shape"])
        start += fields["data_offsets"][0]
        self._stored[name] = _Stored(file, start, _DTYPES[fields["dtype"]])


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one go: whoever reads meanwhile sees the old one or the new one.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    part = file.with_suffix(".tmp")
    with written_whole(file, part):
        part.touch()
        mode = part.stat().st_mode  # the library lets nobody but the owner read its files
        try:
            safetensors.torch.save_file(tensors, part, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{file}: cannot be written ({error})") from error
        part.chmod(mode)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in huge pages, if it is large: fresh small ones cost more than what is read."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of all tensors, which the library has checked, and where the data start."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"model: {path} is truncated or damaged (its header is too long)")
            with safetensors.safe_open(path, "pt"):
                header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ValueError(f"model: cannot read {path} ({error.strerror})") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"model: {path} is truncated or damaged ({error})") from error
    header.pop("__metadata__", None)
    return header, 8 + header_bytes


def _file_names(folder: Path) -> list[str]:
    index = find_file(folder, _INDEX)
    if index is None or find_file(folder, _SINGLE) is not None:  # the file first, as transformers
        return [_SINGLE]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"model: {index}: expected files by tensor under 'weight_map'")
    names = list(weight_map.values())
    if not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise ValueError(f"model: {index}: expected names of safetensors files")
    return sorted(set(names))
