"""Labels, noise and loss: the published collator's recordings, and laws of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_data import load_npz

from pdiff_runtime import ControlTokens
from pdiff_runtime.train import apply_noise, hybrid_loss, hybrid_targets, hybrid_weights
from pdiff_runtime.train.loss import KIND_AR, KIND_SPAN
from pdiff_runtime.train.noise import time_from_uniform

MASKS = load_npz("masks")
COLLATOR = load_npz("collator")
UNUSED_DIGITS = tuple(range(900_000, 900_010))

MALFORMED_LABELS = {
    # The published label list is of another length or shifted here; DESIGN section 2 raises.
    "edge_unmatched_async", "edge_stray_async_end", "edge_nested_async",
    # Published: eos stands at the last row, which is </async>, and the span's labels are shifted.
    "edge_no_eos_ends_in_block",
}  # fmt: skip


def tags_of(special: np.ndarray) -> ControlTokens:
    async_start, async_end, sync, eos, pad, *mask = (int(i) for i in special)
    return ControlTokens(
        topic_start=900_010, topic_end=900_011, async_start=async_start, async_end=async_end,
        sync=sync, mask=mask[0] if mask else 900_012, pad=pad, eos=eos, digits=UNUSED_DIGITS,
    )  # fmt: skip


def golden_label_cases() -> list[int]:
    return [int(c) for c in MASKS["cases"] if MASKS["names"][c] not in MALFORMED_LABELS]


@pytest.mark.parametrize("case", golden_label_cases(), ids=lambda c: str(MASKS["names"][c]))
def test_labels_equal_the_published_ones(case):
    ids, special = MASKS[f"{case:03d}_ids"], MASKS[f"{case:03d}_special"]
    tags = tags_of(special)
    targets = hybrid_targets(torch.from_numpy(ids), tags)
    expected = torch.from_numpy(MASKS[f"{case:03d}_labels_v2"]).long()
    # The collator turns span-tag labels into -100.
    expected[(expected == tags.async_start) | (expected == tags.async_end)] = -100
    assert torch.equal(targets.labels, expected)
    is_ar = torch.from_numpy(MASKS[f"{case:03d}_ar_v2"]).bool()
    assert torch.equal(targets.is_span, ~is_ar)


def golden_hybrid_cases() -> list[int]:
    return [int(c) for i, c in enumerate(COLLATOR["cases"]) if COLLATOR["modes"][c] == "hybrid"]


@pytest.mark.parametrize("case", golden_hybrid_cases())
def test_noise_and_loss_equal_the_published_ones(case):
    field = {
        name.removeprefix(f"{case:02d}_"): value
        for name, value in COLLATOR.items()
        if name.startswith(f"{case:02d}_")
    }
    tags = tags_of(COLLATOR["special"])
    ids = torch.from_numpy(field["ids"]).long()
    prompt_lens = torch.tensor([int(field["prompt_length"])])
    t = torch.tensor([float(field["t"])])
    noised = apply_noise(
        ids, tags, t=t, u=torch.from_numpy(field["u"]), prompt_lens=prompt_lens, compat="published"
    )
    assert torch.equal(noised, torch.from_numpy(field["noised_ids"]).long())
    weights = hybrid_weights(ids, noised, tags, t=t, prompt_lens=prompt_lens, compat="published")
    assert torch.equal(weights.labels, torch.from_numpy(field["labels"]).long())
    loss = hybrid_loss(
        torch.from_numpy(field["logits"]).float(), ids, noised, tags, t=t,
        prompt_lens=prompt_lens, compat="published",
    )  # fmt: skip
    assert loss.item() == pytest.approx(float(field["loss"]), rel=1e-5)


def test_time_is_the_published_map():
    case = golden_hybrid_cases()[0]
    drawn = [c for c in golden_hybrid_cases() if f"{c:02d}_u_t" in COLLATOR]
    for case in drawn:
        t = time_from_uniform(torch.from_numpy(COLLATOR[f"{case:02d}_u_t"]))
        assert t.item() == pytest.approx(float(COLLATOR[f"{case:02d}_t"]), rel=1e-6)


# prompt, topic, two spans, eos
A, B, P, T0, T1, S0, S1, EOS, MASK, SYNC, PAD = 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17
TAGS = ControlTokens(
    topic_start=T0, topic_end=T1, async_start=S0, async_end=S1, sync=SYNC, mask=MASK, pad=PAD,
    eos=EOS, digits=tuple(range(20, 30)),
)  # fmt: skip
IDS = torch.tensor([P, T0, A, 21, T1, S0, A, B, S1, S0, B, S1, EOS])


def test_labels_of_a_small_document():
    targets = hybrid_targets(IDS, TAGS)
    x = -100
    assert targets.labels.tolist() == [T0, A, 21, T1, EOS, A, B, x, x, B, x, x, EOS]
    assert (
        targets.is_content.tolist() == [False] * 6 + [True] * 2 + [False] * 2 + [True] + [False] * 2
    )


def test_only_hidden_targets_count_and_the_normaliser_counts_all():
    noised = IDS.clone()
    noised[7] = MASK
    weights = hybrid_weights(IDS, noised, TAGS, t=0.25, prompt_lens=torch.tensor([1]))
    counted = weights.labels != -100
    # Seven plan rows, and of the three span rows the one that predicts the hidden token.
    assert counted.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 12]
    assert weights.weight[6].item() == 4.0
    assert weights.weight[[0, 1, 2, 3, 4, 12]].tolist() == [1.0] * 6
    assert weights.kind[[0, 6]].tolist() == [KIND_AR, KIND_SPAN]
    assert weights.normaliser == 9.0


def test_tags_and_prompt_are_never_hidden():
    noised = apply_noise(IDS, TAGS, t=1.0, u=torch.zeros(len(IDS)), prompt_lens=torch.tensor([8]))
    assert (noised == MASK).nonzero()[:, 0].tolist() == [7, 10]


def test_packing_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    other = torch.tensor([P, P, A, EOS])
    packed = torch.cat([IDS, other, IDS])
    cu_seqlens = torch.tensor([0, 13, 17, 30])
    u = torch.rand(30, generator=generator)
    t = torch.tensor([0.3, 0.6, 0.9])
    prompt_lens = torch.tensor([1, 2, 3])
    noised = apply_noise(packed, TAGS, t=t, u=u, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens)
    whole = hybrid_weights(
        packed, noised, TAGS, t=t, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens
    )
    for i, (lo, hi) in enumerate([(0, 13), (13, 17), (17, 30)]):
        one = hybrid_weights(
            packed[lo:hi], noised[lo:hi], TAGS, t=t[i], prompt_lens=prompt_lens[i : i + 1]
        )
        assert torch.equal(one.labels, whole.labels[lo:hi])
        assert torch.equal(one.weight, whole.weight[lo:hi])


def test_no_targets_give_a_zero_loss():
    loss = hybrid_loss(
        torch.randn(3, 30), torch.tensor([P, P, P]), torch.tensor([P, P, P]), TAGS, t=0.5,
        prompt_lens=torch.tensor([4]),
    )  # fmt: skip
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("ids", "message"),
    [([S0, A], "never closed"), ([A, S1], "none is open"), ([S0, S0, S1, S1], "inside the one")],
)
def test_malformed_spans_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        hybrid_targets(ids, TAGS)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="u: expected shape"):
        apply_noise(IDS, TAGS, t=0.5, u=torch.zeros(3))
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending from 0 to 13"):
        apply_noise(IDS, TAGS, t=0.5, u=torch.zeros(13), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="compat: expected None or 'published'"):
        hybrid_weights(IDS, IDS, TAGS, t=0.5, compat="other")
