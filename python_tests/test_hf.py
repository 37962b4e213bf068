"""Stock Hugging Face models with our attention, and planned diffusion behind their ``generate``."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence

import pytest
import torch
from tiny_engine import user_plan
from torch import Tensor

import pdiff_runtime
from pdiff_runtime import LLM, ControlTokens, Decoder, EngineConfig, GenerationParams, SpanLayout
from pdiff_runtime.hf.attention import _packed
from pdiff_runtime.models import BUNDLED_MODEL, ModelConfig
from pdiff_runtime.ops import AttentionPlan

transformers = pytest.importorskip("transformers")

FAMILIES = ("qwen2", "qwen3", "llama")
SHAPE = {
    "vocab_size": 58, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "max_position_embeddings": 512,
    "length_unit": 2, "bos_token_id": None, "eos_token_id": 57, "pad_token_id": 56,
}  # fmt: skip
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8}


def make_model(family: str, attn_implementation: str = "pdiff", **fields: object):
    """A random model of 58 tokens with matrices times 8, so that decisions have margins."""
    pdiff_runtime.register_hf()
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **fields})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return make_model(request.param)


def eager(model):
    """The same weights with transformers' own attention."""
    twin = make_model(model.config.model_type, "eager")
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(7))


def spans(tags: ControlTokens, *lengths: int | str) -> list[int]:
    """Token ids: an int is that much text, "sync" itself, and "n" a span with n tokens in it."""
    ids: list[int] = []
    for each in lengths:
        if each == "sync":
            ids.append(tags.sync)
        elif isinstance(each, str):
            ids += [tags.async_start, *[1] * int(each), tags.async_end]
        else:
            ids += [2] * each
    return ids


def layouts_of(tags: ControlTokens) -> list[SpanLayout]:
    """Three whole rows of 16 tokens, all of them different."""
    rows = (spans(tags, 4, "3", "2", "sync", 2), spans(tags, 1, "0", "9", 2), spans(tags, 16))
    return [SpanLayout.from_tokens(ids, tags) for ids in rows]


def dense(layouts: Sequence[SpanLayout], dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive mask ``[batch, 1, rows, keys]`` of layouts of the same size."""
    visible = torch.stack([layout.dense_mask() for layout in layouts])[:, None]
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def gradients(model, **inputs: object) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- attention ---


def test_without_a_plan_it_is_causal(model):
    ids = random_ids(3, 21)
    torch.testing.assert_close(model(ids).logits, eager(model)(ids).logits)


def test_a_plan_is_the_dense_mask(model, tiny_tags):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags)
    expected = eager(model)(ids, attention_mask=dense(layouts)).logits
    torch.testing.assert_close(model(ids, pdiff_plan=layouts).logits, expected)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)


def test_gradients_are_those_of_the_dense_mask(model, tiny_tags):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags)
    actual = gradients(model, input_ids=ids, labels=ids, pdiff_plan=layouts)
    expected = gradients(eager(model), input_ids=ids, labels=ids, attention_mask=dense(layouts))
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_are_the_same_with_checkpointing(model, tiny_tags):
    inputs = {"input_ids": random_ids(3, 16), "labels": random_ids(3, 16)}
    inputs |= {"pdiff_plan": layouts_of(tiny_tags), "use_cache": False}
    model.train()
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, **inputs).items():
        assert torch.equal(gradient, expected[name])


def test_the_scale_is_the_layer_s(model, tiny_tags):
    ids, layouts, twin = random_ids(3, 16), layouts_of(tiny_tags), eager(model)
    for each in (model, twin):
        for layer in each.model.layers:
            layer.self_attn.scaling = 0.1
    expected = twin(ids, attention_mask=dense(layouts)).logits
    torch.testing.assert_close(model(ids, pdiff_plan=layouts).logits, expected)


def test_bfloat16(model, tiny_tags):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags)
    exact = eager(model)(ids, attention_mask=dense(layouts)).logits
    model.to(torch.bfloat16)
    mask = dense(layouts, torch.bfloat16)
    eager_error = (eager(model)(ids, attention_mask=mask).logits - exact).abs().max()
    assert (model(ids, pdiff_plan=layouts).logits - exact).abs().max() < 2 * eager_error


def test_autocast(model, tiny_tags):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags)
    exact = eager(model)(ids, attention_mask=dense(layouts)).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager_error = (eager(model)(ids, attention_mask=dense(layouts)).logits - exact).abs().max()
        out = model(ids, labels=ids, pdiff_plan=layouts, use_cache=False)
    assert (out.logits - exact).abs().max() < 2 * eager_error
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_end_of_a_row_may_be_padding(model, tiny_tags):
    layouts = [SpanLayout.from_tokens(spans(tiny_tags, 2, *more), tiny_tags)
               for more in (("5", "2", "sync"), ("3", 1), ())]  # fmt: skip
    lengths = [layout.num_rows for layout in layouts]
    ids = random_ids(3, max(lengths))
    logits = model(ids, pdiff_plan=layouts).logits
    for row, length, layout in zip(range(3), lengths, layouts, strict=True):
        alone = eager(model)(ids[row : row + 1, :length], attention_mask=dense([layout])).logits[0]
        torch.testing.assert_close(logits[row, :length], alone)
    assert sorted(lengths) != [max(lengths)] * 3
    assert logits.isfinite().all()


def test_one_layout_serves_a_batch_of_one(model, tiny_tags):
    ids, layout = random_ids(1, 16), layouts_of(tiny_tags)[0]
    by_list = model(ids, pdiff_plan=[layout]).logits
    assert torch.equal(model(ids, pdiff_plan=layout).logits, by_list)


def test_packed_documents_equal_each_alone(model, tiny_tags):
    layouts = layouts_of(tiny_tags)
    ids = random_ids(1, 48)
    positions = torch.arange(16).repeat(3)[None]
    plan = AttentionPlan.pack(layouts, **HEADS)
    logits = model(ids, position_ids=positions, pdiff_plan=plan, use_cache=False).logits
    alone = model(ids.view(3, 16), pdiff_plan=layouts).logits
    torch.testing.assert_close(logits.view(3, 16, -1), alone)


def test_rows_after_a_cache_see_what_the_layout_says(model, tiny_tags):
    ids = random_ids(2, 16)
    whole = layouts_of(tiny_tags)[:2]
    context, open_spans = 6, SpanLayout.from_spans(6, [4, 6])
    cache = model(ids[:, :context]).past_key_values
    logits = model(ids[:, context:], past_key_values=cache, pdiff_plan=[open_spans] * 2).logits
    text = [(context, "causal", [(0, context)])]
    runs = [(4, "full", [(0, 10)]), (6, "full", [(0, context), (10, 16)])]
    whole = SpanLayout.from_segments(16, text + runs)
    expected = model(ids, pdiff_plan=[whole] * 2).logits[:, context:]
    torch.testing.assert_close(logits, expected)


def test_plain_generate_is_that_of_eager(model):
    ids = random_ids(2, 9)
    expected = eager(model).generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


def test_a_compiled_model_takes_a_plan(model, tiny_tags):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags)
    plan = AttentionPlan.pack(layouts, **HEADS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(ids, pdiff_plan=plan, use_cache=False).logits
    torch.testing.assert_close(actual, model(ids, pdiff_plan=layouts).logits)


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_forward_packs_its_plan_once(model, tiny_tags, has_plan):
    ids, layouts = random_ids(3, 16), layouts_of(tiny_tags) if has_plan else None
    _packed.cache_clear()
    model(ids, pdiff_plan=layouts)
    assert _packed.cache_info().misses == 1
    model(ids, pdiff_plan=layouts)
    assert _packed.cache_info().misses == 1


REFUSED = {
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)}, "attention_mask: .*padding"),
    "dense mask": ({"attention_mask": torch.zeros(2, 1, 4, 4)}, "attention_mask: .*dense"),
    "attention weights": ({"output_attentions": True}, "output_attentions"),
    "packed by positions": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]] * 2), "use_cache": False}, "pdiff_plan"
    ),
    "both directions": ({"is_causal": False}, "pdiff_plan"),
    "too few layouts": ({"pdiff_plan": SpanLayout.causal(4, 4)}, "expected 2 layouts.* got 1"),
    "a long layout": ({"pdiff_plan": [SpanLayout.causal(5, 5)] * 2}, r"pdiff_plan\[0\]"),
    "a layout for a cache": ({"pdiff_plan": [SpanLayout.causal(4, 6)] * 2}, r"pdiff_plan\[0\]"),
    "another type": ({"pdiff_plan": [[1, 2, 3, 4]] * 2}, "pdiff_plan"),
    "no sequence": ({"pdiff_plan": 3}, "pdiff_plan"),
    "a plan of other rows": (
        {"pdiff_plan": AttentionPlan.pack([SpanLayout.causal(4, 4)], **HEADS)}, "expected"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_do_is_refused(model, name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 4), **arguments)


def test_masks_and_flags_that_change_nothing_are_fine(model):
    ids = random_ids(2, 4)
    arguments = {"attention_mask": torch.ones(2, 4), "output_attentions": False}
    assert torch.equal(model(ids, **arguments).logits, model(ids).logits)


def test_a_layer_that_is_not_causal_needs_a_plan(model):
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="pdiff_plan"):
        model(random_ids(1, 4))
    assert model(random_ids(1, 4), pdiff_plan=SpanLayout.causal(4, 4)).logits.isfinite().all()


def test_a_cache_of_fixed_size_is_refused(model):
    cache = transformers.StaticCache(model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="past_key_values"):
        model(random_ids(1, 4), past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"attention_dropout": 0.1}, "dropout"),
        ({"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0},
         "sliding_window|pdiff_plan"),
    ],
)  # fmt: skip
def test_models_that_need_more_are_refused(fields, name):
    model = make_model("qwen2", **fields).train()
    with pytest.raises(ValueError, match=name):
        model(random_ids(1, 4))


def test_soft_caps_are_refused():
    config = transformers.AutoConfig.for_model(
        "gemma2", **SHAPE, layer_types=["full_attention"] * 2
    )
    pdiff_runtime.register_hf()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pdiff")
    with pytest.raises(ValueError, match="softcap"):
        model.eval()(random_ids(1, 4))


def test_without_transformers_the_error_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "import pdiff_runtime; pdiff_runtime.hf.generate; pdiff_runtime.register_hf()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: register_hf: " in result.stderr
    assert "pip install pdiff_runtime[hf]" in result.stderr


# --- generate ---

MAX_NEW = 48
NUM_ROWS = 4


def planned(model, ids: Tensor, tags: ControlTokens, **arguments: object) -> Tensor:
    arguments = {"max_new_tokens": MAX_NEW, "pdiff_tags": tags, **arguments}
    return model.generate(ids, custom_generate=pdiff_runtime.hf.generate, **arguments)


def own_llm(model, tags: ControlTokens) -> LLM:
    """An engine of our own over a copy of the weights."""
    decoder = Decoder(ModelConfig.from_hf(model.config.to_dict()))
    decoder.load_state_dict(model.state_dict())
    decoder.to(model.dtype).reset_rope()
    return LLM(decoder.eval(), tags=tags)


def expected_rows(
    model, prompts: Sequence[Sequence[int]], tags: ControlTokens, **fields: object
) -> list[list[int]]:
    """What our engine answers, with eos, up to ``max_tokens``."""
    params = GenerationParams(**{"max_tokens": MAX_NEW, "temperature": 0.0, **fields})
    outputs = own_llm(model, tags).generate(prompts, params)
    ends = [[tags.eos] * (output.finish_reason == "stop") for output in outputs]
    rows = [[*output.token_ids, *end] for output, end in zip(outputs, ends, strict=True)]
    return [row[: params.max_tokens] for row in rows]


def assert_rows(actual: Tensor, ids: Tensor, answers: Sequence[Sequence[int]], pad: int) -> None:
    """Prompts as they came, answers, and padding up to the longest."""
    longest = max(map(len, answers))
    padded = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
    assert actual.tolist() == [p + a for p, a in zip(ids.tolist(), padded, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_is_what_our_engine_answers(model, tiny_tags, dtype):
    model.to(dtype)
    ids = random_ids(NUM_ROWS, 7)
    expected = expected_rows(model, ids.tolist(), tiny_tags)
    assert_rows(planned(model, ids, tiny_tags), ids, expected, pad=56)

    plan = user_plan(tiny_tags, [3, 1, 4], [2])
    expected = expected_rows(model, ids.tolist(), tiny_tags, plan=plan)
    params = GenerationParams(plan=plan)
    assert_rows(planned(model, ids, tiny_tags, pdiff_params=params), ids, expected, pad=56)
    assert all(row.count(tiny_tags.async_start) == 4 for row in expected)


def test_answers_that_stop_end_in_eos_and_padding(model, tiny_tags):
    ids = random_ids(16, 5)
    expected = expected_rows(model, ids.tolist(), tiny_tags, mode="ar")
    actual = planned(model, ids, tiny_tags, pdiff_params=GenerationParams(mode="ar"))
    assert_rows(actual, ids, expected, pad=56)
    assert len({len(row) for row in expected}) > 1
    assert all(row[-1] == tiny_tags.eos for row in expected if len(row) < MAX_NEW)


def test_an_answer_that_was_cut_short_has_no_eos(model, tiny_tags):
    ids, plan = random_ids(1, 3), user_plan(tiny_tags, [3, 1, 4], [2])
    params = GenerationParams(plan=plan)
    actual = planned(model, ids, tiny_tags, pdiff_params=params, max_new_tokens=22)
    expected = expected_rows(model, ids.tolist(), tiny_tags, plan=plan, max_tokens=22)
    assert_rows(actual, ids, expected, pad=56)
    assert len(expected[0]) < 22
    assert tiny_tags.eos not in expected[0]


def test_left_padding_is_not_seen(model, tiny_tags):
    prompts = [random_ids(9).tolist(), random_ids(4).tolist(), random_ids(1).tolist()]
    ids = torch.tensor([[56] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = expected_rows(model, prompts, tiny_tags)
    assert_rows(planned(model, ids, tiny_tags, attention_mask=mask), ids, expected, pad=56)


def test_sampling_is_that_of_generate_s_arguments(model, tiny_tags):
    ids = random_ids(NUM_ROWS, 7)
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    expected = expected_rows(model, ids.tolist(), tiny_tags, seed=3, **sampling)
    params = GenerationParams(seed=3)
    actual = planned(model, ids, tiny_tags, do_sample=True, pdiff_params=params, **sampling)
    assert_rows(actual, ids, expected, pad=56)
    assert not torch.equal(actual, planned(model, ids, tiny_tags))
    plain = planned(model, ids, tiny_tags, do_sample=True, pdiff_params=params, top_k=0)
    expected = expected_rows(model, ids.tolist(), tiny_tags, seed=3, temperature=1.0)
    assert_rows(plain, ids, expected, pad=56)


def test_several_answers_to_a_prompt_differ(model, tiny_tags):
    ids = random_ids(2, 7)
    actual = planned(
        model, ids, tiny_tags, do_sample=True, top_k=0, num_return_sequences=3,
        pdiff_params=GenerationParams(seed=5),
    )  # fmt: skip
    expected = expected_rows(model, ids.tolist(), tiny_tags, seed=5, n=3, temperature=1.0)
    assert_rows(actual, ids.repeat_interleave(3, 0), expected, pad=56)
    assert len(set(map(tuple, expected))) == 6


def test_own_parameters_reach_the_engine(model, tiny_tags):
    ids = random_ids(NUM_ROWS, 7)
    params = GenerationParams(mode="diffusion", steps_ratio=0.25)
    expected = expected_rows(model, ids.tolist(), tiny_tags, mode="diffusion", steps_ratio=0.25)
    assert_rows(planned(model, ids, tiny_tags, pdiff_params=params), ids, expected, pad=56)


def test_a_checkpoint_may_recommend_parameters(model, tiny_tags):
    ids = random_ids(NUM_ROWS, 7)
    model.generation_config.pdiff = {"mode": "diffusion"}
    expected = expected_rows(model, ids.tolist(), tiny_tags, mode="diffusion")
    assert_rows(planned(model, ids, tiny_tags), ids, expected, pad=56)
    expected = expected_rows(model, ids.tolist(), tiny_tags)
    actual = planned(model, ids, tiny_tags, pdiff_params=GenerationParams())
    assert_rows(actual, ids, expected, pad=56)


@pytest.mark.parametrize("name", ["pdiff_params", "pdiff_tags", "pdiff_engine_config"])
def test_arguments_of_other_types_are_refused(model, tiny_tags, name):
    with pytest.raises(ValueError, match=f"{name}: expected [A-Z].*, got {{'a': 1}}"):
        planned(model, random_ids(1, 7), tiny_tags, **{name: {"a": 1}})


def test_a_bad_recommendation_is_named(model, tiny_tags):
    model.generation_config.pdiff = {"speed": 2}
    with pytest.raises(ValueError, match="generation_config: unknown parameter 'speed'"):
        planned(model, random_ids(1, 7), tiny_tags)


def test_parameters_are_shared_and_the_engine_is_kept(model, tiny_tags, monkeypatch):
    built = []
    monkeypatch.setattr(
        "pdiff_runtime.hf.sharing.LLM", lambda *a, **k: built.append(LLM(*a, **k)) or built[-1]
    )
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    ids = random_ids(1, 7)
    first = planned(model, ids, tiny_tags)
    assert torch.equal(planned(model, ids, tiny_tags), first)
    assert len(built) == 1
    assert not built[0].engine.config.pack_weights
    ours = {name: (p.data_ptr(), p.requires_grad) for name, p in built[0].model.named_parameters()}
    assert ours == before
    assert before == {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}

    planned(model, ids, tiny_tags, pdiff_engine_config=EngineConfig(page_size=16))
    assert len(built) == 2
    model.to(torch.bfloat16)
    planned(model, ids, tiny_tags)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    planned(model, ids, tiny_tags)
    assert len(built) == 4
    assert built[-1].model.lm_head.weight is model.lm_head.weight

    for factor in (1, 3):  # as a model that goes to another device and comes back, trained perhaps
        for parameter in model.parameters():
            parameter.data = factor * parameter.data
        actual = planned(model, ids, tiny_tags)
        assert_rows(actual, ids, expected_rows(model, ids.tolist(), tiny_tags), pad=56)
    assert len(built) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_packs_weights_is_built_once(model, tiny_tags, monkeypatch, dtype):
    model.to(dtype)
    built = []
    monkeypatch.setattr(
        "pdiff_runtime.hf.sharing.LLM", lambda *a, **k: built.append(LLM(*a, **k)) or built[-1]
    )
    ids = random_ids(1, 7)
    config = EngineConfig(prefix_cache=False)
    for factor in (1, 1, 3):
        for parameter in model.parameters():
            parameter.data = factor * parameter.data
        actual = planned(model, ids, tiny_tags, pdiff_engine_config=config)
        assert_rows(actual, ids, expected_rows(model, ids.tolist(), tiny_tags), pad=56)
    assert len(built) == 1


def test_training_between_two_calls_is_seen(model, tiny_tags):
    ids = random_ids(2, 200)  # more than a page of keys
    before = planned(model, ids, tiny_tags)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    actual = planned(model, ids, tiny_tags)
    assert_rows(actual, ids, expected_rows(model, ids.tolist(), tiny_tags), pad=56)
    assert not torch.equal(actual, before)


def test_a_model_is_not_kept_alive(tiny_tags):
    model = make_model("llama")
    planned(model, random_ids(1, 7), tiny_tags)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_tied_embeddings(tiny_tags):
    model = make_model("qwen2", tie_word_embeddings=True)
    ids = random_ids(2, 7)
    expected = expected_rows(model, ids.tolist(), tiny_tags)
    assert_rows(planned(model, ids, tiny_tags), ids, expected, pad=56)


@pytest.fixture(scope="module")
def bundled():
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    return model, tokenizer


PROMPTS = ["Tell me about Peru: capital, exports.", "What is the currency of Japan?"]


def test_the_bundled_model_answers_through_transformers(bundled):
    model, tokenizer = bundled
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(
        **inputs, custom_generate=pdiff_runtime.hf.generate, pdiff_tokenizer=tokenizer,
        max_new_tokens=100,
    )  # fmt: skip
    llm = LLM()  # its default parameters are those that generation_config.json recommends
    params = dataclasses.replace(llm.default_params, max_tokens=100)
    eos = llm.tags.eos
    answers = [[*each.token_ids, eos] for each in llm.generate(PROMPTS, params)]
    assert_rows(out, inputs["input_ids"], answers, pad=eos)
    assert "Lima" in tokenizer.decode(out[0])


def test_stop_strings_are_ours(bundled):
    model, tokenizer = bundled
    ids = torch.tensor([LLM().encode(PROMPTS[0])])
    out = model.generate(
        ids, custom_generate=pdiff_runtime.hf.generate, pdiff_tokenizer=tokenizer,
        max_new_tokens=100, pdiff_params=GenerationParams(stop=["Lima"], mode="ar"),
    )  # fmt: skip
    whole = model.generate(
        ids, custom_generate=pdiff_runtime.hf.generate, pdiff_tokenizer=tokenizer,
        max_new_tokens=100, pdiff_params=GenerationParams(mode="ar"),
    )  # fmt: skip
    assert out.shape[1] < whole.shape[1]


BAD_CALLS = {
    "beams": ({"num_beams": 2}, "num_beams=2"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "generation mode"),
    "dictionary": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    "another eos": ({"eos_token_id": 3}, r"eos_token_id: expected 57, the eos tag, got \[3\]"),
    "a second eos": ({"eos_token_id": [57, 3]}, r"eos_token_id: expected 57.* got \[57, 3\]"),
    "penalty": ({"repetition_penalty": 1.2}, "logits_processor.*RepetitionPenalty"),
    "processor": (
        {"logits_processor": [transformers.TemperatureLogitsWarper(0.5)]}, "logits_processor"
    ),
    "time": ({"max_time": 1.0}, "stopping_criteria.*MaxTime"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask"),
    "all padding": ({"attention_mask": torch.zeros(1, 4, dtype=torch.int64)}, "prompt"),
    "tags": ({"pdiff_tags": None}, "pdiff_tags, pdiff_tokenizer"),
    "tokenizer": ({"pdiff_tags": None, "tokenizer": 1}, "pdiff_tags, pdiff_tokenizer"),
    "slow tokenizer": ({"pdiff_tags": None, "pdiff_tokenizer": 1}, "pdiff_tokenizer.*int"),
    "a dictionary": ({"pdiff_params": {"n": 2}}, "pdiff_params: expected GenerationParams"),
    "tokens": ({"pdiff_params": GenerationParams(max_tokens=9)}, "max_tokens.*max_new_tokens"),
    "temperature": ({"pdiff_params": GenerationParams(temperature=0.5)}, "temperature"),
    "samples": ({"pdiff_params": GenerationParams(n=2)}, "num_return_sequences"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_generate_can_not_honour_is_refused(model, tiny_tags, name):
    arguments, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        planned(model, random_ids(1, 4), tiny_tags, **arguments)


def test_a_cache_with_keys_is_refused(model, tiny_tags):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="past_key_values"):
        planned(model, ids, tiny_tags, past_key_values=model(ids[:, :3]).past_key_values)


def test_a_prompt_with_control_tokens_is_refused(model, tiny_tags):
    with pytest.raises(ValueError, match="prompt: control token 52"):
        planned(model, torch.tensor([[1, tiny_tags.async_start]]), tiny_tags)


def test_models_with_other_parameters_are_refused(tiny_tags):
    model = make_model("llama", attention_bias=True)
    with pytest.raises(ValueError, match=r"2 that are missing.*self_attn.o_proj.bias"):
        planned(model, random_ids(1, 4), tiny_tags)
    model = make_model("llama")
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 on cpu, torch.float32 on cpu"):
        planned(model, random_ids(1, 4), tiny_tags)


def test_a_failed_answer_raises(model, tiny_tags):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(pdiff_runtime.engine.BadLogitsError):
        planned(model, random_ids(1, 4), tiny_tags)
