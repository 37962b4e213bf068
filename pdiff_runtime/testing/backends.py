"""The implementations of this build, each with the device its tensors live on."""

from __future__ import annotations

import dataclasses

import torch

from pdiff_runtime.ops import Impl
from pdiff_runtime.ops._library import ELEMENT_TYPES, select_impl


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation on one device: what a test or bench is run over."""

    impl: Impl

    def __str__(self) -> str:
        return str(self.impl)

    @property
    def device(self) -> torch.device:
        """A GPU where there is one; else the CPU, where GPU kernels are emulated or interpreted."""
        on_gpu = self.impl in (Impl.CUDA, Impl.TRITON) and torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")

    @property
    def missing(self) -> str:
        """Why it can not run here; empty if it can."""
        try:
            select_impl(self.impl, self.device)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Element types it can be tested with."""
        if self.impl is Impl.TRITON and self.device.type == "cpu":
            # Interpreted, matrix products of bfloat16 are wrong.
            return tuple(dtype for dtype in ELEMENT_TYPES if dtype is not torch.bfloat16)
        return ELEMENT_TYPES

    @property
    def is_quick(self) -> bool:
        """Whether hundreds of cases are no burden: nothing is interpreted, emulated or compiled."""
        return self.impl is Impl.CPU or (self.impl is Impl.CUDA and self.device.type == "cuda")


BACKENDS = tuple(Backend(impl) for impl in (Impl.CPU, Impl.CUDA, Impl.TRITON))
