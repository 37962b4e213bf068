"""The tensors of a folder's safetensors files, one or several with an index."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor

from pdiff_runtime.models.files import find_file, read_json

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 16 << 20  # some hundred thousand tensors
_DTYPES = ("BF16", "F16", "F32", "F64")


class SafetensorsFolder:
    """Tensors by name, mapped into memory and read when they are copied.

    Attributes:
        shapes: Of all tensors.

    Raises:
        ValueError: A file is missing, outside the folder, or no sound safetensors file; a tensor is
            in two files; a dtype that is no float.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, safetensors.safe_open] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in _file_names(folder):
            self._open(folder, name)

    def read(self, name: str) -> Tensor:
        """A tensor whose memory is the file's: copy it, the file may change."""
        return self._files[name].get_tensor(name)

    def _open(self, folder: Path, name: str) -> None:
        file = find_file(folder, name)
        if file is None:
            raise ValueError(f"model: no {name} in {folder}")
        try:
            with file.open("rb") as head:
                header_bytes = int.from_bytes(head.read(8), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(
                    f"model: {file} is truncated or damaged (a header of {header_bytes} bytes)"
                )
            tensors = safetensors.safe_open(file, "pt")
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"model: {file} is truncated or damaged ({error})") from error
        for name, each in slices.items():
            if name in self.shapes:
                raise ValueError(f"model: {name} is in two files of {folder}")
            if each.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"model: {name} in {file}: expected one of {', '.join(_DTYPES)}, "
                    f"got {each.get_dtype()}"
                )
            self._files[name] = tensors
            self.shapes[name] = tuple(each.get_shape())


def _file_names(folder: Path) -> list[str]:
    index = find_file(folder, _INDEX)
    if index is None:
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"model: {index}: expected files by tensor under 'weight_map'")
    names = set(weight_map.values()) if all(map(_is_text, weight_map.values())) else {""}
    if not all(name.endswith(".safetensors") for name in names):
        raise ValueError(f"model: {index}: expected names of safetensors files")
    return sorted(names)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
