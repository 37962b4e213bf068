"""The rendering of the published algorithm that benches compare with, against recorded answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch

from pdiff_runtime import ControlTokens, Decoder
from pdiff_runtime.models import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
ANSWERS = json.loads((GOLDEN / "answers.json").read_text("utf-8"))

sys.path.append(str(ROOT / "bench"))
published = pytest.importorskip("published", reason="needs the source tree's bench folder")


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["name"])
def test_answers_are_the_recorded_ones(answer):
    fields = json.loads((GOLDEN / "tiny_config.json").read_text("utf-8"))
    ids = fields["tags"]
    tags = ControlTokens(
        topic_start=ids["PROMISE_START"], topic_end=ids["PROMISE_END"],
        async_start=ids["ASYNC_START"], async_end=ids["ASYNC_END"], sync=ids["SYNC_TOKEN_ID"],
        mask=ids["MASK_TOKEN_ID"], pad=ids["PAD_TOKEN_ID"], eos=ids["EOS_TOKEN_ID"],
        digits=tuple(fields["digit_token_ids"]),
    )  # fmt: skip
    model = Decoder(ModelConfig.from_hf(fields | {"model_type": "Dream"}))
    model.load_state_dict(safetensors.torch.load_file(GOLDEN / "tiny.safetensors"), strict=True)
    algorithm = published.Published(
        model, tags, steps_ratio=answer["steps_ratio"], top_k=answer["top_k"]
    )
    assert algorithm.generate(answer["prompt"], answer["script"]) == answer["sequence"]
