"""`pdiff bench`: what it writes and draws, and that the README's table is what was measured."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pdiff_runtime.bench import case as cases
from pdiff_runtime.bench import kernels, plots
from pdiff_runtime.bench.case import Case, Limit, Prepared, text_of
from pdiff_runtime.bench.measure import Timing
from pdiff_runtime.serve.cli import cli

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "kernels.json"


def run(*args):
    return CliRunner().invoke(cli, ["bench", "kernels", *map(str, args)])


@pytest.fixture
def fixed_times(monkeypatch):
    """Ours takes 2 ms, everything else 6 ms."""

    def alternate(calls, **_):
        return {name: Timing(2e-3 if name == "ours" else 6e-3, 0.1) for name in calls}

    monkeypatch.setattr(cases, "alternate", alternate)


def nothing():
    return None


def a_record(fixed_times=None, **sweep):
    prepared = Prepared(
        nothing, {"slow way": nothing}, 4e9, "FLOP", Limit("torch.mm", nothing, 24e9), {"bytes": 7}
    )
    return Case("unmask", "greedy", "bf16", lambda: prepared, **sweep).measure(prepared)


def test_a_record_has_rate_share_and_peers(fixed_times):
    record = a_record()
    assert (record["ms"], record["rate"], record["unit"]) == (2.0, 2000.0, "FLOP")
    assert (record["limit"], record["limit_rate"], record["share"]) == ("torch.mm", 4000.0, 0.5)
    assert record["peers"] == {"slow way": {"ms": 6.0, "spread": 0.1}}
    assert record["notes"] == {"bytes": 7}
    text = text_of(record)
    assert "50.0 % of torch.mm" in text
    assert "3.00 x" in text


def test_other_kernels_stay_in_the_file(fixed_times, tmp_path):
    record = a_record()
    kernels.write(tmp_path, kernels.header(), [record, {**record, "kernel": "attention_plan"}])
    kernels.write(tmp_path, kernels.header(), [{**record, "case": "sampled"}])
    written = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert list(written) == ["unmask", "attention_plan"]
    assert [r["case"] for r in written["unmask"]["records"]] == ["sampled"]
    assert "threads" in written["unmask"]["machine"]


def test_a_picture_for_each_kernel(fixed_times, tmp_path):
    pytest.importorskip("matplotlib")
    sweep = [a_record(at=at, axis="rows") for at in (1, 8, 64)]
    file = kernels.write(tmp_path, kernels.header(), [a_record(), *sweep])
    (picture,) = plots.draw_all(file)
    assert picture == tmp_path / "unmask.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_one_kernel(tmp_path):
    result = run("attention_plan", "--smoke", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "attention_plan plan" in result.output
    records = json.loads((tmp_path / "new" / "kernels.json").read_text())["kernels"]
    assert {r["case"] for r in records["attention_plan"]["records"]} == {
        "layout", "layout and twin", "plan"
    }  # fmt: skip


def test_without_matplotlib_the_numbers_are_there(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("attention_plan", "--smoke", "--out", tmp_path)
    assert result.exit_code == 0
    assert "matplotlib is not installed" in result.output
    assert (tmp_path / "kernels.json").exists()


@pytest.mark.parametrize("content", ["{broken", "{}", "[]", '{"kernels": 3}'])
def test_another_file_in_the_way_is_named_before_anything_is_measured(content, tmp_path):
    (tmp_path / "kernels.json").write_text(content)
    result = run("attention_plan", "--smoke", "--out", tmp_path)
    assert result.exit_code == 2
    assert "kernels.json: expected what `pdiff bench kernels` has written" in result.output
    assert "attention_plan plan" not in result.output
    assert (tmp_path / "kernels.json").read_text() == content


def test_an_unknown_kernel_is_named(tmp_path):
    result = run("softmax", "--out", tmp_path)
    assert result.exit_code == 2
    assert "KERNEL: expected hybrid_attention," in result.output
    assert "got softmax" in result.output


@pytest.mark.skipif(not RESULTS.exists(), reason="needs the source tree")
def test_the_readme_has_the_measured_numbers():
    sys.path.append(str(ROOT / "bench"))
    import readme_table as tables

    readme = (ROOT / "README.md").read_text()
    for table_of, file in (
        (tables.table_of, tables.RESULTS),
        (tables.engine_table_of, tables.ENGINE_RESULTS),
        (tables.pareto_table_of, tables.PARETO_RESULTS),
        (tables.ablation_table_of, tables.ABLATION_RESULTS),
    ):
        assert table_of(json.loads(file.read_text())) in readme


@pytest.mark.parametrize("arguments", [["latency", "--runs", 1], ["throughput", "--requests", 2]])
def test_answers_are_timed(arguments):
    arguments = ["bench", *map(str, arguments), "--json", "--max-tokens", "20"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0
    record = json.loads(result.output)
    assert record["num_requests"] == arguments[3:4].count("2") + 1
    assert 0 < record["seconds"] < 60
    assert 0 <= record["scheduling"] <= record["overhead"] < 1


def test_a_load_is_a_list_of_numbers():
    assert CliRunner().invoke(cli, ["bench", "latency", "--runs", "0"]).exit_code == 2
    for wrong in ("1,none", "0", "1,5000"):
        result = CliRunner().invoke(cli, ["bench", "throughput", "--requests", wrong])
        assert result.exit_code == 2
        assert (
            f"--requests: expected numbers up to 4096 like 1,4,16, got {wrong!r}" in result.output
        )
