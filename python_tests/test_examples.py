"""The examples of docs/examples run as they say."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pdiff_runtime.serve.cli import cli

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
SERVER = EXAMPLES / "asyncio_server.py"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on ")
    yield process, int(line.split()[-1])
    process.kill()


def lines_of(port: int, *requests: str) -> list[dict]:
    """Send requests, and read lines until each has ended."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall("".join(request + "\n" for request in requests).encode())
        lines, num_ended = [], 0
        with client.makefile() as stream:
            while num_ended < len(requests):
                lines.append(json.loads(stream.readline()))
                num_ended += "done" in lines[-1] or "error" in lines[-1]
        return lines


def test_the_server_streams_an_answer(server):
    lines = lines_of(server[1], json.dumps({"prompt": "Tell me about Peru: capital, exports."}))
    assert lines[0] == {"plan": ["capital", "exports"]}
    assert lines[-1] == {"done": "stop"}
    assert "Lima" in "".join(line.get("text", "") for line in lines)


def test_the_server_survives_bad_requests(server):
    lines = lines_of(
        server[1], "{", "[]", "{}", '{"prompt": ""}', '{"prompt": "x", "params": {"top_p": 7}}',
        '{"prompt": "x", "params": {"nonsense": 1}}', '{"prompt": "x", "timeout_s": -1}',
        '{"prompt": "What is the currency of Japan?"}',
    )  # fmt: skip
    assert ["error" in line for line in lines[:7]] == [True] * 7
    assert lines[-1] == {"done": "stop"}
    line = lines_of(server[1], json.dumps({"prompt": "word " * 20_000}))[0]
    assert line["error"].startswith("ValueError: ")


def test_hanging_up_is_no_trouble_and_sigterm_ends_it(server):
    process, port = server
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b'{"prompt": "Tell me about Chad: capital, climate."}\n')
    assert lines_of(port, '{"prompt": "What is the currency of Japan?"}')[-1] == {"done": "stop"}
    with socket.create_connection(("127.0.0.1", port), timeout=60):  # one that says nothing
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(30) == 0
    assert time.monotonic() - started < 15
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_the_page_on_training_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (EXAMPLES.parent / "training.md").read_text(), re.S)
    text = dict(blocks)
    Path("data.jsonl").write_text(text["json"], "utf-8")
    Path("recipe.toml").write_text(text["toml"], "utf-8")
    commands = [shlex.split(line, comments=True) for line in text["bash"].splitlines()]
    assert [command[:2] for command in commands] == [["pdiff", "train"], ["pdiff", "generate"]]
    for command in (["data", "validate", "data.jsonl"], *(c[1:] for c in commands)):
        result = CliRunner().invoke(cli, [*command, *["--max-steps=2"] * (command[0] == "train")])
        assert result.exit_code == 0, result.output


def test_a_transformers_model_learns_a_fact_and_tells_it():
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "hf_transformers.py")]
    before, after = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    assert "Tripoli" not in before
    assert "<async>The capital is Tripoli." in after
