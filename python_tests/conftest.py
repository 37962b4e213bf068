"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from on_backends import is_left_out

from pdiff_runtime import ControlTokens, Decoder
from pdiff_runtime.models import ModelConfig, init_weights


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


TINY_TAGS = ControlTokens(
    topic_start=50, topic_end=51, async_start=52, async_end=53, sync=54, mask=55, pad=56, eos=57,
    digits=tuple(range(40, 50)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def device_survives() -> Iterator[None]:
    """A kernel's fault shows in the test that launched it; a lost GPU fails no other test."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        try:
            torch.cuda.synchronize()  # works again unless the process has lost the device
        except RuntimeError:
            print(f"CUDA device lost: {error}", file=sys.stderr, flush=True)
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)  # another worker goes on with the tests that are left
            pytest.exit(f"CUDA device lost: {error}", returncode=3)
        raise


@pytest.fixture
def tiny_tags() -> ControlTokens:
    """Control tokens of :func:`tiny_model`."""
    return TINY_TAGS


@pytest.fixture(scope="session")
def tiny_model() -> Decoder:
    """A random fp32 decoder with 58 tokens and a length unit of 2."""
    config = ModelConfig(
        vocab_size=58, hidden_size=32, num_layers=2, num_heads_q=4, num_heads_kv=2, head_dim=16,
        intermediate_size=48, max_position=512, length_unit=2,
    )  # fmt: skip
    return spread_model(config, 8.0)


def spread_model(config: ModelConfig, factor: float) -> Decoder:
    """A random decoder with matrices times ``factor``, so that decisions have margins."""
    model = Decoder(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model.eval().requires_grad_(False)
