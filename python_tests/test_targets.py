"""Labels, noise and loss: laws of our own; recorded behaviour is in test_golden_training.py."""

from __future__ import annotations

import types

import pytest
import torch

from pdiff_runtime import ControlTokens, ops
from pdiff_runtime.train import apply_noise, hybrid_loss, hybrid_targets, hybrid_weights
from pdiff_runtime.train.loss import KIND_AR, KIND_SPAN

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


@pytest.mark.parametrize(("mode", "is_hidden"), [("ar", False), ("diffusion", True)])
def test_other_modes_take_tags_for_tokens(mode, is_hidden):
    targets = hybrid_targets(IDS, TAGS, mode=mode)
    assert targets.labels.tolist() == [*IDS.tolist()[1:], -100]
    prompt_lens = torch.tensor([3])
    noised = apply_noise(IDS, TAGS, t=1.0, u=torch.zeros(13), prompt_lens=prompt_lens, mode=mode)
    assert (noised == MASK).tolist() == [False] * 2 + [is_hidden] * 11
    weights = hybrid_weights(IDS, noised, TAGS, t=0.5, prompt_lens=prompt_lens, mode=mode)
    assert weights.labels.tolist() == [-100, -100, *IDS.tolist()[3:], -100]
    assert set(weights.weight[2:-1].tolist()) == {2.0 if is_hidden else 1.0}
    assert weights.normaliser == 10.0


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
@pytest.mark.parametrize("ids", [[], [S0]])
def test_short_sequences_have_no_next_token(mode, ids):
    assert hybrid_targets(ids, TAGS, mode=mode).labels.tolist() == [-100] * len(ids)


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


def test_labels_and_weights_go_where_the_logits_are(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ops, "weighted_cross_entropy",
        lambda *tensors, normaliser: seen.extend(tensors) or types.SimpleNamespace(loss=None),
    )  # fmt: skip
    hybrid_loss(torch.empty(len(IDS), 30, device="meta"), IDS, IDS, TAGS, t=0.5)
    assert [tensor.device.type for tensor in seen] == ["meta"] * 4


@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion"])
def test_no_tensor_is_made_on_the_default_device(mode):
    u, logits, t, prompt_lens = torch.rand(13), torch.randn(13, 30), torch.ones(1), torch.ones(1)
    losses = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            noised = apply_noise(IDS, TAGS, t=t, u=u, prompt_lens=prompt_lens.int(), mode=mode)
            losses.append(hybrid_loss(logits, IDS, noised, TAGS, t=t, mode=mode))
    assert torch.equal(*losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_and_loss_of_cuda_tensors():
    generator = torch.Generator().manual_seed(0)
    u, logits = torch.rand(13, generator=generator), torch.randn(13, 30, generator=generator)
    t = torch.tensor([0.7])
    noised = apply_noise(IDS, TAGS, t=t, u=u)
    on_gpu = apply_noise(IDS.cuda(), TAGS, t=t.cuda(), u=u.cuda())
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), noised)
    expected = hybrid_loss(logits, IDS, noised, TAGS, t=t)
    for ids, seen in ((IDS, noised), (IDS.cuda(), on_gpu)):
        loss = hybrid_loss(logits.cuda(), ids, seen, TAGS, t=t)
        torch.testing.assert_close(loss.cpu(), expected)


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
    for t in (torch.tensor([0.5, 0.5]), torch.full((13,), 0.5), -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="t: expected one or 1 numbers from 0 to 1, got"):
            apply_noise(IDS, TAGS, t=t, u=torch.zeros(13))
        with pytest.raises(ValueError, match="t: expected one or 1 numbers from 0 to 1, got"):
            hybrid_weights(IDS, IDS, TAGS, t=t)
    with pytest.raises(ValueError, match=r"prompt_lens: expected shape \[1\], got \[2\]"):
        apply_noise(IDS, TAGS, t=0.5, u=torch.zeros(13), prompt_lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="mode: expected one of .* got 'hybrid'"):
        hybrid_loss(torch.zeros(13, 30), IDS, IDS, TAGS, t=0.5, mode="hybrid")
    with pytest.raises(ValueError, match="compat: expected None or 'published'"):
        hybrid_weights(IDS, IDS, TAGS, t=0.5, compat="other")
