"""Matrix products whose every row is the same bits in any company.

A matrix library picks its kernel by the number of rows, and kernels differ in the order of their
sums. Here rows go through a linear layer in tiles of a few fixed sizes, the last one padded with
zeros; sizes are used together only where they were seen to give equal bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pdiff_runtime.models.decoder import Project, project_at_once

SIZES = (16, 64, 128, 256, 512)
"""Rows of a tile. One row alone costs little less than 16; many rows want large tiles."""

_TYPICAL = (1, 32, 256)  # rows of a next token, of some, and of open spans


class RowTiles:
    """A :data:`~pdiff_runtime.models.decoder.Project` that is invariant to the batch.

    Which sizes agree is tried once for every shape of layers. The number of threads is part of what
    the library decides by: it must stay what it was.

    Args:
        project: Runs each tile.

    Raises:
        RuntimeError: On use, where the position of a row within a tile changes its bits, so that
            no tile size would do.
    """

    def __init__(self, project: Project = project_at_once) -> None:
        self._project = project
        self._tried: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._sizes: dict[tuple[nn.Linear, ...], tuple[int, ...]] = {}

    def __call__(self, linears: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
        """``[rows, in_features]`` -> ``[rows, out_features]`` of each layer."""
        num_rows, sizes = x.shape[0], self.sizes(linears)
        if num_rows in sizes:
            return self._project(linears, x)
        tiles = _tiles(num_rows, sizes)
        if num_rows and len(tiles) == 1:
            return [part[:num_rows] for part in self._project(linears, _padded(x, tiles[0]))]
        outs = [x.new_empty(num_rows, linear.out_features) for linear in linears]
        lo = 0
        for size in tiles:
            tile = x[lo : lo + size]
            for out, part in zip(outs, self._project(linears, _padded(tile, size)), strict=True):
                out[lo : lo + size] = part[: len(tile)]
            lo += size
        return outs

    def sizes(self, linears: Sequence[nn.Linear]) -> tuple[int, ...]:
        """The tile sizes for layers of these shapes, the largest first."""
        layers = tuple(linears)
        if layers not in self._sizes:
            shapes = tuple(
                (lin.weight.shape, lin.weight.dtype, lin.weight.device, lin.bias is None)
                for lin in layers
            )
            if shapes not in self._tried:
                self._tried[shapes] = agreeing_sizes(layers, self._project)
            self._sizes[layers] = self._tried[shapes]
        return self._sizes[layers]


def _padded(tile: Tensor, size: int) -> Tensor:
    """The tile with zeros behind it."""
    if len(tile) == size:
        return tile
    padded = tile.new_zeros(size, tile.shape[1])
    padded[: len(tile)] = tile
    return padded


@functools.lru_cache(maxsize=4096)
def _tiles(num_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the tiles that hold the rows, the largest first; the last one may be too large."""
    size, *smaller = sizes
    full, rest = divmod(num_rows, size)
    if rest == 0:
        return (size,) * full
    tiles = _tiles(rest, tuple(smaller)) if smaller else None
    if tiles is None or _cost((size,)) <= _cost(tiles):
        tiles = (size,)
    return (size,) * full + tiles


def _cost(tiles: Sequence[int]) -> int:
    """In rows: a product of few rows takes as long as one of some more."""
    return sum(size + 64 for size in tiles)


def agreeing_sizes(
    linears: Sequence[nn.Linear], project: Project = project_at_once
) -> tuple[int, ...]:
    """Sizes of :data:`SIZES` whose tiles give a row the same bits, the largest first.

    Layers of the same shapes try it. The order of a sum does not depend on its numbers, and theirs
    make it show: sums of which nothing is left but the rounding errors. Of the groups that agree,
    the one wins that costs least for a few typical numbers of rows.
    """
    weight = linears[0].weight
    generator = torch.Generator(weight.device).manual_seed(0)

    def cancelling(rows: int, sign: float) -> Tensor:
        """Rows whose second half repeats the first, but for the sign."""
        half = torch.randn(rows, weight.shape[1] // 2, generator=generator, device=weight.device)
        odd = half.new_zeros(rows, weight.shape[1] % 2)
        return torch.cat([half, sign * half, odd], 1).to(weight.dtype)

    layers = [copy.deepcopy(linear) for linear in linears]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(cancelling(layer.out_features, -1.0))
            if layer.bias is not None:
                layer.bias.zero_()
    x = cancelling(max(SIZES), 1.0)

    def all_rows(x: Tensor, size: int) -> Tensor:
        return torch.cat([torch.cat(list(project(layers, tile)), 1) for tile in x.split(size)])

    groups: list[tuple[Tensor, list[int]]] = []
    for size in SIZES:
        rows = all_rows(x, size)
        if not torch.equal(rows, all_rows(x.roll(1, 0), size).roll(-1, 0)):
            continue
        for seen, group in groups:
            if torch.equal(rows, seen):
                group.append(size)
                break
        else:
            groups.append((rows, [size]))
    if not groups:
        raise RuntimeError(
            f"batch_invariant: rows of a product of {list(weight.shape)} in {weight.dtype} depend "
            "on their position in a tile"
        )
    return min((tuple(sorted(group, reverse=True)) for _, group in groups), key=_relative_cost)


def _relative_cost(sizes: tuple[int, ...]) -> float:
    """Of typical batches in tiles, against each in one product."""
    return sum(_cost(_tiles(num_rows, sizes)) / _cost((num_rows,)) for num_rows in _TYPICAL)
