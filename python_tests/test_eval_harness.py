"""The engine as a model of lm-evaluation-harness."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from pdiff_runtime import LLM, GenerationParams
from pdiff_runtime.eval.atlas import held_out_records
from pdiff_runtime.eval.harness import PlannedDiffusionLM
from pdiff_runtime.eval.likelihood import causal_log_likelihoods

PERU = "Tell me about Peru: capital and climate."


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, idx) for idx, args in enumerate(arguments)]


def generate(lm: PlannedDiffusionLM, context: str, **gen_kwargs: object) -> str:
    (text,) = lm.generate_until(
        requests("generate_until", (context, gen_kwargs)), disable_tqdm=True
    )
    return text


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture
def lm(llm) -> PlannedDiffusionLM:
    return PlannedDiffusionLM(llm)


@pytest.fixture(scope="module")
def peru(llm) -> str:
    """The prompt as the model reads it."""
    return PlannedDiffusionLM(llm).apply_chat_template([{"role": "user", "content": PERU}])


# --- generate_until ------------------------------------------------------------------------------


def test_answers_are_the_engines(lm, llm, peru):
    assert peru == f"<user>{PERU}<assistant>"
    (output,) = llm.generate([PERU])
    assert generate(lm, peru) == output.text
    ar = PlannedDiffusionLM(llm, mode="ar")
    assert generate(ar, peru) == llm.generate(PERU, GenerationParams(mode="ar"))[0].text


def test_each_request_has_its_own_stop_strings_and_length(lm, llm, peru):
    whole = llm.generate([PERU])[0].text
    texts = lm.generate_until(
        requests(
            "generate_until",
            (peru, {"until": "Lima"}),
            (peru, {"until": ["climate", "weather"], "max_gen_toks": 90}),
            (peru, {"until": [], "max_gen_toks": 20}),
            (peru, {}),
        ),
        disable_tqdm=True,
    )
    assert texts[0] == whole[: whole.index("Lima")]
    assert texts[1] == whole[: min(whole.index(s) for s in ("climate", "weather") if s in whole)]
    assert texts[2] != whole
    assert texts[3] == whole
    assert lm.get_model_info()["pdiff"]["finish_reasons"] == {"stop": 3, "length": 1}


def test_sampling_is_off_unless_asked_for(lm, llm, peru):
    greedy = llm.generate([PERU])[0].text
    assert generate(lm, peru, temperature=50.0, do_sample=False) == greedy
    hot = [{"temperature": 3.0, "do_sample": True, "seed": seed} for seed in (1, 2)]
    texts = [generate(lm, peru, **kwargs) for kwargs in hot]
    assert len({greedy, *texts}) == 3
    assert generate(lm, peru, **hot[0]) == texts[0]
    ar = GenerationParams(mode="ar")
    assert generate(lm, peru, **hot[0], top_k=1, mode="ar") == llm.generate(PERU, ar)[0].text


def test_repeats_of_a_request_differ(lm, peru):
    (request,) = requests("generate_until", (peru, {"temperature": 3.0, "do_sample": True}))
    texts = lm.generate_until([request] * 4, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert lm.generate_until([request] * 4, disable_tqdm=True) == texts


def test_knobs_of_the_engine_may_come_with_a_request(lm, llm, peru):
    params = GenerationParams(unmask="entropy", steps_ratio=0.1)
    assert generate(lm, peru, steps_ratio=0.1) == llm.generate(PERU, params)[0].text


def test_a_prompt_that_the_engine_refuses_has_an_empty_answer(lm, peru):
    texts = lm.generate_until(
        requests("generate_until", (peru, {}), ("say <sync/>", {}), ("a " * 5000, {})),
        disable_tqdm=True,
    )
    assert [bool(text) for text in texts] == [True, False, False]
    assert lm.get_model_info()["pdiff"]["finish_reasons"] == {"stop": 1, "error": 2}


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"num_beams": 4}, "num_beams: no such generation parameter"),
        ({"until": [""]}, "stop: expected"),
        ({"max_gen_toks": 0}, "max_tokens: expected an integer from 1"),
        ({"do_sample": True, "temperature": -1.0}, "temperature: expected"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 7}, "top_p: expected"),
    ],
)
def test_bad_generation_arguments_are_named(lm, peru, gen_kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, peru, **gen_kwargs)


# --- the chat template ---------------------------------------------------------------------------


def test_conversations_are_read_as_the_engine_reads_them(lm, llm):
    history = [
        {"role": "user", "content": PERU},
        {"role": "assistant", "content": "The capital is Lima."},
        {"role": "user", "content": "And of Togo?"},
    ]
    assert lm.tok_encode(lm.apply_chat_template(history)) == llm.encode(history)


def test_tags_in_a_message_and_begun_replies_are_refused(lm):
    with pytest.raises(ValueError, match="control tag"):
        lm.apply_chat_template([{"role": "user", "content": "<sync/> Hi"}])
    with pytest.raises(NotImplementedError, match="gen_prefix"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=False)


# --- likelihoods ---------------------------------------------------------------------------------


def test_a_plan_has_no_likelihood(lm):
    for kind, args in (("loglikelihood", ("a", " b")), ("loglikelihood_rolling", ("a b",))):
        with pytest.raises(NotImplementedError, match="likelihood=ar"):
            getattr(lm, kind)(requests(kind, args))


def test_likelihoods_are_the_causal_ones(llm, peru):
    lm = PlannedDiffusionLM(llm, likelihood="ar")
    answer = llm.generate([PERU], GenerationParams(mode="ar"))[0].text
    long = "a " * 600 + peru
    found = lm.loglikelihood(
        requests("loglikelihood", (peru, answer), ("", answer), (long, answer)), disable_tqdm=True
    )
    ids = lm.tok_encode(answer)
    cut = lm.tok_encode(long)[-(lm.max_length + 1 - len(ids)) :]
    pairs = [(lm.tok_encode(peru), ids), ([llm.tags.eos], ids), (cut, ids)]
    banned = sorted(llm.tags.control_ids - {llm.tags.eos})
    expected = causal_log_likelihoods(llm.model, pairs, banned_ids=banned)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=0.05)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert found[0][1], "what mode ar writes"


def test_a_text_longer_than_the_model_is_scored_in_windows(llm):
    lm = PlannedDiffusionLM(llm, likelihood="ar")
    short, long = "Peru is a country.", "Peru is a country. " * 200
    assert len(lm.tok_encode(long)) > lm.max_length
    one, all_of_it, nothing = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", (short,), (long,), ("",)), disable_tqdm=True
    )
    assert one == pytest.approx(
        lm.loglikelihood(requests("loglikelihood", ("", short)), disable_tqdm=True)[0][0], abs=0.05
    )
    assert all_of_it < one < nothing == 0


# --- the model and its results -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"likelihood": "mc"}, "likelihood: expected None or 'ar', got 'mc'"),
        ({"dtype": "int4"}, "dtype: expected one of bfloat16"),
        ({"steps": 4}, "steps: no such generation parameter"),
        ({"temperature": 0.5}, "temperature: belongs to a task"),
        ({"mode": "fast"}, "mode: expected"),
        ({"pretrained": "/no/such/folder"}, "model: no folder"),
        ({"batch_size": 0}, "batch_size: expected a number above 0 or 'auto', got 0"),
        ({"batch_size": "many"}, "batch_size: expected"),
    ],
)
def test_bad_model_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        PlannedDiffusionLM(**args)


def test_arguments_come_as_a_string():
    text = "mode=ar,seed=5,use_grammar=False,max_gen_toks=33"
    lm = get_model("pdiff").create_from_arg_string(text, {"batch_size": "8", "device": None})
    settings = lm.get_model_info()["pdiff"]["settings"]
    assert (settings["mode"], settings["seed"], settings["max_tokens"]) == ("ar", 5, 33)
    assert settings["use_grammar"] is False
    assert lm.batch_size == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_default_device_of_the_harness_is_the_cpu_where_there_is_no_other():
    lm = get_model("pdiff").create_from_arg_string("", {"device": "cuda:0"})
    assert lm.get_model_info()["pdiff"]["device"] == "cpu"


def task(folder, **fields: object) -> dict:
    """A task on five held-out questions."""
    records = [r for r in held_out_records() if r["family"] == "single"][:5]
    docs = [{"q": r["prompt"], "a": r["parts"][0]["accepted"]} for r in records]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), "utf-8")
    return {
        "task": "facts", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache"),
        },
    } | fields  # fmt: skip


def evaluate(task: dict, **model_args: object) -> dict:
    return lm_eval.simple_evaluate(
        "pdiff", model_args=model_args, tasks=[task], apply_chat_template=True, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_task_of_questions_from_start_to_end(tmp_path, offline):
    results = evaluate(
        task(
            tmp_path, output_type="generate_until", doc_to_target="{{a[0]}}",
            generation_kwargs={"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
        steps_ratio=1.0, seed=3,
    )  # fmt: skip
    samples = results["samples"]["facts"]
    assert all(s["resps"][0][0] in s["doc"]["a"] for s in samples), "an accepted wording each"
    config = results["config"]["pdiff"]
    assert config["settings"]["unmask"] == "entropy"
    assert (config["settings"]["steps_ratio"], config["settings"]["seed"]) == (1.0, 3)
    assert config["settings"]["use_grammar"] is True
    assert config["finish_reasons"] == {"stop": 5}
    assert config["mean_critical_path"] > 1
    json.dumps(results["config"]["pdiff"])


def test_a_task_of_choices_from_start_to_end(tmp_path, offline):
    choices = task(
        tmp_path, output_type="multiple_choice", doc_to_target=1, target_delimiter="",
        doc_to_choice="{{['It is on Mars.', a[0]]}}",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    assert evaluate(choices, likelihood="ar")["results"]["facts"]["acc,none"] == 1.0


def test_the_package_does_not_import_the_harness():
    code = (
        "import sys, pdiff_runtime.eval.atlas, pdiff_runtime.eval.alpaca, pdiff_runtime.train\n"
        "assert 'lm_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
