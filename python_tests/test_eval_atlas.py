"""Scores on the held-out prompts: what counts as right, what counts as failed, what is reported."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from pdiff_runtime import LLM, EngineConfig, GenerationParams, RequestOutput
from pdiff_runtime.engine import Round, Usage
from pdiff_runtime.eval.answering import answer
from pdiff_runtime.eval.atlas import (
    Scored,
    answer_len,
    evaluate,
    held_out_records,
    marks_of,
    true_plan,
)
from pdiff_runtime.models import BUNDLED_MODEL
from pdiff_runtime.serve.cli import cli
from pdiff_runtime.serve.eval import table_of

RECORD = {
    "prompt": "France: capital, size.",
    "family": "sheet",
    "seed": 0,
    "parts": [
        {"topic": "capital", "entity": "France", "field": "capital",
         "accepted": ["The capital is Paris.", "Its capital city is Paris."]},
        {"topic": "size", "entity": "France", "field": "size",
         "accepted": ["The country is slightly larger than California."]},
    ],
}  # fmt: skip
PARIS, SIZE = "Its capital city is Paris.", "The country is slightly larger than California."

NEIGHBOUR = {
    "topic": "neighbour", "entity": "Ghana", "field": "neighbour",
    "accepted": ["One neighbour is Togo.", "Next to it is Togo.", "One neighbour is Benin."],
}  # fmt: skip
COUPLED = {"prompt": "Name two.", "family": "coupled", "seed": 0, "parts": [NEIGHBOUR] * 2}


def answered(*spans: tuple[str, str, int], finish_reason: str = "stop") -> RequestOutput:
    """An output with one round of ``(topic, text, length)``."""
    topics, texts, lengths = (list(column) for column in zip(*spans, strict=True))
    return dataclasses.replace(
        plain(" ".join(texts), finish_reason), rounds=[Round(topics, lengths, texts)]
    )


def plain(text: str, finish_reason: str = "stop") -> RequestOutput:
    return RequestOutput(
        request_id="r", token_ids=[1] * 9, text=text, rounds=[], usage=Usage(),
        finish_reason=finish_reason,
    )  # fmt: skip


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, ["eval", "atlas", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(config=EngineConfig(batch_invariant=True))


@pytest.fixture(scope="module")
def few() -> list[dict]:
    """Two records of each family."""
    records = held_out_records()
    families = dict.fromkeys(record["family"] for record in records)
    return [r for name in families for r in [r for r in records if r["family"] == name][:2]]


# --- marks ---------------------------------------------------------------------------------------


def test_a_planned_answer_is_marked_span_by_span():
    assert marks_of(RECORD, answered(("capital", PARIS, 8), ("size", SIZE, 12))) == [True, True]
    assert marks_of(RECORD, answered(("size", SIZE, 12), ("capital", PARIS, 8))) == [True, True]
    assert marks_of(RECORD, answered(("capital", SIZE, 12), ("size", PARIS, 8))) == [False, False]
    assert marks_of(RECORD, answered(("capital", PARIS, 8))) == [True, False]
    assert marks_of(RECORD, answered(("capital", f"{PARIS} Yes.", 8))) == [False, False]


def test_an_answer_without_a_plan_is_searched():
    assert marks_of(RECORD, plain(f"Well. {PARIS} {SIZE}")) == [True, True]
    assert marks_of(RECORD, plain("The capital is Rome.")) == [False, False]


def test_one_span_without_topics_is_no_plan():
    output = plain(f"{PARIS} {SIZE}")
    output.rounds = [Round([], [20], [output.text])]
    assert marks_of(RECORD, output) == [True, True]


@pytest.mark.parametrize("reason", ["length", "invalid_plan", "error", "abort", "deadline"])
def test_an_answer_that_did_not_end_by_itself_is_wrong(reason):
    spans = ("capital", PARIS, 8), ("size", SIZE, 12)
    assert marks_of(RECORD, answered(*spans, finish_reason=reason)) == [False, False]
    assert marks_of(RECORD, plain(f"{PARIS} {SIZE}", reason)) == [False, False]


def test_topics_are_exact_only_in_order_and_alone(llm):
    right, other = ("capital", PARIS, 8), ("size", SIZE, 12)
    exact = [
        Scored.of(llm, RECORD, answered(*spans)).topics_exact
        for spans in ([right, other], [other, right], [right], [right, other, other])
    ]
    assert exact == [True, False, False, False]
    assert not Scored.of(llm, RECORD, plain(PARIS)).topics_exact


def test_a_length_has_room_if_some_wording_fits(llm):
    least = min(len(llm.tokenizer.encode_text(w)) for w in RECORD["parts"][0]["accepted"])
    for length, fits in ((least, True), (least - 1, False)):
        scored = Scored.of(llm, RECORD, answered(("capital", PARIS, length)))
        assert scored.has_room == [fits, False]  # the other part has no span at all


@pytest.mark.parametrize(
    ("texts", "num_stated", "num_repeated"),
    [
        (["One neighbour is Togo.", "One neighbour is Benin."], 2, 0),
        (["One neighbour is Togo.", "One neighbour is Togo."], 2, 1),
        (["One neighbour is Togo.", "Next to it is Togo."], 2, 1),
        (["One neighbour is Togo.", "One neighbour is Mars."], 1, 0),
        (["Nothing.", "Nothing."], 0, 0),
    ],
)
def test_coupled_spans_that_say_the_same_collide(llm, texts, num_stated, num_repeated):
    for output in (
        answered(*(("neighbour", text, 8) for text in texts)),
        plain(" ".join(texts)),
    ):
        scored = Scored.of(llm, COUPLED, output)
        assert (scored.num_stated, scored.num_repeated) == (num_stated, num_repeated)


def test_independent_parts_never_collide(llm):
    assert Scored.of(llm, RECORD, plain(f"{PARIS} {PARIS} {SIZE}")).num_stated == 0


# --- what is told in advance ---------------------------------------------------------------------


def test_a_true_plan_makes_exact_topics_with_room(llm, few):
    params = [GenerationParams(plan=true_plan(llm, r), steps_ratio=0.1) for r in few]
    overall = evaluate(llm, few, params, batch=8).overall
    assert (overall.topics_exact, overall.room) == (1.0, 1.0)


def test_the_true_length_is_that_of_the_first_wordings(llm):
    text = " ".join(part["accepted"][0] for part in RECORD["parts"])
    needed = len(llm.tokenizer.encode_text(text))
    assert 0 <= answer_len(llm, RECORD) - needed < llm.model.config.length_unit
    assert answer_len(llm, RECORD) % llm.model.config.length_unit == 0


# --- reports -------------------------------------------------------------------------------------


def test_a_report_of_the_bundled_model(llm, few):
    report = evaluate(llm, few)
    assert list(report.families) == ["sheet", "context", "single", "coupled", "scope"]
    assert all(scores.num_prompts == 2 for scores in report.families.values())
    assert report.overall.num_facts == sum(len(record["parts"]) for record in few)
    assert report.finish_reasons == {"stop": 10}
    independent = [s.exact for name, s in report.families.items() if name != "coupled"]
    assert report.macro_exact == pytest.approx(sum(independent) / 4)
    assert report.overall.topics_exact == 1.0
    assert report.overall.exact > 0.5
    assert report.families["coupled"].repeated is not None
    assert report.families["sheet"].repeated is None
    usages = [scored.output.usage for scored in report.answers]
    assert report.overall.critical_path == pytest.approx(sum(u.critical_path for u in usages) / 10)
    assert report.overall.padding * sum(u.span_tokens for u in usages) == pytest.approx(
        sum(usage.pad_tokens for usage in usages)
    )
    assert json.loads(json.dumps(report.to_dict()))["overall"]["num_prompts"] == 10


def test_the_batch_changes_no_mark(llm, few):
    one, five = (evaluate(llm, few, batch=batch) for batch in (1, 5))
    assert [a.marks for a in one.answers] == [a.marks for a in five.answers]
    assert [a.output.text for a in one.answers] == [a.output.text for a in five.answers]


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_modes_without_a_plan_have_no_plan_scores(llm, few, mode):
    report = evaluate(llm, few[:4], GenerationParams(mode=mode, max_tokens=60, steps_ratio=0.1))
    assert (report.overall.topics_exact, report.overall.room) == (None, None)
    assert (report.overall.padding is None) == (mode == "ar")
    assert len(report.answers) == 4


def test_failures_are_counted_and_wrong(llm, few):
    report = evaluate(llm, few, GenerationParams(max_tokens=6))
    assert report.finish_reasons == {"length": 10}
    assert report.overall.num_failures == 10
    assert report.overall.exact == 0.0


def test_a_prompt_that_the_engine_refuses_fails_alone(llm, few):
    bad = few[1] | {"prompt": "Tell me <sync/> about Peru: capital."}
    report = evaluate(llm, [few[0], bad, few[2]], batch=3)
    assert [a.output.finish_reason for a in report.answers] == ["stop", "error", "stop"]
    assert "control tag" in str(report.answers[1].output.error)
    assert not any(report.answers[1].marks)
    assert report.overall.num_failures == 1


def test_where_every_prompt_is_refused_the_reason_is_raised(llm, few):
    with pytest.raises(ValueError, match="max_tokens: a prompt of"):
        evaluate(llm, few, GenerationParams(max_tokens=10_000))


def test_no_prompt_is_tried_twice(llm, few, monkeypatch):
    tried = []

    def fail(prompts, params):
        tried.extend(prompts)
        return [plain("", "error") for _ in prompts]

    monkeypatch.setattr(llm, "generate", fail)
    report = evaluate(llm, few, batch=4)
    assert tried == [record["prompt"] for record in few]
    assert report.overall.num_failures == len(few)


def test_bad_arguments_are_named(llm, few):
    params = GenerationParams()
    with pytest.raises(ValueError, match="records: expected at least one"):
        evaluate(llm, [])
    with pytest.raises(ValueError, match="params: expected 10, one per record, got 1"):
        evaluate(llm, few, [params])
    with pytest.raises(ValueError, match="params: expected n=1, got 2"):
        evaluate(llm, few, dataclasses.replace(params, n=2))
    for batch in (0, -1, True, 1.5, "4"):
        with pytest.raises(ValueError, match="batch: expected an integer >= 1"):
            answer(llm, ["Hi"], [params], batch=batch)


def test_a_model_without_a_tokenizer_is_refused(tiny_model, tiny_tags, few):
    with pytest.raises(ValueError, match="llm: expected one with a tokenizer"):
        evaluate(LLM(tiny_model, tags=tiny_tags), few)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_report(tmp_path):
    out = tmp_path / "made" / "report.json"
    result = run("--limit", 1, "--batch", 5, "--out", out)
    assert result.exit_code == 0
    rows = [line.split()[0] for line in result.stdout.splitlines() if "%" in line]
    assert rows == ["sheet", "context", "single", "scope", "mean", "coupled", "all", "coupled"]
    report = json.loads(out.read_text("utf-8"))
    assert report["header"]["settings"]["seed"] == 0
    assert report["header"]["settings"]["threshold"] == 0.95, "what the model recommends"
    assert report["header"]["machine"]
    assert len(report["answers"]) == report["overall"]["num_prompts"] == 5
    assert sum(map(sum, (a["marks"] for a in report["answers"]))) == pytest.approx(
        report["overall"]["exact"] * report["overall"]["num_facts"]
    )
    assert list(out.parent.iterdir()) == [out]


def test_a_model_that_recommends_nothing_is_named_by_its_modes_defaults(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    (folder / "generation_config.json").unlink()
    result = run("--model", folder, "--limit", 1, "--family", "single")
    assert result.exit_code == 0
    assert "planned, entropy, steps_ratio 1" in result.output
    report = run("--model", folder, "--limit", 1, "--mode", "fast_dllm", "--json")
    settings = json.loads(report.stdout)["header"]["settings"]
    assert (settings["unmask"], settings["threshold"]) == ("confidence_threshold", 0.9)
    assert settings["temperature"] == 0.0


def test_json_on_stdout_is_the_report_without_answers():
    result = run("--limit", 1, "--family", "scope", "--family", "scope", "--json", "--mode", "ar")
    report = json.loads(result.stdout)
    assert list(report["families"]) == ["scope"]
    assert report["header"]["settings"]["mode"] == "ar"
    assert report["overall"]["num_prompts"] == 1
    assert "answers" not in report


def test_a_number_of_steps_takes_a_rule_that_counts_them():
    args = ["--limit", 1, "--family", "scope", "--json", "--steps-ratio", 0.5]
    rules = [
        json.loads(run(*args, *more).stdout)["header"]["settings"]["unmask"]
        for more in ([], ["--unmask", "maskgit_plus"])
    ]
    assert rules == ["entropy", "maskgit_plus"]


def test_only_coupled_parts_have_no_mean():
    result = run("--limit", 1, "--family", "coupled")
    assert "mean" not in result.stdout
    assert "coupled parts: " in result.stdout


def test_the_table_fits_80_columns(llm, few):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table_of(evaluate(llm, few, batch=10)))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(name in lines[0] for name in ("exact", "topics", "room", "pads", "path", "ms"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--family", "fruit"], "--family: expected one of sheet, context"),
        (["--limit", 0], "Invalid value for '--limit'"),
        (["--batch", 0], "Invalid value for '--batch'"),
        (["--given", "all"], "Invalid value for '--given'"),
        (["--mode", "fast"], "mode: expected"),
        (["--mode", "ar", "--given", "plan"], "plan: expected a mode with plans"),
        (["--max-tokens", 100_000], "max_tokens: a prompt of"),
        (["--model", "/no/such/folder"], "model: no folder"),
        (["--seed", -1], "seed: expected an integer"),
        (["--out", "/dev/null/report.json"], "/dev/null: "),
        (["--out", ""], "out: expected the name of a file, got '.'"),
        (["--out", "."], "Invalid value for '--out'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    result = run("--limit", 1, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1
