"""The training loop: it learns, and a resumed run equals an unbroken one to the bit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from pdiff_runtime import ControlTokens
from pdiff_runtime.models import BUNDLED_MODEL, ModelConfig, Tokenizer
from pdiff_runtime.train.data import (
    DocumentEncoder,
    PackedDataset,
    TaggedDocument,
    read_documents,
)
from pdiff_runtime.train.loop import Trainer, stratified_times
from pdiff_runtime.train.recipe import Recipe, Stage, load_recipe
from pdiff_runtime.train.targets import span_bounds

DOCUMENTS = [
    TaggedDocument(
        f"Tell me about {name}: capital, size.",
        "<topic>capital3</topic><topic>size2</topic>"
        f"<async>The capital is {city}.</async><async>It is {size}.</async>",
    )
    for name, city, size in [
        ("Peru", "Lima", "large"),
        ("Malta", "Valletta", "small"),
        ("Chad", "N'Djamena", "large"),
        ("Fiji", "Suva", "small"),
    ]
]


@pytest.fixture(scope="module")
def encoder() -> DocumentEncoder:
    tokenizer = Tokenizer.from_dir(BUNDLED_MODEL)
    tags = ControlTokens.from_tokenizer(tokenizer, names=tokenizer.tag_names)
    return DocumentEncoder(tokenizer, tags, length_unit=4)


def recipe(**changes) -> Recipe:
    model = ModelConfig(
        vocab_size=2048, hidden_size=32, num_layers=2, num_heads_q=2, num_heads_kv=1, head_dim=16,
        intermediate_size=64, tie_word_embeddings=True, length_unit=4,
    )  # fmt: skip
    stages = (
        Stage(name="ar", num_tokens=700, formats={"untagged": 1.0}, batch_tokens=64),
        Stage(
            name="planned", num_tokens=1500, batch_tokens=96, warmup_steps=2,
            formats={"planned": 0.5, "untagged": 0.25, "diffusion": 0.25},
        ),
    )  # fmt: skip
    fields = {"name": "test", "model": model, "data": "", "tokenizer": "", "stages": stages,
              "log_every": 1, "save_every": 1000}  # fmt: skip
    return Recipe(**(fields | changes))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("stop_at", [3, 9, 14])
def test_a_resumed_run_is_bit_equal(encoder, tmp_path, stop_at):
    whole = Trainer(recipe(), DOCUMENTS, encoder, tmp_path / "whole")
    whole.train()
    Trainer(recipe(), DOCUMENTS, encoder, tmp_path / "parts").train(max_steps=stop_at)
    resumed = Trainer(recipe(), DOCUMENTS, encoder, tmp_path / "parts")
    resumed.train()
    assert resumed.progress == whole.progress
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", None),
        ("model.norm.weight", lambda weight: weight[:1].clone()),
        ("model.embed_tokens.weight", lambda weight: weight[:1].clone()),
        ("optimizer.exp_avg_sq.model.norm.weight", None),
        ("optimizer.exp_avg.model.norm.weight", lambda moment: moment[:1].clone()),
        ("progress", "{"),
        ("progress", '{"step": 1, "speed": 2}'),
    ],
)
def test_a_damaged_checkpoint_is_named(encoder, tmp_path, name, change):
    trainer = Trainer(recipe(), DOCUMENTS, encoder, tmp_path)
    trainer.train(max_steps=2)
    tensors = safetensors.torch.load_file(trainer.checkpoint)
    with safetensors.safe_open(trainer.checkpoint, "pt") as file:
        metadata = file.metadata()
    name = f"model.{name}" if name.startswith("model.") else name
    if name == "progress":
        metadata[name] = change
    elif change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, trainer.checkpoint, metadata)
    with pytest.raises(ValueError, match=r"checkpoint: .*checkpoint\.safetensors is damaged"):
        Trainer(recipe(), DOCUMENTS, encoder, tmp_path)


def test_a_run_does_not_go_on_with_other_documents(encoder, tmp_path):
    Trainer(recipe(), DOCUMENTS, encoder, tmp_path).train(max_steps=1)
    with pytest.raises(ValueError, match="is of other documents; the data have changed since"):
        Trainer(recipe(), DOCUMENTS[1:], encoder, tmp_path)


def test_it_learns(encoder, tmp_path):
    records: list[dict] = []
    stage = Stage(
        name="planned", num_tokens=40_000, formats={"planned": 1.0}, batch_tokens=512,
        learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=5,
    )  # fmt: skip
    Trainer(recipe(stages=(stage,)), DOCUMENTS, encoder, tmp_path, records.append).train()
    assert records[0]["loss_ar"] > 5
    assert records[-1]["loss_ar"] < 0.5
    assert records[-1]["loss_span"] < 0.6 * records[0]["loss_span"]


def test_no_tensor_is_made_on_the_default_device(encoder, tmp_path):
    losses = []
    for device in ("cpu", "meta"):
        records: list[dict] = []
        with torch.device(device):
            Trainer(recipe(), DOCUMENTS, encoder, tmp_path / device, records.append).train(3)
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_sees_the_losses_of_a_cpu(encoder, tmp_path):
    """Documents and noise are the same, so only rounding differs; a checkpoint moves between."""
    losses = {}
    for device in ("cpu", "cuda"):
        records: list[dict] = []
        out_dir = tmp_path / device
        Trainer(recipe(), DOCUMENTS, encoder, out_dir, records.append, device).train(max_steps=5)
        Trainer(recipe(), DOCUMENTS, encoder, out_dir, records.append, "cpu").train(max_steps=5)
        losses[device] = [record["loss"] for record in records]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)


def test_the_log_separates_plan_and_spans(encoder, tmp_path):
    Trainer(recipe(), DOCUMENTS, encoder, tmp_path).train(max_steps=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"loss_ar"' in lines[0]
    assert '"loss_span"' in lines[0]


def test_a_run_that_was_killed_logs_each_step_once(encoder, tmp_path):
    trainer = Trainer(recipe(), DOCUMENTS, encoder, tmp_path)
    trainer.train(max_steps=2)
    checkpoint = trainer.checkpoint.read_bytes()
    trainer.train(max_steps=2)
    trainer.checkpoint.write_bytes(checkpoint)  # as if it had not come to the next one
    Trainer(recipe(), DOCUMENTS, encoder, tmp_path).train(max_steps=3)
    records = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]


def test_a_broken_loss_stops_and_keeps_the_checkpoint(encoder, tmp_path):
    trainer = Trainer(recipe(), DOCUMENTS, encoder, tmp_path)
    trainer.train(max_steps=1)
    before = trainer.checkpoint.read_bytes()
    with torch.no_grad():
        trainer.model.model.norm.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        trainer.train()
    assert trainer.checkpoint.read_bytes() == before


def test_every_epoch_shows_every_document_once(encoder):
    encoded = [encoder(document) for document in DOCUMENTS * 5]
    dataset = PackedDataset(encoded, encoder.tags)
    for epoch in range(3):
        batches = dataset.epoch(seed=4, epoch=epoch, batch_tokens=100)
        assert sorted(i for batch in batches for i in batch) == list(range(20))
    first, again = (dataset.epoch(4, 0, 100) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    batch = dataset.batch(first[0])
    lo, hi = batch.cu_seqlens[:2].tolist()
    assert batch.token_ids[lo:hi].tolist() == encoded[first[0][0]].token_ids
    assert batch.positions[lo:hi].tolist() == list(range(hi - lo))


@pytest.mark.parametrize("isolate_spans", [True, False])
def test_spans_see_each_other_if_asked(encoder, isolate_spans):
    encoded = [encoder(document) for document in DOCUMENTS]
    dataset = PackedDataset(encoded, encoder.tags, isolate_spans=isolate_spans)
    first, second = (slice(*span) for span in span_bounds(encoded[0].token_ids, encoder.tags))
    sees = dataset.batch(np.array([0])).layouts[0].dense_mask()
    assert sees[first, first].all()
    assert sees[second, second].all()
    for rows, keys in ((first, second), (second, first)):
        assert (sees[rows, keys] != isolate_spans).all()


def test_a_recipe_says_whether_spans_see_each_other(encoder, tmp_path):
    stage = dataclasses.replace(recipe().stages[1], formats={"planned": 1.0})
    losses = {}
    for isolate_spans in (True, False):
        records: list[dict] = []
        changed = recipe(stages=(stage,), isolate_spans=isolate_spans)
        folder = tmp_path / str(isolate_spans)
        Trainer(changed, DOCUMENTS, encoder, folder, records.append).train(max_steps=1)
        losses[isolate_spans] = records[0]
    assert losses[True]["loss_ar"] == losses[False]["loss_ar"]  # no plan token sees a span
    assert losses[True]["loss_span"] != losses[False]["loss_span"]


def test_rounds_are_padded_each_by_their_own_numbers(encoder):
    tags = encoder.tags
    text = "<topic>a2</topic><async>Lima.</async><sync/><topic>b1</topic><async>It.</async>"
    ids = encoder(TaggedDocument("Hello.", text)).token_ids
    assert [hi - lo - 2 for lo, hi in span_bounds(ids, tags)] == [8, 4]
    assert ids.count(tags.sync) == 1


def test_formats_show_one_answer_in_three_ways(encoder):
    tags, tokenizer = encoder.tags, encoder.tokenizer
    planned, untagged, diffusion = (
        encoder(DOCUMENTS[0], form) for form in ("planned", "untagged", "diffusion")
    )
    answer = "The capital is Lima. It is large."
    assert encoder.visible_text(DOCUMENTS[0]) == answer
    text = tokenizer.decode(untagged.token_ids[untagged.prompt_len : -1])
    assert text == answer
    ids = planned.token_ids
    starts = [p for p, i in enumerate(ids) if i == tags.async_start]
    ends = [p for p, i in enumerate(ids) if i == tags.async_end]
    assert [end - start - 1 for start, end in zip(starts, ends, strict=True)] == [12, 8]
    assert ids[-1] == tags.eos
    inner = diffusion.token_ids[diffusion.prompt_len : -2]
    assert len(inner) % 4 == 0
    assert tokenizer.decode([i for i in inner if i != tags.pad]) == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<topic>capital2</topic>", "1 topics but 0 spans"),
        ("<topic>capital</topic><async>Lima.</async>", r"got 5 \(topic_end\)"),
        ("<topic>x1</topic><async>The capital is Lima and more.</async>", "a span of"),
        ("<async>Lima.", "never closed"),
    ],
)
def test_malformed_documents_are_named(encoder, text, message):
    with pytest.raises(ValueError, match=message):
        encoder(TaggedDocument("Hello.", text))


def test_files_are_checked_by_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "text": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2"):
        list(read_documents(file))


def test_times_are_stratified():
    t = stratified_times(100, torch.Generator().manual_seed(0))
    slices = ((t.sort().values - 0.001) / 0.999 * 100).floor()
    assert torch.equal(slices, torch.arange(100.0))


def test_shipped_recipes_load():
    assert load_recipe("atlas").stages[0].name == "ar"


STAGE = "data='x'\ntokenizer='x'\n[[stage]]\nname='a'\nnum_tokens=1\nformats={planned=1.0}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = 'x'", "at least one"),
        (
            "[[stage]]\nname='a'\nnum_tokens=1\nformats={planned=1.0}\nspeed=2",
            "unknown key 'speed'",
        ),
        ("[[stage]]\nname='a'\nnum_tokens=1\nformats={plan=1.0}", "formats must map"),
        ("[[stage]]\nname='a'", "missing key num_tokens, formats"),
        (f"{STAGE}\nwarmup_steps=-1", "warmup_steps: expected a number >= 0, got -1"),
        (f"{STAGE}\nlearning_rate='high'", "stage: learning_rate: expected float, got 'high'"),
        (f"{STAGE}\nlearning_rate=nan", "stage a: learning_rate: expected a number >= 0, got nan"),
        (f"compile='no'\n{STAGE}", "recipe: compile: expected bool, got 'no'"),
        (f"seed=true\n{STAGE}", "recipe: seed: expected int, got True"),
        (f"save_every=0\n{STAGE}", "save_every: expected a number >= 1, got 0"),
        (f"betas=[0.9]\n{STAGE}", "betas: expected two numbers"),
        (f"generation={{threshold=2}}\n{STAGE}", "threshold: expected a number from 0.0 to 1.0"),
        ("[stage]\nname='a'", "stage: expected a table, got 'name'"),
        ("x = [", "recipe"),
        (
            "data='x'\ntokenizer='x'\n[generation]\nspeed=2\n"
            "[[stage]]\nname='a'\nnum_tokens=1\nformats={planned=1.0}",
            "generation: unknown parameter 'speed'",
        ),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    file = tmp_path / "r.toml"
    model = "[model]\nvocab_size=8\nhidden_size=8\nnum_layers=1\nnum_heads_q=1\nnum_heads_kv=1\n"
    file.write_text(text + "\n" + model + "head_dim=8\nintermediate_size=8\n")
    with pytest.raises(ValueError, match=message):
        load_recipe(str(file))
    with pytest.raises(ValueError, match="the shipped ones are: atlas"):
        load_recipe("nothing")
