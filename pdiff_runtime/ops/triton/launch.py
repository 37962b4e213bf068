"""What a device offers, and how a kernel of matrix products is cut up for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

INTERPRETED_PROGRAMS = 3
"""Few enough that each of them takes several turns."""
HOPPER_SHARED_BYTES = 227 * 1024

P = ParamSpec("P")
T = TypeVar("T")


def launches_on_its_device(
    function: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """Of a function that launches kernels: on the GPU of its first argument, not the current one,
    which is where Triton launches."""

    @functools.wraps(function)
    def on_its_device(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        if not tensor.is_cuda:
            return function(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(tensor, *args, **kwargs)

    return on_its_device


class Multiprocessors(NamedTuple):
    """How many a device has, and the shared memory that one program may have there."""

    num: int
    shared_bytes: int


@functools.cache
def multiprocessors(device: torch.device) -> Multiprocessors:
    """Of a GPU; when kernels are interpreted, of none in particular."""
    if device.type == "cpu":
        return Multiprocessors(INTERPRETED_PROGRAMS, HOPPER_SHARED_BYTES)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(index)
    return Multiprocessors(properties["multiprocessor_count"], properties["max_shared_mem"])


class Config(NamedTuple):
    """Rows and keys of a block, warps of a program, and key tiles or row blocks in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int) -> int:
    """Matrix products take powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))
