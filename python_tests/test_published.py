"""The rendering of the published algorithm that benches compare with, against recorded answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import golden_data
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
ANSWERS = json.loads((GOLDEN / "answers.json").read_text("utf-8"))

sys.path.append(str(ROOT / "bench"))
published = pytest.importorskip("published", reason="needs the source tree's bench folder")


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["name"])
def test_answers_are_the_recorded_ones(answer):
    algorithm = published.Published(
        golden_data.recorded_model(),
        golden_data.recorded_tags(),
        steps_ratio=answer["steps_ratio"],
        top_k=answer["top_k"],
    )
    assert algorithm.generate(answer["prompt"], answer["script"]) == answer["sequence"]


def test_sampling_filters_as_published(tiny_model, tiny_tags):
    """Temperature first; top-p keeps the first token above it; then top-k."""
    logits = torch.tensor([0.5, 0.15, 0.3, 0.05]).log()[None]

    def kept(**fields) -> list[int]:
        algorithm = published.Published(tiny_model, tiny_tags, **{"top_k": 0, **fields})
        filtered = algorithm._filtered(logits)
        return (filtered > torch.finfo(filtered.dtype).min)[0].nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.6) == [0, 2]
    assert kept(top_p=0.9) == [0, 1, 2]
    assert kept(top_p=0.9, top_k=2) == [0, 2]
    assert kept(top_p=0.6, temperature=0.5) == [0]  # sharper: 0.68 for the first
    algorithm = published.Published(tiny_model, tiny_tags, temperature=1.0, top_p=0.6, top_k=0)
    confidence, token = algorithm._scored(logits.repeat(2000, 1))
    assert set(token.tolist()) == {0, 2}
    assert (token == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.05)
    entropy = torch.distributions.Categorical(probs=torch.tensor([0.625, 0.375])).entropy()
    assert confidence[0].item() == pytest.approx(-entropy.item(), abs=1e-3)
