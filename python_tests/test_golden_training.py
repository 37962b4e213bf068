"""Labels, noise and loss, as the published collator and trainer have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_data import load_npz, unpack

from pdiff_runtime import ControlTokens, SpanLayout
from pdiff_runtime.train import apply_noise, hybrid_loss, hybrid_targets, hybrid_weights
from pdiff_runtime.train.noise import time_from_uniform

MASKS = load_npz("masks")
COLLATOR = load_npz("collator")

# Published label lists of malformed input are too short or out of place; ours is an error.
MALFORMED = {
    "edge_unmatched_async": "never closed",
    "edge_unmatched_async_after_ok": "never closed",
    "edge_stray_async_end": "none is open",
    "edge_stray_async_end_after_block": "none is open",
    "edge_async_end_before_start": "none is open",
    "edge_nested_async": "inside the one",
}
# The published list lacks the last plan row's label here, so the span's stand one row too early.
NO_EOS = {"edge_no_eos_ends_in_block"}

LAYOUTS = {
    "hybrid": lambda ids, tags: SpanLayout.from_tokens(ids, tags),
    "ablate": lambda ids, tags: SpanLayout.from_tokens(ids, tags, isolate_spans=False),
    "diffusion_only": lambda ids, tags: SpanLayout.from_spans(0, [len(ids)]),
    "ar": lambda ids, tags: SpanLayout.causal(len(ids), len(ids)),
}
MODES = {"hybrid": "planned", "ablate": "planned", "diffusion_only": "diffusion", "ar": "ar"}


def tags_of(special: np.ndarray) -> ControlTokens:
    """Tags of a case; ids its sequences do not name are put out of the way."""
    async_start, async_end, sync, eos, pad, *mask = (int(i) for i in special)
    return ControlTokens(
        topic_start=900_010, topic_end=900_011, async_start=async_start, async_end=async_end,
        sync=sync, mask=mask[0] if mask else 900_012, pad=pad, eos=eos,
        digits=tuple(range(900_000, 900_010)),
    )  # fmt: skip


def collated(labels: np.ndarray, tags: ControlTokens, length: int) -> torch.Tensor:
    """What the collator makes of a label list: no tags, cut or filled up to the sequence."""
    kept = [-100 if i in (tags.async_start, tags.async_end) else int(i) for i in labels[:length]]
    return torch.tensor(kept + [-100] * (length - len(kept)))


@pytest.mark.parametrize("case", MASKS["cases"].tolist(), ids=lambda c: str(MASKS["names"][c]))
def test_labels(case):
    field = {name[4:]: value for name, value in MASKS.items() if name.startswith(f"{case:03d}_")}
    ids, tags, name = field["ids"].tolist(), tags_of(field["special"]), str(MASKS["names"][case])
    if name in MALFORMED:
        with pytest.raises(ValueError, match=MALFORMED[name]):
            hybrid_targets(ids, tags)
        return
    targets = hybrid_targets(ids, tags)
    if name in NO_EOS:  # ours are those of the sequence with its eos
        whole = hybrid_targets([*ids, tags.eos], tags)
        assert torch.equal(targets.labels, whole.labels[:-1])
        return
    for version in ("v2", "v3"):  # v3 differs in the labels of tags alone
        expected = collated(field[f"labels_{version}"], tags, len(ids))
        assert torch.equal(targets.labels, expected)
        assert np.array_equal(~targets.is_span.numpy(), field[f"ar_{version}"].astype(bool))
    # The unused v1 labels the rows of spans with their own tokens.
    unshifted = torch.where(targets.is_span, torch.tensor(ids), targets.labels)
    assert torch.equal(
        collated(unshifted.numpy(), tags, len(ids)), collated(field["labels_v1"], tags, len(ids))
    )


@pytest.fixture(params=COLLATOR["cases"].tolist(), ids=lambda c: f"{COLLATOR['modes'][c]}_{c}")
def batch(request):
    """The fields of one case, with its mode and tags."""
    prefix = f"{request.param:02d}_"
    fields = {name[3:]: value for name, value in COLLATOR.items() if name.startswith(prefix)}
    ids = torch.from_numpy(fields["ids"]).long()
    mode = str(COLLATOR["modes"][request.param])
    return fields | {"ids": ids, "mode": mode, "tags": tags_of(COLLATOR["special"])}


def test_who_sees_whom(batch):
    layout = LAYOUTS[batch["mode"]](batch["ids"], batch["tags"])
    n = len(batch["ids"])
    assert batch["attend_shape"][-2:].tolist() == [n, n]
    assert np.array_equal(layout.dense_mask().numpy(), unpack(batch["attend"], (n, n)))


def test_noise_labels_and_loss(batch):
    ids, tags, mode = batch["ids"], batch["tags"], MODES[batch["mode"]]
    n = len(ids)
    # Plain next tokens are not noised at any level.
    t, u = float(batch.get("t", 1.0)), torch.from_numpy(batch.get("u", np.zeros(n, np.float32)))
    settings = {
        "prompt_lens": torch.tensor([int(batch["prompt_length"])]),
        "mode": mode,
        "compat": "published",
    }
    noised = apply_noise(ids, tags, t=t, u=u, **settings)
    assert torch.equal(noised, torch.from_numpy(batch["noised_ids"]).long())

    weights = hybrid_weights(ids, noised, tags, t=t, **settings)
    labels = torch.from_numpy(batch["labels"]).long()
    if mode == "ar":  # these are recorded before the trainer's shift
        labels = torch.cat([labels[1:], torch.tensor([-100])])
    assert torch.equal(weights.labels, labels)
    assert weights.normaliser == n - int(batch["num_prompt_tokens"])

    logits = torch.from_numpy(batch["logits"]).float()
    loss = hybrid_loss(logits, ids, noised, tags, t=t, **settings)
    assert loss.item() == pytest.approx(float(batch["loss"]), rel=1e-5)


def test_time_and_noise_are_drawn_from_the_seed(batch):
    """The time first, unless the data set gives it; then one uniform a token."""
    generator = torch.Generator().manual_seed(int(batch["seed"]))
    if batch["mode"] == "ar":
        assert not {"t", "u", "u_t"} & batch.keys()
        return
    u_t = torch.from_numpy(batch["t_given"])
    if u_t.isnan():
        u_t = torch.rand(1, generator=generator)
        assert u_t.item() == batch["u_t"]
    assert time_from_uniform(u_t).item() == batch["t"]
    u = torch.rand(1, len(batch["ids"]), generator=generator)
    assert np.array_equal(u[0].numpy(), batch["u"])
