"""Log-likelihoods by a plain causal forward."""

from __future__ import annotations

import pytest
import torch

from pdiff_runtime import LLM, GenerationParams, SpanLayout, ops
from pdiff_runtime.eval import likelihood
from pdiff_runtime.eval.likelihood import causal_log_likelihoods
from pdiff_runtime.models.attention import PackedAttention


def log_probs(model, token_ids: list[int]) -> torch.Tensor:
    """``[n - 1, vocab_size]``: what each row says of the token behind it."""
    config, n = model.config, len(token_ids)
    plan = ops.AttentionPlan.pack(
        [SpanLayout.causal(n, n)], num_heads_q=config.num_heads_q,
        num_heads_kv=config.num_heads_kv, head_dim=config.head_dim,
    )  # fmt: skip
    attend = PackedAttention(plan, model.cos, model.sin, torch.arange(n))
    logits = model.logits(model(torch.tensor(token_ids), attend))
    return logits.log_softmax(-1)[:-1]


PAIRS = [([1, 2, 3], [4, 5]), ([9], [8, 7, 6, 5]), ([1, 2, 3], []), ([30, 31], [32])]


def test_it_is_the_sum_of_the_rows_before_each_token(tiny_model):
    results = causal_log_likelihoods(tiny_model, PAIRS)
    for (context, continuation), (value, _) in zip(PAIRS, results, strict=True):
        rows = log_probs(tiny_model, context + continuation)[len(context) - 1 :]
        expected = sum(float(row[i]) for row, i in zip(rows, continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-4)


def test_company_changes_nothing(tiny_model, monkeypatch):
    together = causal_log_likelihoods(tiny_model, PAIRS)
    alone = [causal_log_likelihoods(tiny_model, [pair])[0] for pair in PAIRS]
    monkeypatch.setattr(likelihood, "_MAX_ROWS", 6)
    monkeypatch.setattr(likelihood, "_MAX_LOGITS_ROWS", 2)
    cut = causal_log_likelihoods(tiny_model, PAIRS)
    for results in (alone, cut):
        assert [value for value, _ in results] == pytest.approx([v for v, _ in together], abs=1e-4)
        assert [flag for _, flag in results] == [flag for _, flag in together]


def test_continuations_share_out_the_whole_probability(tiny_model):
    vocab = range(tiny_model.config.vocab_size)
    results = causal_log_likelihoods(tiny_model, [([1, 2], [token]) for token in vocab])
    values = torch.tensor([value for value, _ in results])
    assert values.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    assert [flag for _, flag in results] == [i == int(values.argmax()) for i in vocab]


def test_what_is_banned_leaves_its_share_to_the_others(tiny_model):
    context, banned = [1, 2], [5, 9, 11]
    vocab = range(tiny_model.config.vocab_size)
    results = causal_log_likelihoods(
        tiny_model, [(context, [token]) for token in vocab], banned_ids=banned
    )
    rest = log_probs(tiny_model, [*context, 0])[-1].index_fill(0, torch.tensor(banned), -torch.inf)
    expected = rest - rest.logsumexp(0)
    assert [value for value, _ in results] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [flag for _, flag in results].index(True) == int(rest.argmax())


def test_what_mode_ar_writes_is_the_likeliest():
    llm = LLM(dtype=torch.float32)
    prompt = llm.encode("Capital of Togo?")
    params = GenerationParams(mode="ar", max_tokens=40, logprobs=True)
    (output,) = llm.generate([prompt], params)
    pair = (prompt, output.token_ids)
    ((value, _),) = causal_log_likelihoods(llm.model, [pair])
    assert value == pytest.approx(sum(output.logprobs), abs=1e-2)
    banned = sorted(llm.tags.control_ids - {llm.tags.eos})
    ((_, is_likeliest),) = causal_log_likelihoods(llm.model, [pair], banned_ids=banned)
    assert is_likeliest


def test_tags_open_no_span(tiny_model, tiny_tags):
    inside = [tiny_tags.async_start, 3, 4, tiny_tags.async_end]
    ((one, _),) = causal_log_likelihoods(tiny_model, [([1, *inside], [5])])
    expected = log_probs(tiny_model, [1, *inside, 5])[-1, 5]
    assert one == pytest.approx(float(expected), abs=1e-4)


def test_what_does_not_fit_is_refused(tiny_model):
    longest = tiny_model.config.max_position
    causal_log_likelihoods(tiny_model, [([1] * longest, [2])])
    for pair in (([1] * longest, [2, 3]), ([], [1])):
        with pytest.raises(ValueError, match="pairs: expected a context and up to 513 tokens"):
            causal_log_likelihoods(tiny_model, [pair])
