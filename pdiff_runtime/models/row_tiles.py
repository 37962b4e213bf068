"""Matrix products whose every row is the same bits in any company.

A matrix library picks its kernel by the number of rows, and kernels differ in the order of their
sums. Here rows go through a linear layer in tiles of a few fixed sizes, the last one padded with
zeros; sizes are used together only where they were seen to give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdiff_runtime.models.decoder import Project, project_at_once

SIZES = (16, 64, 256)
"""Rows of a tile. One row alone costs little less than 16; many rows want large tiles."""


class RowTiles:
    """A :data:`~pdiff_runtime.models.decoder.Project` that is invariant to the batch.

    Args:
        project: Runs each tile.

    Which sizes agree is tried once for every shape of layer. The number of threads is part of what
    the library decides by: it must stay what it was.

    Raises:
        RuntimeError: On use, where the position of a row within a tile changes its bits, so that
            no tile size would do.
    """

    def __init__(self, project: Project = project_at_once) -> None:
        self._project = project
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """``[rows, in_features]`` -> ``[rows, out_features]``."""
        sizes = self.sizes(linear)
        num_rows = x.shape[0]
        if num_rows in sizes:
            return self._project(linear, x)
        out = x.new_empty(num_rows, linear.out_features)
        lo = 0
        for idx, size in enumerate(sizes):  # the largest first
            while num_rows - lo >= size:
                out[lo : lo + size] = self._project(linear, x[lo : lo + size])
                lo += size
            rest = num_rows - lo
            # More than half a tile is cheaper padded than in smaller ones.
            if rest > size // 2 or (rest and idx == len(sizes) - 1):
                tile = x.new_zeros(size, x.shape[1])
                tile[:rest] = x[lo:]
                out[lo:] = self._project(linear, tile)[:rest]
                break
        return out

    def sizes(self, linear: nn.Linear) -> tuple[int, ...]:
        """The tile sizes for layers of this shape, the largest first."""
        weight = linear.weight
        key = (weight.shape, weight.dtype, weight.device, linear.bias is None)
        if key not in self._sizes:
            self._sizes[key] = agreeing_sizes(linear, self._project)
        return self._sizes[key]


def agreeing_sizes(linear: nn.Linear, project: Project = project_at_once) -> tuple[int, ...]:
    """Sizes of :data:`SIZES` whose tiles give a row the same bits, the largest first.

    The order of a sum does not depend on its numbers, so random ones show it. Of the groups that
    agree, the one with the smallest size wins among those with large ones.
    """
    weight = linear.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(
        max(SIZES), weight.shape[1], generator=generator, device=weight.device, dtype=torch.float32
    ).to(weight.dtype)
    groups: list[tuple[Tensor, list[int]]] = []
    for size in SIZES:
        rows = torch.cat([project(linear, tile) for tile in x.split(size)])
        shifted = torch.cat([project(linear, tile) for tile in x.roll(1, 0).split(size)]).roll(
            -1, 0
        )
        if not torch.equal(rows, shifted):
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
    wide = [group for _, group in groups if max(group) > SIZES[0]] or [groups[0][1]]
    return tuple(sorted(min(wide, key=lambda group: (min(group), -max(group))), reverse=True))
