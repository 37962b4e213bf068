"""The command line: what users type, what they see, and what bad input gets them."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from pdiff_runtime import LLM, Decoder, GenerationParams
from pdiff_runtime.engine import PlanReady, SpanUpdate
from pdiff_runtime.models import BUNDLED_MODEL, ModelConfig, init_weights, save_model
from pdiff_runtime.serve.cli import cli
from pdiff_runtime.serve.generate import parse_plan, watch
from pdiff_runtime.serve.live import LiveRound
from pdiff_runtime.serve.options import check_device, generation_options, load
from pdiff_runtime.serve.progress import TrainingProgress
from pdiff_runtime.train.recipe import load_recipe

PROMPT = "Tell me about France: capital and climate."


def run(*args: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A tiny random model with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        vocab_size=2048, hidden_size=32, num_layers=1, num_heads_q=2, num_heads_kv=1, head_dim=16,
        intermediate_size=32, tie_word_embeddings=True, max_position=256, length_unit=4,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, seed=3)
    save_model(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def llm(model_dir) -> LLM:
    return LLM(model_dir)


# --- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(args):
    code = (
        "import sys\n"
        "from pdiff_runtime.serve.cli import cli\n"
        f"cli({args!r}, standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_package_gives_what_it_promises():
    code = (
        "import pdiff_runtime as pdiff\n"
        "assert all(getattr(pdiff, name) is not None for name in pdiff.__all__)\n"
        "assert set(pdiff.__all__) <= set(dir(pdiff))\n"
        "assert not hasattr(pdiff, 'nothing')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- generate ------------------------------------------------------------------------------------


def test_plain_output_is_the_answer_alone(model_dir, llm):
    result = run("generate", PROMPT, "--model", model_dir, "--max-tokens", 40)
    (output,) = llm.generate([PROMPT], GenerationParams(max_tokens=40))
    assert result.exit_code == 0
    assert result.stdout == output.text + "\n"


def test_json_output_says_everything(model_dir, llm):
    args = ["--model", model_dir, "--max-tokens", 40, "--json"]
    result = run("generate", PROMPT, "-", *args, stdin="Tell me a joke.")
    first, second = map(json.loads, result.stdout.splitlines())
    (output,) = llm.generate([PROMPT], GenerationParams(max_tokens=40))
    assert (first["prompt"], second["prompt"]) == (PROMPT, "Tell me a joke.")
    assert first["text"] == output.text
    assert first["token_ids"] == output.token_ids
    assert first["finish_reason"] == output.finish_reason
    assert first["usage"]["num_forwards"] == output.usage.num_forwards
    assert first["seconds"] > 0
    for found, expected in zip(first["rounds"], output.rounds, strict=True):
        assert found == {
            "topics": expected.topics, "lengths": expected.lengths, "spans": expected.spans,
            "num_steps": expected.num_steps,
        }  # fmt: skip


def test_modes(model_dir):
    args = ["--model", model_dir, "--max-tokens", 20, "--json"]
    ar, diffusion = (
        json.loads(run("generate", PROMPT, "--mode", mode, *args).stdout)
        for mode in ("ar", "diffusion")
    )
    assert ar["rounds"] == []
    assert ar["token_ids"]
    # What the other modes are compared with is what this one does.
    assert ar["usage"]["num_forwards_ar"] == len(ar["token_ids"]) + 1
    assert [r["lengths"] for r in diffusion["rounds"]] == [[18]]
    assert diffusion["usage"]["num_forwards"] == 18


def test_an_own_plan_and_every_knob_reach_the_engine(model_dir):
    plan = [[["capital", 8], ["climate", 12]], [["size", 4]]]
    args = [
        "generate", PROMPT, "--model", model_dir, "--plan", json.dumps(plan), "--json",
        "--max-tokens", 60, "--temperature", 0.9, "--top-p", 0.95, "--top-k", 40, "--seed", 7,
        "--unmask", "confidence_threshold", "--threshold", 0.5, "--steps-ratio", 0.5,
        "--alg-temp", 0.1, "--length-scale", 5, "--joint", "--kv-commit", "published",
        "--no-grammar", "--dtype", "float32",
    ]  # fmt: skip
    one, two = (json.loads(run(*args).stdout) for _ in range(2))
    assert one["token_ids"] == two["token_ids"], "same seed"
    assert [r["topics"] for r in one["rounds"]] == [["capital", "climate"], ["size"]]
    assert [r["lengths"] for r in one["rounds"]] == [[10, 15], [5]]


def test_what_a_model_recommends_holds_unless_told_otherwise(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    fields = {"isolate_spans": False, "use_grammar": False, "max_tokens": 60}
    (folder / "generation_config.json").write_text(json.dumps({"pdiff": fields}))
    seen = []

    @click.command()
    @generation_options()
    def command(**options):
        _, params = load(**options)
        seen.append((params.isolate_spans, params.use_grammar, params.max_tokens))

    for args in ([], ["--isolated", "--grammar"], ["--joint", "--no-grammar"]):
        command(["--model", str(folder), *args], standalone_mode=False)
    assert seen == [(False, False, 60), (True, True, 60), (False, False, 60)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "expected an object under 'pdiff'"),
        ({"speed": 1}, "unknown parameter 'speed'"),
        ({"max_tokens": 0}, "max_tokens: expected"),
    ],
)
def test_bad_recommendations_are_named(model_dir, tmp_path, fields, message):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"pdiff": fields}))
    with pytest.raises(ValueError, match=message):
        LLM(folder)


def test_a_device_beyond_those_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:0", "cuda:1"):
        check_device(name)
    with pytest.raises(ValueError, match=r"device: torch \S+ sees 2 CUDA devices, got 'cuda:2'"):
        check_device("cuda:2")


def test_one_round_needs_no_second_list():
    assert parse_plan('[["capital", 8]]') == [[["capital", 8]]]


def test_a_cut_answer_says_so(model_dir):
    args = ["--model", model_dir, "--max-tokens", 8, "--plan", '[["capital", 8]]']
    result = run("generate", PROMPT, *args)
    assert result.exit_code == 0
    assert result.stderr == "cut: the answer needs more than max_tokens=8\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "prompt: expected some text"),
        (["  \n "], "prompt: expected some text"),
        (["Hello <sync/> there"], "prompt: contains the control tag '<sync/>'"),
        ([], "Missing argument 'PROMPT...'"),
        ([PROMPT, "--model", "/no/such/folder"], "model: no folder '/no/such/folder'"),
        (
            [PROMPT, "--mode", "fast"],
            "mode: expected one of 'planned', 'ar', 'diffusion', 'fast_dllm', 'skeleton', got",
        ),
        ([PROMPT, "--max-tokens", 0], "max_tokens: expected an integer from 1"),
        ([PROMPT, "--max-tokens", 100_000], "max_tokens: a prompt of"),
        ([PROMPT, "--temperature", "nan"], "temperature: expected a number"),
        ([PROMPT, "--top-k", "many"], "Invalid value for '--top-k'"),
        ([PROMPT, "--unmask", "all"], "unmask: expected one of"),
        ([PROMPT, "--unmask", "confidence_threshold"], "threshold: 'confidence_threshold' needs"),
        ([PROMPT, "--dtype", "float64"], "Invalid value for '--dtype'"),
        ([PROMPT, "--device", "gpu"], "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ([PROMPT, "--threads", 0], "Invalid value for '--threads'"),
        ([PROMPT, "--threads", 100_000], "Invalid value for '--threads'"),
        ([PROMPT, "--pace", "inf"], "Invalid value for '--pace'"),
        ([PROMPT, "--plan", "capital"], "plan: not valid JSON"),
        ([PROMPT, "--plan", "5"], "plan: expected [["),
        ([PROMPT, "--plan", "[]"], "plan: expected [["),
        ([PROMPT, "--plan", '[["capital", 7]]'], "plan: expected a length in tokens, a multiple"),
        ([PROMPT, "--plan", '[["capital", "8"]]'], "plan: expected a length in tokens"),
        ([PROMPT, "--plan", '[["", 8]]'], "plan: a topic needs words"),
        ([PROMPT, "--wish", "x"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model_dir, args, message):
    model = [] if "--model" in args else ["--model", model_dir]
    result = run("generate", *args, *model)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    code = "from pdiff_runtime.serve.cli import main; main()"
    command = [sys.executable, "-c", code, "check-env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_damaged_model_is_one_line(model_dir, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    result = run("generate", PROMPT, "--model", folder)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: model: ")
    assert result.stderr.count("\n") == 1


# --- the live view -------------------------------------------------------------------------------


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None,
        legacy_windows=False, _environ={},
    )  # fmt: skip


def picture(view: LiveRound) -> str:
    console = view.console
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def letters(token_ids: list[int]) -> str:
    return "".join(f" w{token_id}" for token_id in token_ids)


def round_of(num_spans: int, length: int, console: Console) -> LiveRound:
    bounds = [(10 + i * (length + 2), 10 + i * (length + 2) + length) for i in range(num_spans)]
    plan = PlanReady("r", 0, [f"topic{i}" for i in range(num_spans)], bounds)
    return LiveRound(plan, letters, pad_id=0, console=console)


def test_spans_fill_in_and_are_marked_when_done():
    view = round_of(2, 4, terminal())
    assert picture(view).count("░░░") == 8
    view.update(SpanUpdate("r", 0, [10, 11, 12, 17], [1, 2, 0, 3]))
    shown = picture(view)
    assert shown.count("░░░") == 4
    assert "w1 w2 · ░░░" in shown
    assert "░░░ w3 ░░░ ░░░" in shown
    assert "topic0 3/4" in shown
    assert "✓" not in shown
    view.update(SpanUpdate("r", 1, [13], [0]))
    shown = picture(view)
    assert "✓ topic0 4/4" in shown
    assert "·" not in shown, "pads of a finished span are not shown"


@pytest.mark.parametrize("width", [20, 60, 100])
@pytest.mark.parametrize("num_spans", [1, 2, 5])
def test_panels_fit_the_terminal(width, num_spans):
    view = round_of(num_spans, 12, terminal(width, height=60))
    lines = picture(view).splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(f"topic{i} 0/12" in line for line in lines) for i in range(num_spans))


def test_panels_do_not_shrink():
    view = round_of(1, 40, terminal(40))
    height = len(picture(view).splitlines())
    view.update(SpanUpdate("r", 0, list(range(10, 50)), [0] * 40))
    assert len(picture(view).splitlines()) == height


def test_long_plans_become_one_line_each():
    view = round_of(12, 30, terminal(60, height=20))
    lines = picture(view).splitlines()
    assert len(lines) == 12 + 1
    assert all(f"topic{i}" in lines[i] for i in range(12))


def test_spans_that_had_no_room_are_named():
    plan = PlanReady("r", 0, ["one", "two"], [(10, 14)])
    assert "no room for two" in picture(LiveRound(plan, letters, 0, terminal()))


@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion"])
def test_watching_shows_the_answer_and_its_cost(llm, mode):
    console = terminal(60)
    params = GenerationParams(mode=mode, max_tokens=30)
    output = watch(llm, PROMPT, params, console, pace=0.0)
    shown = console.file.getvalue()
    assert output.text == llm.generate(PROMPT, params)[0].text
    assert f"{output.usage.num_forwards} " in shown
    assert ("autoregressive would need" in shown.replace("\n", " ")) == bool(output.rounds)


# --- check-env -----------------------------------------------------------------------------------


def test_check_env():
    lines = run("check-env").stdout.splitlines()
    assert any(line.startswith("torch") and torch.__version__ in line for line in lines)
    assert lines[-1].startswith("bundled model")
    fields = json.loads(run("check-env", "--json").stdout)
    assert fields["torch"] == torch.__version__
    assert fields["isa_selected"] in fields["isa_built"]
    assert "bundled_model" in fields


# --- data ----------------------------------------------------------------------------------------


def test_synthetic_data_is_valid(tmp_path):
    made = run("data", "synth", "--out", tmp_path, "--num-documents", 60)
    assert made.stdout.splitlines() == [str(tmp_path / n) for n in ("train.jsonl", "eval.jsonl")]
    result = run("data", "validate", tmp_path / "train.jsonl")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "60 documents, 0 bad"
    again = tmp_path / "again"
    run("data", "synth", "--out", again, "--num-documents", 60, "--seed", 2)
    assert (again / "train.jsonl").read_bytes() != (tmp_path / "train.jsonl").read_bytes()
    assert (again / "eval.jsonl").read_bytes() == (tmp_path / "eval.jsonl").read_bytes()


GOOD = "<topic>a1</topic><topic>b1</topic><async>Hello</async><async>there</async>"
BAD_TEXTS = {
    "<topic>a1</topic>": "1 topics but 0 spans",
    "<async>Hello</async>": "0 topics but 1 spans",
    "<topic>a2</topic><async>Hello</async>": "announces 2 x 4 tokens, its span of",
    "<topic>a1</topic><async>The currency of the Netherlands is</async>": "announces 1 x 4",
    "<topic>a</topic><async>Hello</async>": "topic_end",
    "<topic>1</topic><async>Hello</async>": "topic_end",
    "<topic>a1<topic>b1</topic></topic><async>x</async>": "topic_start",
    "<topic>a1</topic><async>Hello": "is never closed",
    "<topic>a1</topic>Hello</async>": "none is open",
    "<topic>a1</topic><async>a<async>b</async></async>": "inside the one opened",
    "<topic>a1</topic><async>Hello</async> there": "behind a span",
    "Hello<sync/>there": "sync",
    "Hello<mask>": "contains the mask token",
    "Hello<eos>": "contains the eos token",
    "": "expected an answer",
}


def test_broken_data_is_listed_with_its_lines(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": "Hi", "text": text}) for text in (GOOD, "Hello", *BAD_TEXTS)]
    lines += ["{", '{"prompt": "Hi"}', '["Hi"]', '{"prompt": "Hi", "text": 5}']
    lines += [json.dumps({"prompt": prompt, "text": GOOD}) for prompt in ("", "<mask>")]
    lines.append(json.dumps({"prompt": "Hi", "text": f"{GOOD}<sync/>{GOOD}"}))
    file.write_text("\n".join(lines) + "\n", "utf-8")
    result = run("data", "validate", file, "--max-errors", 100)
    assert result.exit_code == 1
    num_bad = len(BAD_TEXTS) + 6
    assert result.stdout.splitlines()[-1] == f"{num_bad + 3} documents, {num_bad} bad"
    errors = [line for line in result.stdout.splitlines() if line.startswith(f"{file}:")]
    assert [int(line.split(":")[1]) for line in errors] == list(range(3, 3 + num_bad))
    for error, expected in zip(errors, BAD_TEXTS.values(), strict=False):
        assert expected in error
    shown = run("data", "validate", file, "--max-errors", 2).stdout.splitlines()
    assert shown[-1].endswith(f"{num_bad} bad, {num_bad - 2} not shown")
    assert sum(line.startswith(f"{file}:") for line in shown) == 2


def test_brackets_are_no_markup(recipe, tmp_path, capsys):
    data = tmp_path / "[v2]" / "[" / "b].jsonl"
    data.parent.mkdir(parents=True)
    document = {"prompt": "Hi", "text": GOOD, "family": "[red]"}
    data.write_text(json.dumps(document) + "\n", "utf-8")
    result = run("data", "validate", data)
    assert result.exit_code == 0
    assert "[red]" in result.stdout
    recipe.write_text(RECIPE.replace('"ar"', '"[/ar]"'), "utf-8")
    with TrainingProgress(load_recipe(str(recipe)), is_live=True) as progress:
        progress.log(RECORD | {"stage": "[/ar]"})
    assert "[/ar]" in capsys.readouterr().out


def test_validating_nothing_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for file in (tmp_path / "empty.jsonl", tmp_path / "missing.jsonl"):
        result = run("data", "validate", file)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: file: ")


# --- train ---------------------------------------------------------------------------------------

RECIPE = """
data = "atlas"
tokenizer = "atlas"
num_documents = 40
log_every = 1

[model]
vocab_size = 2048
hidden_size = 32
num_layers = 1
num_heads_q = 2
num_heads_kv = 1
head_dim = 16
intermediate_size = 32
tie_word_embeddings = true
max_position = 256
length_unit = 4

[[stage]]
name = "ar"
num_tokens = 400
formats = { untagged = 1.0 }
batch_tokens = 256

[[stage]]
name = "planned"
num_tokens = 1000
formats = { planned = 0.8, untagged = 0.1, diffusion = 0.1 }
batch_tokens = 256
"""


RECORD = {
    "stage": "ar", "step": 1, "tokens": 200, "loss": 7.6, "loss_ar": 7.6, "loss_span": 0.0,
    "grad_norm": 1.0, "lr": 1e-3, "seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE, "utf-8")
    return file


def test_training_goes_on_where_it_stopped(recipe, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    first = run("train", recipe, "--out", parts, "--max-steps", 2)
    assert first.exit_code == 0
    assert [line.split()[2] for line in first.stdout.splitlines()[:-1]] == ["1", "2"]
    run("train", recipe, "--out", parts, "--max-steps", 2)
    run("train", recipe, "--out", whole, "--max-steps", 4)
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        one, two = (safetensors.torch.load_file(folder / name) for folder in (parts, whole))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

    last = run("train", recipe, "--out", parts)
    assert last.stdout.splitlines()[-1] == f"model: {parts / 'model'}"
    answer = run("generate", PROMPT, "--model", parts / "model", "--max-tokens", 20)
    assert answer.exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_training_after_its_step(recipe, tmp_path, monkeypatch, number):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    log = TrainingProgress.log

    def log_and_signal(progress, record):
        log(progress, record)
        signal.raise_signal(number)

    earlier = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "log", log_and_signal)
        stopped = run("train", recipe, "--out", parts)
    assert stopped.exit_code == 128 + number
    assert len(stopped.stdout.splitlines()) == 2  # one step, and the model
    assert "the same command goes on from here" in stopped.stderr
    assert signal.getsignal(number) is earlier
    for out in (parts, whole):
        assert run("train", recipe, "--out", out).exit_code == 0
    one, two = (safetensors.torch.load_file(f / "checkpoint.safetensors") for f in (parts, whole))
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


def test_what_training_writes_is_as_readable_as_other_files(recipe, tmp_path):
    assert run("train", recipe, "--out", tmp_path / "run", "--max-steps", 1).exit_code == 0
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {file.stat().st_mode for file in files} == {recipe.stat().st_mode}


def test_a_checkpoint_of_another_model_is_named(recipe, tmp_path):
    out = tmp_path / "run"
    assert run("train", recipe, "--out", out, "--max-steps", 1).exit_code == 0
    (out / "recipe.json").unlink()
    recipe.write_text(RECIPE.replace("hidden_size = 32", "hidden_size = 48"), "utf-8")
    result = run("train", recipe, "--out", out)
    assert result.exit_code == 2
    assert "or not of this recipe's model" in result.stderr


def test_a_run_is_not_continued_with_another_recipe(recipe, tmp_path):
    out = tmp_path / "run"
    run("train", recipe, "--out", out, "--max-steps", 1)
    recipe.write_text(RECIPE.replace("batch_tokens = 256", "batch_tokens = 512"), "utf-8")
    result = run("train", recipe, "--out", out)
    assert result.exit_code == 2
    assert "holds a run with other settings (stages)" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-recipe"], "recipe: no file 'no-such-recipe', and the shipped ones are: atlas"),
        (["{recipe}", "--data", "missing.jsonl"], "data: expected 'atlas' or a JSONL file"),
        (["{recipe}", "--data", "{recipe}"], "{recipe}:1: expected a JSON object"),
        (["{recipe}", "--data", "{bad}"], "document 2: prompt: expected some text"),
        (["{recipe}", "--data", "{long}"], "document 1: expected at most max_position=256 tokens"),
        (["{recipe}", "--data", "{latin}"], "{latin}:1: 'utf-8' codec can't decode byte 0xe9"),
        (["{recipe}", "--max-steps", "-1"], "Invalid value for '--max-steps'"),
    ],
)
def test_bad_training_input(recipe, tmp_path, args, message):
    files = {"recipe": recipe} | {name: tmp_path / name for name in ("bad", "long", "latin")}
    good = json.dumps({"prompt": "Hi", "text": GOOD}) + "\n"
    files["bad"].write_text(good + json.dumps({"prompt": "", "text": GOOD}), "utf-8")
    files["long"].write_text(json.dumps({"prompt": "word " * 500, "text": GOOD}), "utf-8")
    files["latin"].write_bytes('{"prompt": "\xe9"}'.encode("latin-1"))
    result = run("train", *(arg.format(**files) for arg in args), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message.format(**files)}")


def test_own_data(recipe, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Hi", "text": GOOD}) + "\n", "utf-8")
    out = tmp_path / "run"
    assert run("train", recipe, "--out", out, "--data", data, "--max-steps", 1).exit_code == 0
    assert not (out / "data").exists()


def test_a_vocabulary_must_fit_its_model(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("vocab_size = 2048", "vocab_size = 100"), "utf-8")
    result = run("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: model.vocab_size: expected at least 2048")


def test_bars_take_every_record(recipe, capsys):
    with TrainingProgress(load_recipe(str(recipe)), is_live=True) as progress:
        progress.log(RECORD)
        progress.log(RECORD | {"stage": "planned", "tokens": 1000})
    shown = capsys.readouterr().out
    assert "50.0%" in shown
    assert "100.0%" in shown
